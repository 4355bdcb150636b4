"""Values computed by hand (with `math` only), the formula beside each. Equations are the paper's."""

import decimal
import math

import pytest
import torch

import ioubal_kernels as ik

LN2, LN3 = math.log(2), math.log(3)
F64 = torch.float64


def close(got: torch.Tensor, want: float | list) -> None:
    torch.testing.assert_close(got.detach().to(F64), torch.tensor(want, dtype=F64), rtol=1e-12, atol=1e-14)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


class TestFocal:
    def test_binary_cross_entropy_eq1(self, backend: str) -> None:
        # Eq. 1: -log p for a positive, -log(1 - p) for a negative. p = 3/4: log(4/3); p = 1/4 as negative: log(4/3).
        logits = torch.tensor([[LN3], [-LN3], [0.0]], dtype=F64)
        labels = torch.tensor([0, -1, -2])
        loss = ik.iou_balanced_binary_cross_entropy(
            logits, labels, torch.ones(3, dtype=F64), reduction="none", backend=backend
        )
        close(loss, [[math.log(4 / 3)], [math.log(4 / 3)], [0.0]])

    def test_focal_term(self, backend: str) -> None:
        # FL = -alpha (1 - p)^gamma log p (positive), -(1 - alpha) p^gamma log(1 - p) (negative), p = 3/4, gamma = 2.
        logits = torch.tensor([[LN3, LN3]], dtype=F64)
        loss = ik.iou_balanced_sigmoid_focal_loss(
            logits,
            torch.tensor([0]),
            torch.ones(1, dtype=F64),
            alpha=0.25,
            gamma=2.0,
            reduction="none",
            backend=backend,
        )
        close(loss, [[0.25 * (1 / 16) * math.log(4 / 3), 0.75 * (9 / 16) * math.log(4)]])

    def test_focal_gradient(self, backend: str) -> None:
        # d/dx of a negative: (1 - alpha) p^gamma (p - gamma (1 - p) log(1 - p)); p = 1/2, gamma = 2: .75 * .25 * (.5 +
        # ln 2).
        logits = torch.zeros(1, 1, dtype=F64, requires_grad=True)
        loss = ik.iou_balanced_sigmoid_focal_loss(
            logits, torch.tensor([-1]), torch.zeros(1, dtype=F64), reduction="sum", backend=backend
        )
        loss.backward()
        close(loss, 0.75 * 0.25 * LN2)
        close(logits.grad, [[0.75 * 0.25 * (0.5 + LN2)]])

    def test_alpha_none_and_fractional_gamma(self, backend: str) -> None:
        # p = 1/2: (1/2)^1.5 ln 2, positive and negative alike.
        logits = torch.zeros(1, 2, dtype=F64)
        loss = ik.iou_balanced_sigmoid_focal_loss(
            logits, torch.tensor([1]), torch.ones(1, dtype=F64), alpha=None, gamma=1.5, reduction="sum", backend=backend
        )
        close(loss, 2 * 0.5**1.5 * LN2)


class TestWeights:
    """Eq. 3 and 4 with BCE: losses l = -log p, w_i = q_i S / D, q = iou^eta."""

    logits = (LN3, 0.0, -LN3)  # p = 3/4, 1/2, 1/4
    losses = (math.log(4 / 3), math.log(2), math.log(4))
    iou = (0.81, 0.25, 0.04)
    q = (0.729, 0.125, 0.008)  # eta 1.5

    def call(self, backend: str, **keywords) -> torch.Tensor:
        x = torch.tensor(self.logits, dtype=F64).reshape(3, 1)
        iou = torch.tensor(self.iou, dtype=F64)
        return ik.iou_balanced_binary_cross_entropy(x, torch.tensor([0, 0, 0]), iou, backend=backend, **keywords)

    def test_weights_eq4(self, backend: str) -> None:
        s = sum(self.losses)
        d = sum(q * value for q, value in zip(self.q, self.losses, strict=True))
        want = [[q * s / d * value] for q, value in zip(self.q, self.losses, strict=True)]
        close(self.call(backend, reduction="none"), want)
        close(self.call(backend, reduction="sum"), s)  # Eq. 4 keeps the sum of the positives' losses
        close(self.call(backend), s / 3)

    def test_gradient_has_constant_weights(self, backend: str) -> None:
        # dL/dx_i = w_i (p_i - 1), with w_i and the normaliser constant.
        x = torch.tensor(self.logits, dtype=F64).reshape(3, 1).requires_grad_()
        iou = torch.tensor(self.iou, dtype=F64)
        ik.iou_balanced_binary_cross_entropy(
            x, torch.tensor([0, 0, 0]), iou, reduction="sum", backend=backend
        ).backward()
        s = sum(self.losses)
        d = sum(q * value for q, value in zip(self.q, self.losses, strict=True))
        close(x.grad, [[q * s / d * (p - 1)] for q, p in zip(self.q, (0.75, 0.5, 0.25), strict=True)])

    def test_eta_zero_is_plain_also_at_iou_zero(self, backend: str) -> None:
        x = torch.tensor(self.logits, dtype=F64).reshape(3, 1)
        loss = ik.iou_balanced_binary_cross_entropy(
            x, torch.tensor([0, 0, 0]), torch.zeros(3, dtype=F64), eta=0.0, reduction="none", backend=backend
        )
        close(loss, [[value] for value in self.losses])

    def test_eps_is_added_to_the_denominator(self, backend: str) -> None:
        s = sum(self.losses)
        d = sum(q * value for q, value in zip(self.q, self.losses, strict=True))
        close(self.call(backend, reduction="sum", eps=0.5), s * d / (d + 0.5))

    def test_avg_factor(self, backend: str) -> None:
        close(self.call(backend, avg_factor=7.0), sum(self.losses) / 7)
        close(self.call(backend, avg_factor=torch.tensor(7.0)), sum(self.losses) / 7)

    def test_scopes(self, backend: str) -> None:
        # Rows 0, 1 in scope 0 and row 2 in scope 2: within a scope the sum stays, and one row alone has weight 1.
        ids = torch.tensor([0, 0, 2])
        a, b, c = self.losses
        d = self.q[0] * a + self.q[1] * b
        want = [[self.q[0] * (a + b) / d * a], [self.q[1] * (a + b) / d * b], [c]]
        close(self.call(backend, reduction="none", scope_ids=ids, num_scopes=3), want)

    def test_sample_weight_enters_the_sums_but_not_the_count(self, backend: str) -> None:
        weight = torch.tensor([2.0, 1.0, 0.0], dtype=F64)
        losses = [2 * self.losses[0], self.losses[1], 0.0]
        d = sum(q * value for q, value in zip(self.q, losses, strict=True))
        want = [[q * sum(losses) / d * value] for q, value in zip(self.q, losses, strict=True)]
        close(self.call(backend, reduction="none", weight=weight), want)
        close(self.call(backend, weight=weight), sum(losses) / 3)

    def test_other_classes_of_a_positive_are_negatives_of_weight_one(self, backend: str) -> None:
        # Two positives with IoU 1 and 0: weights 2 and 0 (equal losses ln 2), their other class stays ln 2.
        loss = ik.iou_balanced_binary_cross_entropy(
            torch.zeros(2, 2, dtype=F64),
            torch.tensor([0, 1]),
            torch.tensor([1.0, 0.0], dtype=F64),
            reduction="none",
            backend=backend,
        )
        close(loss, [[2 * LN2, LN2], [LN2, 0.0]])

    def test_iou_is_clamped_to_the_unit_interval(self, backend: str) -> None:
        x = torch.zeros(2, 1, dtype=F64)
        loss = ik.iou_balanced_binary_cross_entropy(
            x, torch.tensor([0, 0]), torch.tensor([7.0, -3.0], dtype=F64), reduction="none", backend=backend
        )
        close(loss, [[2 * LN2], [0.0]])


class TestSoftmax:
    def test_values_and_divisor(self, backend: str) -> None:
        # softmax of (ln 1, ln 2, ln 5) = (1, 2, 5) / 8. Row 0 background: -log(1/8); row 1 class 2: -log(5/8), weight
        # 1 alone.
        row = [0.0, LN2, math.log(5)]
        logits = torch.tensor([row, row, row], dtype=F64, requires_grad=True)
        loss = ik.iou_balanced_cross_entropy(
            logits, torch.tensor([0, 2, -1]), torch.tensor([0.0, 0.3, 0.0], dtype=F64), backend=backend
        )
        close(loss, (math.log(8) + math.log(8 / 5)) / 2)  # two rows are not ignored
        loss.backward()
        close(logits.grad, [[-7 / 16, 2 / 16, 5 / 16], [1 / 16, 2 / 16, -3 / 16], [0.0, 0.0, 0.0]])

    def test_iou_weights(self, backend: str) -> None:
        # Two positives, losses log 8 (class 0) and log(8/5) (class 2), q = .5 and 1, background_index 1.
        row = [0.0, LN2, math.log(5)]
        a, b = math.log(8), math.log(8 / 5)
        d = 0.5 * a + b
        loss = ik.iou_balanced_cross_entropy(
            torch.tensor([row, row], dtype=F64),
            torch.tensor([0, 2]),
            torch.tensor([0.5, 1.0], dtype=F64),
            eta=1.0,
            background_index=1,
            reduction="none",
            backend=backend,
        )
        close(loss, [0.5 * (a + b) / d * a, (a + b) / d * b])

    def test_no_background(self, backend: str) -> None:
        loss = ik.iou_balanced_cross_entropy(
            torch.zeros(2, 4, dtype=F64),
            torch.tensor([0, 3]),
            torch.tensor([1.0, 0.0], dtype=F64),
            background_index=None,
            reduction="none",
            backend=backend,
        )
        close(loss, [2 * math.log(4), 0.0])


class TestSmoothL1:
    def test_eq2_eq5_eq6(self, backend: str) -> None:
        # beta .5: d = .25 -> .0625, d = -1 -> .75, 0, d = .5 -> .25; sum 1.0625; w = w_loc * iou^1.5 = 2 * .125.
        pred = torch.tensor([[0.25, -1.0, 0.0, 0.5]], dtype=F64, requires_grad=True)
        loss = ik.iou_balanced_smooth_l1_loss(
            pred, torch.zeros(1, 4, dtype=F64), torch.tensor([0.25], dtype=F64), beta=0.5, w_loc=2.0, backend=backend
        )
        close(loss, 2 * 0.125 * 1.0625)
        loss.backward()  # Eq. 8: w d / beta inside, w sign(d) outside
        close(pred.grad, [[0.25 * 0.5, -0.25, 0.0, 0.25]])

    def test_eq7(self, backend: str) -> None:
        # L1 losses 4 and 8; q = 1 and 1/8 (lambda 1.5, iou 1 and 1/4): S / D = 12 / 5, times w_loc 3.
        pred = torch.tensor([[1.0] * 4, [2.0] * 4], dtype=F64)
        loss = ik.iou_balanced_smooth_l1_loss(
            pred,
            torch.zeros(2, 4, dtype=F64),
            torch.tensor([1.0, 0.25], dtype=F64),
            beta=0.0,
            normalize=True,
            w_loc=3.0,
            reduction="none",
            backend=backend,
        )
        close(loss, [3 * 12 / 5 * 4, 3 * 12 / 5 * 8 / 8])

    def test_iou_from_the_deltas(self, backend: str) -> None:
        # Same size, shifted by half a width: IoU 1/3. box_weights 10: the delta is 5.
        pred = torch.tensor([[5.0, 0.0, 0.0, 0.0]], dtype=F64)
        loss = ik.iou_balanced_smooth_l1_loss(
            pred, torch.zeros(1, 4, dtype=F64), lambda_=2.0, beta=0.0, box_weights=(10.0,) * 4, backend=backend
        )
        close(loss, 5 / 9)

    def test_weight_per_coordinate_and_divisor(self, backend: str) -> None:
        pred = torch.ones(2, 4, dtype=F64)
        weight = torch.tensor([[1.0, 0, 0, 0], [1, 2, 3, 4]], dtype=F64)
        loss = ik.iou_balanced_smooth_l1_loss(
            pred, torch.zeros(2, 4, dtype=F64), torch.ones(2, dtype=F64), beta=0.0, weight=weight, backend=backend
        )
        close(loss, (1 + 10) / 2)


class TestBoxes:
    def test_delta_coder(self, backend: str) -> None:
        # Anchor 0..10 x 0..20; box centre (7, 12), size 20 x 10: dx = .2, dy = .1, dw = ln 2, dh = -ln 2.
        anchor = torch.tensor([[0.0, 0.0, 10.0, 20.0]], dtype=F64)
        box = torch.tensor([[-3.0, 7.0, 17.0, 17.0]], dtype=F64)
        weights = (10.0, 10.0, 5.0, 5.0)
        deltas = ik.encode_boxes(box, anchor, weights=weights, backend=backend)
        close(deltas, [[2.0, 1.0, 5 * LN2, -5 * LN2]])
        close(ik.decode_boxes(deltas, anchor, weights=weights, backend=backend), box.tolist())

    def test_delta_coder_clamps_the_size(self, backend: str) -> None:
        anchor = torch.tensor([[0.0, 0.0, 2.0, 2.0]], dtype=F64)
        deltas = torch.tensor([[0.0, 0.0, 100.0, -100.0]], dtype=F64, requires_grad=True)
        boxes = ik.decode_boxes(deltas, anchor, backend=backend)
        close(boxes, [[1 - 62.5, 1 - 0.016, 1 + 62.5, 1 + 0.016]])
        boxes.sum().backward()
        close(deltas.grad, [[4.0, 4.0, 0.0, 0.0]])

    def test_fovea_coder(self, backend: str) -> None:
        # Base 10 x 10 at centre (5, 5); box -5..15 x 2.5..45: distances 10, 2.5, 10, 40 over 10.
        anchor = torch.tensor([[0.0, 0.0, 10.0, 10.0]], dtype=F64)
        box = torch.tensor([[-5.0, 2.5, 15.0, 45.0]], dtype=F64)
        deltas = ik.encode_boxes(box, anchor, weights=(1.0, 2.0, 1.0, 1.0), box_coder="fovea", backend=backend)
        close(deltas, [[0.0, -4 * LN2, 0.0, 2 * LN2]])
        close(
            ik.decode_boxes(deltas, anchor, weights=(1.0, 2.0, 1.0, 1.0), box_coder="fovea", backend=backend),
            box.tolist(),
        )

    def test_fovea_targets_are_clamped(self, backend: str) -> None:
        anchor = torch.tensor([[0.0, 0.0, 10.0, 10.0]], dtype=F64)
        box = torch.tensor([[4.9, 6.0, 1000.0, 15.0]], dtype=F64)  # ratios .01, -.1, 99.5, 1
        deltas = ik.encode_boxes(box, anchor, box_coder="fovea", backend=backend)
        close(deltas, [[-math.log(16), -math.log(16), math.log(16), 0.0]])

    @pytest.mark.parametrize(
        ("a", "b", "want"),
        [
            ([0, 0, 2, 2], [0, 0, 2, 2], 1.0),  # identical
            ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7),
            ([0, 0, 2, 2], [2, 0, 4, 2], 0.0),  # touching
            ([0, 0, 2, 2], [5, 5, 6, 6], 0.0),  # disjoint
            ([0, 0, 4, 4], [1, 1, 2, 3], 2 / 16),  # nested
            ([0, 0, 2, 2], [1, 1, 1, 3], 0.0),  # no area
            ([1, 1, 1, 1], [1, 1, 1, 1], 0.0),  # two points
            ([2, 2, 0, 0], [0, 0, 2, 2], 0.0),  # inverted
        ],
    )
    def test_paired_iou(self, backend: str, a: list, b: list, want: float) -> None:
        boxes = torch.tensor([a, b], dtype=F64)
        close(ik.paired_box_iou(boxes[:1], boxes[1:], backend=backend), [want])

    def test_delta_iou(self, backend: str) -> None:
        # Widths 2 and 1 on the same centre: 1/2. Shift by half of a common width: 1/3. Shift by more: 0.
        pred = torch.tensor([[0, 0, LN2, 0], [0.5, 0, 0, 0], [1.5, 0, 0, 0]], dtype=F64)
        close(ik.delta_iou(pred, torch.zeros(3, 4, dtype=F64), backend=backend), [1 / 2, 1 / 3, 0.0])
        # fovea: distances 2 1 1 1 against 1 1 1 1: overlap 4 of union 6.
        pred = torch.tensor([[LN2, 0, 0, 0]], dtype=F64)
        close(ik.delta_iou(pred, torch.zeros(1, 4, dtype=F64), box_coder="fovea", backend=backend), [4 / 6])


class TestDetection:
    """One image, four anchors of 10 x 10: two positives (classes 0 and 1), one background, one ignored."""

    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0]] * 4, dtype=F64)
    boxes = [torch.tensor([[0.0, 0.0, 10.0, 10.0], [5.0, 0.0, 15.0, 10.0]], dtype=F64)]
    labels = [torch.tensor([0, 1])]
    matched = torch.tensor([[0, 1, -1, -2]])

    def call(self, backend: str, **keywords) -> tuple[ik.DetectionLoss, torch.Tensor, torch.Tensor]:
        logits = torch.zeros(1, 4, 2, dtype=F64, requires_grad=True)
        deltas = torch.zeros(1, 4, 4, dtype=F64, requires_grad=True)
        keywords = {"alpha": None, "gamma": 0.0, "eta": 1.0, "lambda_": 1.0, "beta": 0.0} | keywords
        loss = ik.iou_balanced_detection_loss(
            logits, deltas, self.anchors, self.matched, self.boxes, self.labels, backend=backend, **keywords
        )
        return loss, logits, deltas

    def test_values_and_gradients(self, backend: str) -> None:
        # IoU 1 and 1/3: S / D = 2 / (4/3), weights 3/2 and 1/2. Six entries of ln 2, two positives.
        loss, logits, deltas = self.call(backend)
        close(loss.classification, 6 * LN2 / 2)
        close(loss.localization, (0 + 1 / 3 * 0.5) / 2)
        close(loss.mean_iou, torch.tensor((1 + 1 / 3) / 2, dtype=torch.float32).double().item())
        assert loss.num_positives.item() == 2
        assert loss.num_positives.dtype == torch.int64
        assert loss.mean_iou.dtype == torch.float32
        (loss.classification + 10 * loss.localization).backward()
        close(logits.grad, [[[-0.375, 0.25], [0.25, -0.125], [0.25, 0.25], [0.0, 0.0]]])
        close(deltas.grad, [[[0.0] * 4, [-10 / 3 / 2, 0, 0, 0], [0.0] * 4, [0.0] * 4]])

    def test_factors_and_divisors(self, backend: str) -> None:
        loss, _, _ = self.call(backend, w_loc=3.0, cls_weight=5.0, avg_factor=(torch.tensor([4.0]), 8.0))
        close(loss.classification, 5 * 6 * LN2 / 4)
        close(loss.localization, 3 * 1 / 3 * 0.5 / 8)

    def test_normalized_localization_eq7(self, backend: str) -> None:
        # Losses 0 and .5: S / D = .5 / (.5 / 3) = 3, so the second has weight 1.
        loss, _, _ = self.call(backend, normalize_loc=True)
        close(loss.localization, 0.5 / 2)

    def test_level_scope(self, backend: str) -> None:
        # Each positive on its own level: weight 1 each, so the logits' gradients are those of plain BCE.
        loss, logits, _ = self.call(backend, normalizer_scope="level", anchors_per_level=[1, 3])
        loss.classification.backward()
        close(logits.grad, [[[-0.25, 0.25], [0.25, -0.25], [0.25, 0.25], [0.0, 0.0]]])


class TestCalibration:
    def test_ratio_of_sums(self) -> None:
        # Shift by half a width: L1 .5, IoU 1/3; no shift of the centre, width e^-ln2: L1 ln 2, IoU 1/2; lambda 1.
        pred = torch.tensor([[0.5, 0, 0, 0]])
        other = torch.tensor([[0, 0, -LN2, 0]])
        zero = torch.zeros(1, 4)
        got = ik.calibrate_w_loc(iter([(pred, zero), (other, zero)]), lambda_=1.0, beta=0.0)
        assert got == pytest.approx((0.5 + LN2) / (0.5 / 3 + LN2 / 2), rel=1e-6)

    def test_makes_the_sums_equal(self) -> None:
        g = torch.Generator().manual_seed(1)
        target = torch.randn(50, 4, generator=g)
        pred = target + 0.2 * torch.randn(50, 4, generator=g)
        w_loc = ik.calibrate_w_loc([(pred, target)])
        plain = ik.iou_balanced_smooth_l1_loss(pred, target, lambda_=0.0, backend="reference")
        balanced = ik.iou_balanced_smooth_l1_loss(pred, target, w_loc=w_loc, backend="reference")
        torch.testing.assert_close(balanced, plain, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("value", [math.inf, math.nan])
    def test_a_diverged_model_gives_no_factor(self, value: float) -> None:
        pred = torch.full((2, 4), 0.1)
        pred[0, 0] = value
        zero = torch.zeros(2, 4)
        with pytest.raises(ValueError, match="calibrate_w_loc: .*positive, finite balanced loss"):
            ik.calibrate_w_loc([(pred, zero), (torch.full((2, 4), 0.1), zero)])


class TestAnalysis:
    def test_bounded_iou_eq11(self) -> None:
        # (w_t - w_s |d|) / (w_t + w_s |d|), clamped at 0 beyond |d| = w_t / w_s.
        d = torch.tensor([0.0, 0.5, -0.5, 1.0, 3.0], dtype=F64)
        close(ik.analysis.bounded_iou(d), [1.0, 1 / 3, 1 / 3, 0.0, 0.0])
        close(ik.analysis.bounded_iou(d, ratio=2.0), [1.0, 0.6, 0.6, 1 / 3, 0.0])

    def test_bounded_iou_eq12(self) -> None:
        close(ik.analysis.bounded_iou(torch.tensor([0.0, -LN2], dtype=F64), kind="size"), [1.0, 0.5])
        assert ik.analysis.bounded_iou(0.0, "size").item() == 1.0

    @pytest.mark.parametrize("kind", ["center", "size"])
    def test_infinitely_far_off(self, kind: str) -> None:
        d = torch.tensor([math.inf, -math.inf], dtype=F64)
        close(ik.analysis.bounded_iou(d, kind), [0.0, 0.0])
        close(ik.analysis.gradient_norm(d, kind), [0.0, 0.0])
        assert ik.analysis.bounded_iou(math.nan, kind).isnan()

    def test_bound_is_the_exact_iou_of_equal_widths(self) -> None:
        d = torch.tensor([0.1, 0.4, 0.9], dtype=F64)
        pred = torch.stack([d, 0 * d, 0 * d, 0 * d], 1)
        close(ik.delta_iou(pred, torch.zeros_like(pred), backend="reference"), ik.analysis.bounded_iou(d).tolist())

    def test_gradient_norm_eq13_eq14(self) -> None:
        d = torch.tensor([0.05, -0.5], dtype=F64)
        close(
            ik.analysis.gradient_norm(d, "center", 2.0, 3.0, 0.1),
            [3 * (0.95 / 1.05) ** 2 * 0.5, 3 * (0.5 / 1.5) ** 2],
        )
        close(ik.analysis.gradient_norm(d, "size", 2.0, 3.0, 0.1), [3 * math.exp(-0.1) * 0.5, 3 * math.exp(-1.0)])
        close(ik.analysis.gradient_norm(d, "center", 0.0, 1.0, 0.1), [0.5, 1.0])  # plain smooth L1
        close(ik.analysis.gradient_norm(torch.tensor([2.0], dtype=F64), "center", 0.0), [1.0])  # 0^0 = 1
        for kind in ik.analysis.KINDS:  # L1 has no gradient at its minimum, and all of it beside that
            assert ik.analysis.gradient_norm([0.0, 1e-6], kind, beta=0.0).tolist() == [0, pytest.approx(1, abs=1e-4)]


SMALL = [([24.3, 0.0, -3.0], 0), ([45.0, 0.0, 0.0], 0), ([-5.0, 3.0, 3.0], 0), ([7.0], 0)]


@pytest.mark.parametrize("row, label", SMALL)
@pytest.mark.parametrize("dtype, budget", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_small_softmax_losses_keep_their_digits(
    row: list, label: int, dtype: torch.dtype, budget: float, backend: str
) -> None:
    """-log p = log(1 + the others' exponentials over the label's own), in 60 digits; beside a 1, p loses them."""
    with decimal.localcontext() as context:
        context.prec = 60
        powers = [decimal.Decimal(float(x)).exp() for x in torch.tensor(row, dtype=dtype).tolist()]
        p = [float(x / sum(powers)) for x in powers]
        want = float(-(powers[label] / sum(powers)).ln())
        p[label] = float(-sum(x for k, x in enumerate(powers) if k != label) / sum(powers))
    logits = torch.tensor([row], dtype=dtype, requires_grad=True)
    loss = ik.iou_balanced_cross_entropy(
        logits, torch.tensor([label]), torch.ones(1), background_index=None, backend=backend
    )
    loss.backward()
    assert float(loss.detach()) == pytest.approx(want, rel=budget, abs=0)
    assert logits.grad[0].tolist() == pytest.approx(p, rel=budget, abs=0)
