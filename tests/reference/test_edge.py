"""The catalogue of unusual inputs (A1 to A68), on every backend: a defined result, never a NaN that is not in the
input.

The number of the catalogue's entry is in the test's name. Bad inputs that raise are in test_errors; A38's values in
test_hand_values; A14 to A22 and from A41 on in test_edge_autograd.
"""

import math

import pytest
import torch

import ioubal_kernels as ik
from ioubal_kernels import testing

NAN, INF = math.nan, math.inf
F64 = torch.float64


def sigmoid(c: testing.ClassificationInputs, backend: str, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return testing.loss_and_gradient(ik.iou_balanced_sigmoid_focal_loss, c, backend=backend, **options)


def softmax(c: testing.ClassificationInputs, backend: str, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return testing.loss_and_gradient(ik.iou_balanced_cross_entropy, c, backend=backend, **options)


def detection(d: testing.DetectionInputs, backend: str, **options) -> tuple[ik.DetectionLoss, list[torch.Tensor]]:
    return testing.loss_and_gradient(ik.iou_balanced_detection_loss, d, backend=backend, **options)


def exactly_zero(t: torch.Tensor) -> bool:
    """+0 everywhere, not -0 or NaN."""
    return bool((t == 0).all()) and not bool(t.signbit().any())


class TestEmptyAndMasked:
    def test_a01_no_rows(self, backend: str) -> None:
        for shape in ((0,), (0, 7), (3, 0)):
            c = testing.classification_inputs(0, shape)
            for function in (sigmoid, softmax):
                loss, grad = function(c, backend)
                assert loss.item() == 0.0
                assert grad.shape == (*shape, 5)
            assert sigmoid(c, backend, reduction="none")[0].shape == (*shape, 5)
        x = torch.zeros(0, 4, requires_grad=True)
        loss = ik.iou_balanced_smooth_l1_loss(x, torch.zeros(0, 4), backend=backend)
        loss.backward()
        assert loss.item() == 0.0
        assert x.grad.shape == (0, 4)

    @pytest.mark.parametrize(("images", "levels"), [(0, ((2, 3),)), (2, ((0, 3),)), (2, ((0, 3), (2, 2)))])
    @pytest.mark.parametrize("layout", testing.LAYOUTS)
    @pytest.mark.parametrize("scope", ["batch", "level", "image"])
    def test_a01_no_anchors_or_images(self, images: int, levels: tuple, layout: str, scope: str, backend: str) -> None:
        d = testing.detection_inputs(0, images, levels=levels, layout=layout)
        loss, grads = detection(d, backend, normalizer_scope=scope, anchors_per_level=d.level_sizes)
        assert all(torch.isfinite(t).all() for t in loss)
        assert [g.shape for g in grads] == [h.shape for h in d.heads()]
        if images == 0 or len(levels) == 1:
            assert [t.item() for t in loss] == [0.0, 0.0, 0, 0.0]

    def test_a03_no_positives(self, backend: str) -> None:
        d = testing.detection_inputs(0, positive_share=0.0)
        loss, (logits, deltas) = detection(d, backend)
        plain, _ = detection(d, backend, eta=0.0)
        assert loss.classification == plain.classification > 0
        assert loss.localization.item() == 0.0
        assert loss.num_positives.item() == 0
        assert loss.mean_iou.item() == 0.0
        assert exactly_zero(deltas)
        assert (logits[d.matched_idxs == -1] > 0).all()

    def test_a04_all_ignored(self, backend: str) -> None:
        d = testing.detection_inputs(0, positive_share=0.0, ignored_share=1.0)
        loss, grads = detection(d, backend)
        assert [t.item() for t in loss] == [0.0, 0.0, 0, 0.0]
        assert all(exactly_zero(g) for g in grads)
        c = testing.classification_inputs(0, softmax=True, positive_share=0.0, ignored_share=1.0)
        loss, grad = softmax(c, backend)
        assert loss.item() == 0.0
        assert exactly_zero(grad)

    @pytest.mark.parametrize("gt", ["list", "padded"])
    def test_a05_no_boxes(self, gt: str, backend: str) -> None:
        d = testing.detection_inputs(0, positive_share=0.0)
        d.gt_boxes = [b[:0] for b in d.gt_boxes]
        d.gt_labels = [t[:0] for t in d.gt_labels]
        if gt == "padded":
            d = d.padded(extra=0)
        loss, grads = detection(d, backend)
        assert loss.classification > 0
        assert exactly_zero(grads[1])
        d.matched_idxs[0, 0] = 0
        with pytest.raises(ValueError, match=r"got 0 at matched_idxs\[0, 0\].*image 0 has 0 boxes"):
            detection(d, backend)


class TestNonFinite:
    @pytest.mark.parametrize("label", [-1, 0, 3])
    @pytest.mark.parametrize("column", [0, 3])
    def test_a06_nan_logit_stays_in_its_row(self, label: int, column: int, backend: str) -> None:
        c = testing.classification_inputs(0)
        c.labels[9] = label
        _, clean = sigmoid(c, backend)
        c.logits[9, column] = NAN
        loss, grad = sigmoid(c, backend)
        assert loss.isnan()
        assert grad[9, column].isnan()
        others = torch.arange(64) != 9
        assert grad[others].isfinite().all()
        background = others & (c.labels < 0)
        assert torch.equal(grad[background], clean[background])

    def test_a06_softmax(self, backend: str) -> None:
        c = testing.classification_inputs(0, softmax=True)
        for label in (0, 2):
            c.labels[9] = label
            c.logits[9, 1] = NAN
            loss, grad = softmax(c, backend)
            assert loss.isnan()
            assert grad[9].isnan().all()
            assert grad[torch.arange(64) != 9].isfinite().all()

    @pytest.mark.parametrize("normalize", [False, True])
    def test_a06_nan_delta_stays_in_its_row(self, normalize: bool, backend: str) -> None:
        d = testing.detection_inputs(0)
        n, r = (d.matched_idxs >= 0).nonzero()[2].tolist()
        d.bbox_deltas[n, r, 1] = NAN
        loss, (logits, deltas) = detection(d, backend, normalize_loc=normalize)
        assert loss.localization.isnan()
        assert loss.classification.isnan()  # its IoU weight is not a number either
        assert loss.mean_iou.isnan()
        assert deltas[n, r].isnan().any()
        row = torch.zeros(d.matched_idxs.shape, dtype=torch.bool)
        row[n, r] = True
        assert deltas[~row].isfinite().all()
        assert logits[~row].isfinite().all()

    @pytest.mark.parametrize("beta", [0.0, 0.5])
    def test_a06_nan_difference(self, beta: float, backend: str) -> None:
        pred = torch.tensor([[NAN, 2.0, 0.0, -2.0], [INF, 1.0, 0.0, 0.0]], requires_grad=True)
        loss = ik.iou_balanced_smooth_l1_loss(
            pred, torch.zeros(2, 4), torch.ones(2), beta=beta, reduction="none", backend=backend
        )
        assert loss.isnan().tolist() == [True, False]
        (grad,) = torch.autograd.grad(loss.sum(), pred)
        torch.testing.assert_close(grad, torch.tensor([[NAN, 1, 0, -1], [1, 1, 0, 0]]), equal_nan=True)

    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    @pytest.mark.parametrize("layout", testing.LAYOUTS)
    def test_a07_ignored_rows_do_not_count(self, value: float, layout: str, backend: str) -> None:
        d = testing.detection_inputs(0)
        want, clean = detection(d.in_layout(layout), backend)
        ignored = d.matched_idxs == -2
        d.cls_logits[ignored] = value
        d.bbox_deltas[d.matched_idxs < 0] = value
        got, grads = detection(d.in_layout(layout), backend)
        assert [a.item() for a in got] == [a.item() for a in want]
        assert all(torch.equal(a, b) for a, b in zip(grads, clean, strict=True))
        if layout == "flat":
            assert exactly_zero(grads[0][ignored])
            assert exactly_zero(grads[1][d.matched_idxs < 0])

    def test_a07_flat_losses(self, backend: str) -> None:
        for function, kind in ((sigmoid, False), (softmax, True)):
            c = testing.classification_inputs(0, softmax=kind)
            ignored = c.labels == (-1 if kind else -2)
            want, _ = function(c, backend)
            c.logits[ignored] = NAN
            c.iou[ignored] = NAN
            got, grad = function(c, backend)
            assert got == want
            assert exactly_zero(grad[ignored])

    def test_a08_infinite_logits(self, backend: str) -> None:
        # Rows: positive at +inf and -inf, negative at +inf and -inf. alpha .25; one positive per scope, so its weight
        # is 1.
        x = torch.tensor([[INF], [-INF], [INF], [-INF]], requires_grad=True)
        loss = ik.iou_balanced_sigmoid_focal_loss(
            x, torch.tensor([0, 0, -1, -1]), torch.full((4,), 0.7), scope_ids=torch.arange(4), num_scopes=4,
            reduction="none", backend=backend,
        )  # fmt: skip
        assert loss.flatten().tolist() == [0.0, INF, INF, 0.0]
        loss.sum().backward()
        assert x.grad.flatten().tolist() == [0.0, -0.25, 0.75, 0.0]

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 10.0])
    def test_a08_infinite_positive_among_others(self, gamma: float, backend: str) -> None:
        # The limit of S / D as one loss grows is 1 / its own power: weights q_i / q of the infinite one.
        x = torch.tensor([[-INF], [0.0]], requires_grad=True)
        loss = ik.iou_balanced_sigmoid_focal_loss(
            x, torch.tensor([0, 0]), torch.tensor([0.5, 0.25]), eta=1.0, gamma=gamma, reduction="sum", backend=backend
        )
        loss.backward()
        assert loss.item() == INF
        slope = 0.5 ** (gamma + 1) + gamma * 0.5 ** (gamma + 1) * math.log(2)  # of a positive at logit 0
        torch.testing.assert_close(x.grad, torch.tensor([[-0.25], [-0.25 * 0.5 * slope]]))

    def test_a08_softmax(self, backend: str) -> None:
        x = torch.tensor([[INF, 0.0, 1.0], [0.0, INF, 1.0], [0.0, -INF, 0.0], [-INF, 0.0, 0.0]], requires_grad=True)
        loss = ik.iou_balanced_cross_entropy(
            x, torch.tensor([0, 0, 0, 0]), torch.ones(4), reduction="none", backend=backend
        )
        assert loss[:2].tolist() == [0.0, INF]
        assert loss[2].item() == pytest.approx(math.log(2))
        assert loss[3].item() == INF
        (grad,) = torch.autograd.grad(loss.sum(), x)
        want = torch.tensor([[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [-0.5, 0.0, 0.5], [-1.0, 0.5, 0.5]])
        torch.testing.assert_close(grad, want)

    def test_a08_softmax_without_a_limit(self, backend: str) -> None:
        """The label among several +inf: its row is NaN, loss and gradient; no other is."""
        x = torch.tensor([[INF, INF, 1.0], [0.0, 1.0, INF], [0.0, 0.0, 0.0]], requires_grad=True)
        loss = ik.iou_balanced_cross_entropy(
            x, torch.tensor([0, 2, 0]), torch.ones(3), reduction="none", backend=backend
        )
        assert loss.isnan().tolist() == [True, False, False]
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert grad.isnan().all(1).tolist() == [True, False, False] and not grad[1:].isnan().any()

    def test_a34_nan_boxes(self, backend: str) -> None:
        d = testing.detection_inputs(0)
        want, _ = detection(d, backend)
        for i in range(2):  # a box that no anchor matches
            d.gt_boxes[i] = torch.cat([d.gt_boxes[i], torch.full((1, 4), NAN)])
            d.gt_labels[i] = torch.cat([d.gt_labels[i], torch.tensor([0])])
        shared = d.anchors.clone()
        d.anchors = shared.expand(2, -1, 4).clone()
        d.anchors[d.matched_idxs < 0] = NAN
        got, grads = detection(d, backend)
        assert [a.item() for a in got] == [a.item() for a in want]
        assert all(g.isfinite().all() for g in grads)
        n, r = (d.matched_idxs >= 0).nonzero()[0].tolist()
        d.anchors[n, r] = NAN
        got, _ = detection(d, backend)
        assert got.localization.isnan()


class TestNumbers:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize(
        ("alpha", "gamma"), [(None, 0.0), (0.25, 0.5), (0.25, 1.0), (0.25, 2.0), (0.6, 10.0), (0.25, 1.5)]
    )
    @pytest.mark.parametrize("positive", [False, True])
    def test_a09_a10_a12_a68_extreme_logits(
        self, dtype: torch.dtype, alpha: float | None, gamma: float, positive: bool, backend: str
    ) -> None:
        x = testing.extreme_logits(dtype)[:, None].clone().requires_grad_()
        labels = torch.full((len(x),), 0 if positive else -1)
        ids = torch.arange(len(x))
        wide = x.detach().to(F64).requires_grad_()
        results = []
        for logits, name in ((x, backend), (wide, "reference")):
            loss = ik.iou_balanced_sigmoid_focal_loss(
                logits, labels, torch.ones(len(x)), alpha=alpha, gamma=gamma, scope_ids=ids, num_scopes=len(x),
                reduction="none", backend=name,
            )  # fmt: skip
            results.append((loss, torch.autograd.grad(loss.sum(), logits)[0]))
        (loss, grad), (want_loss, want_grad) = results
        finite = want_loss.abs() < torch.finfo(loss.dtype).max
        testing.assert_close_budget(
            loss[finite], want_loss[finite], torch.float32 if dtype is not F64 else F64, floor=1e-25
        )
        assert not loss.isnan().any()
        testing.assert_close_budget(grad, want_grad, dtype, floor=1e-25)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a11_sums_do_not_overflow(self, dtype: torch.dtype, backend: str) -> None:
        x = torch.full((20000, 1), 12.0, dtype=dtype)
        loss = ik.iou_balanced_binary_cross_entropy(
            x, torch.full((20000,), -1), torch.zeros(20000, dtype=dtype), reduction="sum", backend=backend
        )
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(20000 * math.log1p(math.exp(12)), rel=1e-5)

    @pytest.mark.parametrize("columns", [1, 2, 3, 21])
    def test_a09_softmax_extremes(self, columns: int, backend: str) -> None:
        values = testing.extreme_logits()
        values = values[values.isfinite()]
        g = torch.Generator().manual_seed(0)
        x = values[torch.randint(0, len(values), (200, columns), generator=g)].requires_grad_()
        labels = torch.randint(0, columns, (200,), generator=g)
        wide = x.detach().to(F64).requires_grad_()
        results = []
        for logits, name in ((x, backend), (wide, "reference")):
            loss = ik.iou_balanced_cross_entropy(
                logits, labels, torch.ones(200), eta=0.0, reduction="none", backend=name
            )
            results.append((loss, torch.autograd.grad(loss.sum(), logits)[0]))
        (loss, grad), (want_loss, want_grad) = results
        assert not loss.isnan().any()
        small = want_loss < 1e37
        testing.assert_close_budget(loss[small], want_loss[small], torch.float32, floor=1e-1)
        testing.assert_close_budget(grad, want_grad, torch.float32, floor=1.0)  # p - 1 is a difference

    def test_a24_mixed_dtypes(self, backend: str) -> None:
        d = testing.detection_inputs(0, dtype=torch.float32)
        want, _ = detection(d, backend)
        d.anchors, d.gt_boxes = d.anchors.double(), [b.double() for b in d.gt_boxes]
        d.bbox_deltas = d.bbox_deltas.to(torch.bfloat16)
        loss, grads = detection(d, backend)
        assert [g.dtype for g in grads] == [torch.float32, torch.bfloat16]
        assert loss.classification.dtype == loss.localization.dtype == loss.mean_iou.dtype == torch.float32
        torch.testing.assert_close(loss.classification, want.classification, rtol=1e-2, atol=0)

    def test_a25_float64_if_an_input_to_be_differentiated_is(self, backend: str) -> None:
        d = testing.detection_inputs(0)
        d.bbox_deltas = d.bbox_deltas.double()
        loss, grads = detection(d, backend)
        assert [g.dtype for g in grads] == [torch.float32, torch.float64]
        assert loss.classification.dtype == loss.localization.dtype == torch.float64
        c = testing.classification_inputs(0)
        c.iou = c.iou.double()
        assert sigmoid(c, backend)[0].dtype == torch.float32

    def test_a35_a36_huge_deltas(self, backend: str) -> None:
        d = testing.detection_inputs(0)
        positives = (d.matched_idxs >= 0).nonzero().tolist()
        for (n, r), delta in zip(
            positives, ([0, 0, 100, 0], [0, 0, -100, 100], [1e30, 0, 0, 0], [0, -1e30, 1e30, 0]), strict=False
        ):
            d.bbox_deltas[n, r] = torch.tensor(delta, dtype=torch.float32)
        loss, grads = detection(d, backend)
        assert all(t.isfinite().all() for t in loss)
        assert all(g.isfinite().all() for g in grads)
        wide, _ = detection(d.double(), "reference")
        torch.testing.assert_close(loss.localization.double(), wide.localization, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("coder", ["delta", "fovea"])
    @pytest.mark.parametrize("value", [INF, -INF])
    def test_a36_infinite_deltas(self, value: float, coder: str, backend: str) -> None:
        """A box infinitely far away has an IoU of 0, so no loss of its own; an infinite size is clamped for the IoU."""
        for place in range(4):
            d = testing.detection_inputs(0)
            n, r = (d.matched_idxs >= 0).nonzero().tolist()[0]
            d.bbox_deltas[n, r, place] = value
            loss, grads = detection(d, backend, box_coder=coder)
            wide, wide_grads = detection(d.double(), "reference", box_coder=coder)
            far = coder == "delta" and place < 2
            assert not any(t.isnan() for t in loss) and loss.localization.isfinite() == far
            for got, want in zip((*loss, *grads), (*wide, *wide_grads), strict=True):
                torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-7)

    def test_a37_large_coordinates(self, backend: str) -> None:
        base = torch.tensor([[0.0, 0.0, 300.0, 200.0], [10.0, 0.0, 300.0, 240.0]])
        for offset in (1e6, 1e7):
            boxes = base + offset
            want = ik.paired_box_iou(boxes[:1].double(), boxes[1:].double(), backend="reference")
            got = ik.paired_box_iou(boxes[:1], boxes[1:], backend=backend)
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
        half = base.half()  # an area of 60000 and a sum beyond 65504
        torch.testing.assert_close(
            ik.paired_box_iou(half[:1], half[1:], backend=backend),
            ik.paired_box_iou(base[:1], base[1:], backend="reference"),
        )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_box_functions_compute_in_float32(self, dtype: torch.dtype, backend: str) -> None:
        a, b = testing.delta_inputs(0, dtype=dtype)
        boxes = torch.tensor([0.0, 0.0, 16.0, 16.0], dtype=dtype).expand(64, 4)
        for coder in ("delta", "fovea"):
            for name, arguments, options in (
                ("decode_boxes", (a, boxes), {"box_coder": coder}),
                ("encode_boxes", (boxes + 1, boxes), {"box_coder": coder}),
                ("delta_iou", (a, b), {"box_coder": coder}),
                ("paired_box_iou", (boxes, boxes + 1), {}),
            ):
                got = getattr(ik, name)(*arguments, **options, backend=backend)
                want = getattr(ik, name)(*(t.double() for t in arguments), **options, backend="reference")
                assert got.dtype == torch.float32
                torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


class TestWeights:
    def test_a39_all_iou_zero(self, backend: str) -> None:
        c = testing.classification_inputs(0)
        c.iou.zero_()
        loss, grad = sigmoid(c, backend, reduction="none")
        positive = c.labels >= 0
        at = c.labels[positive]
        rows = torch.arange(len(at))
        assert exactly_zero(loss[positive][rows, at])
        assert (grad[positive][rows, at] == 0).all()
        assert (grad[c.labels == -1] > 0).all()
        plain, _ = sigmoid(c, backend, reduction="none", eta=0.0)
        assert torch.equal(loss[c.labels == -1], plain[c.labels == -1])

    @pytest.mark.parametrize("logit", [15.5, 60.0, 240.0])
    def test_a39_all_iou_zero_but_for_saturated_ones(self, logit: float, backend: str) -> None:
        """S / D would overflow float32: it is bounded, in the oracle's float64 too."""
        for name, leaf, rest, options in testing.saturated_positives(logit, 1e-21):
            function = getattr(ik, name)
            leaf.requires_grad_()
            loss = function(leaf, *rest, **options, backend=backend)
            (grad,) = torch.autograd.grad(loss, leaf)
            wide = leaf.detach().double().requires_grad_()
            want = function(wide, *rest, **options, backend="reference")
            assert loss.isfinite() and grad.isfinite().all()
            torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(grad.double(), torch.autograd.grad(want, wide)[0], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.5, 10.0])
    def test_a40_exponents_at_iou_zero_and_one(self, exponent: float, backend: str) -> None:
        x = torch.zeros(3, 1, requires_grad=True)
        iou = torch.tensor([0.0, 1.0, 1e-30])
        loss = ik.iou_balanced_binary_cross_entropy(
            x, torch.zeros(3, dtype=torch.int64), iou, eta=exponent, backend=backend
        )
        loss.backward()
        assert loss.item() == pytest.approx(math.log(2))
        assert x.grad.isfinite().all()
        pred = torch.ones(3, 4, requires_grad=True)
        loss = ik.iou_balanced_smooth_l1_loss(pred, torch.zeros(3, 4), iou, lambda_=exponent, backend=backend)
        loss.backward()
        assert pred.grad.isfinite().all()
        assert exponent == 0 or exactly_zero(pred.grad[0])

    @pytest.mark.parametrize("normalize", [False, True])
    @pytest.mark.parametrize("coder", ["delta", "fovea"])
    def test_a31_a32_a33_boxes_without_area(self, normalize: bool, coder: str, backend: str) -> None:
        d = testing.detection_inputs(0, box_coder=coder)
        positives = (d.matched_idxs >= 0).nonzero().tolist()
        bad = [[5.0, 5.0, 5.0, 9.0], [5.0, 5.0, 9.0, 5.0], [5.0, 5.0, 5.0, 5.0], [9.0, 9.0, 5.0, 5.0]]
        d.anchors = d.anchors.expand(2, -1, 4).clone()
        for (n, r), box in zip(positives, bad, strict=False):
            d.anchors[n, r] = torch.tensor(box)
        loss, (logits, deltas) = detection(d, backend, box_coder=coder, normalize_loc=normalize)
        assert loss.num_positives.item() == len(positives)
        assert all(t.isfinite().all() for t in loss)
        for n, r in positives[: len(bad)]:
            assert exactly_zero(deltas[n, r])
            label = d.gt_labels[n][d.matched_idxs[n, r]]
            assert logits[n, r, label] == 0  # IoU 0: the positive entry weighs nothing
        # A gt box without area does the same.
        e = testing.detection_inputs(0, box_coder=coder)
        e.gt_boxes = [torch.tensor([7.0, 7.0, 7.0, 7.0]).repeat(len(b), 1) for b in e.gt_boxes]
        loss, (logits, deltas) = detection(e, backend, box_coder=coder, normalize_loc=normalize)
        assert loss.localization.item() == 0.0
        assert loss.mean_iou.item() == 0.0
        assert exactly_zero(deltas)
