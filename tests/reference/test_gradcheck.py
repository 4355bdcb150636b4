"""Gradients against finite differences in float64, with the IoU weights frozen at the base point.

Finite differences see through a stop-gradient, so each setting is checked on the loss as a function of its plain part
only: the frozen weights are taken out of the loss at the base point and applied to a plain loss, whose gradient must
then be the loss's own.
With eta = lambda_ = 0 the weights are constant and the loss is checked as it is.
"""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import ioubal_kernels as ik
from ioubal_kernels import testing

F64 = torch.float64
TOLERANCE = {"eps": 1e-6, "atol": 1e-8, "rtol": 1e-5}


def positive_weights(x: torch.Tensor, labels: torch.Tensor, plain, balanced) -> torch.Tensor:
    """balanced / plain entry by entry at the base point: the frozen weights, 1 where both are 0."""
    with torch.no_grad():
        p, b = plain(x), balanced(x)
    return torch.where(p == 0, 1.0, b / torch.where(p == 0, 1.0, p))


SIGMOID = list(
    itertools.product((0.0, 1.5), ((None, 0.0), (0.25, 2.0), (0.4, 1.5), (0.25, 0.5), (0.5, 1.0)), (False, True))
)


@pytest.mark.parametrize(("eta", "focal", "scoped"), SIGMOID)
def test_sigmoid(eta: float, focal: tuple, scoped: bool) -> None:
    c = testing.classification_inputs(3, 4, 3, dtype=F64, positive_share=0.5)
    alpha, gamma = focal
    options = {"alpha": alpha, "gamma": gamma, "reduction": "none", "weight": c.weight, "backend": "reference"}
    scope = {"scope_ids": c.scope_ids, "num_scopes": c.num_scopes, "eps": 1e-3} if scoped else {}

    def loss(eta: float, **extra):
        return lambda x: ik.iou_balanced_sigmoid_focal_loss(x, c.labels, c.iou, eta=eta, **options, **extra)

    check_frozen(c.logits, loss(0.0), loss(eta, **scope), unfrozen=eta == 0.0 and not scoped)


@pytest.mark.parametrize(("eta", "background"), list(itertools.product((0.0, 1.0, 1.5), (0, 2, None))))
def test_softmax(eta: float, background: int | None) -> None:
    c = testing.classification_inputs(4, 5, 4, dtype=F64, softmax=True, positive_share=0.6)
    options = {"background_index": background, "reduction": "none", "backend": "reference"}

    def loss(eta: float):
        return lambda x: ik.iou_balanced_cross_entropy(x, c.labels, c.iou, eta=eta, **options)

    check_frozen(c.logits, loss(0.0), loss(eta), unfrozen=eta == 0.0)


@pytest.mark.parametrize(
    ("lambda_", "beta", "normalize"), list(itertools.product((0.0, 1.5), (0.0, 1 / 9, 1.0), (False, True)))
)
def test_smooth_l1(lambda_: float, beta: float, normalize: bool) -> None:
    pred, target = testing.delta_inputs(5, 4, dtype=F64)
    iou = ik.delta_iou(pred, target, backend="reference")
    options = {"beta": beta, "w_loc": 2.0, "reduction": "none", "backend": "reference"}

    def loss(lambda_: float, **extra):
        return lambda x: ik.iou_balanced_smooth_l1_loss(x, target, iou, lambda_=lambda_, **options, **extra)

    check_frozen(pred, loss(0.0), loss(lambda_, normalize=normalize), unfrozen=lambda_ == 0.0 and not normalize)


def check_frozen(x: torch.Tensor, plain, balanced, unfrozen: bool) -> None:
    weights = positive_weights(x, x, plain, balanced)
    x = x.detach().clone().requires_grad_()
    # One random combination of the outputs: a Jacobian row instead of all of them.
    mix = torch.rand(weights.shape, generator=torch.Generator().manual_seed(0), dtype=F64) + 0.5
    assert gradcheck(lambda t: (mix * weights * plain(t)).sum(), (x,), **TOLERANCE)
    frozen = torch.autograd.grad((weights * plain(x)).sum(), x)[0]
    own = torch.autograd.grad(balanced(x).sum(), x)[0]
    torch.testing.assert_close(own, frozen, rtol=1e-10, atol=1e-13)
    if unfrozen:
        assert gradcheck(lambda t: (mix * balanced(t)).sum(), (x,), **TOLERANCE)


DETECTION = list(itertools.product(("delta", "fovea"), ("batch", "level", "image"), (False, True), ("flat", "nchw")))


@pytest.mark.parametrize(("coder", "scope", "normalize", "layout"), DETECTION)
def test_detection(coder: str, scope: str, normalize: bool, layout: str) -> None:
    """eta = lambda_ = 0 against finite differences; the balanced gradient is the plain one times frozen weights."""
    d = testing.detection_inputs(
        6,
        classes=2,
        per_location=1,
        levels=((1, 2), (1, 1)),
        positive_share=0.6,
        box_coder=coder,
        layout=layout,
        dtype=F64,
    ).requiring_grad()
    rest = d.arguments()[2:]
    levels = 1 if layout == "flat" else 2
    options = {
        "box_coder": coder,
        "normalizer_scope": scope,
        "anchors_per_level": d.level_sizes,
        "backend": "reference",
    }

    def plain(*heads):
        first, second = (heads[0], heads[1]) if layout == "flat" else (list(heads[:levels]), list(heads[levels:]))
        loss = ik.iou_balanced_detection_loss(first, second, *rest, eta=0.0, lambda_=0.0, **options)
        return loss.classification + 3 * loss.localization

    if scope == "batch" and not normalize:  # the plain loss knows neither
        assert gradcheck(plain, tuple(d.heads()), **TOLERANCE)

    loss = ik.iou_balanced_detection_loss(*d.arguments(), w_loc=2.0, normalize_loc=normalize, **options)
    (loss.classification + 3 * loss.localization).backward()
    weights_cls, weights_loc = frozen_detection_weights(d, coder, scope, normalize)
    e = d.requiring_grad()
    base = plain(*e.heads())
    base.backward()
    for got, want, weight in zip(d.heads(), e.heads(), in_layout(weights_cls, weights_loc, d, layout), strict=True):
        torch.testing.assert_close(got.grad, want.grad * weight, rtol=1e-9, atol=1e-12)


def frozen_detection_weights(d, coder: str, scope: str, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """w of Eq. 4 per logit and w_loc * w of Eq. 6 or 7 per delta, one by one in float64."""
    flat = d.cls_logits if isinstance(d.cls_logits, torch.Tensor) else testing.from_levels(d.cls_logits, d.per_location)
    deltas = (
        d.bbox_deltas if isinstance(d.bbox_deltas, torch.Tensor) else testing.from_levels(d.bbox_deltas, d.per_location)
    )
    flat, deltas = flat.detach(), deltas.detach()
    sums: dict = {}
    positives = []
    for n, r in (d.matched_idxs >= 0).nonzero().tolist():
        g = d.matched_idxs[n, r]
        k = int(d.gt_labels[n][g])
        target = ik.encode_boxes(d.gt_boxes[n][g], d.anchors[r], box_coder=coder, backend="reference")
        iou = ik.paired_box_iou(
            ik.decode_boxes(deltas[n, r], d.anchors[r], box_coder=coder, backend="reference"),
            ik.decode_boxes(target, d.anchors[r], box_coder=coder, backend="reference"),
            backend="reference",
        ).item()
        p = torch.sigmoid(flat[n, r, k]).item()
        focal = -0.25 * (1 - p) ** 2 * torch.tensor(p, dtype=F64).log().item()
        l1 = torch.nn.functional.smooth_l1_loss(deltas[n, r], target, beta=1 / 9, reduction="sum").item()
        level = 0 if r < d.level_sizes[0] else 1
        key = {"batch": 0, "image": n, "level": level}[scope]
        part = sums.setdefault(key, [0.0, 0.0, 0.0, 0.0])
        for i, value in enumerate((focal, iou**1.5 * focal, l1, iou**1.5 * l1)):
            part[i] += value
        positives.append((n, r, k, iou, key))
    weights_cls, weights_loc = torch.ones_like(flat), torch.ones_like(deltas)
    for n, r, k, iou, key in positives:
        s, t, u, v = sums[key]
        weights_cls[n, r, k] = iou**1.5 * s / t
        weights_loc[n, r] = 2.0 * iou**1.5 * (u / v if normalize else 1.0)
    return weights_cls, weights_loc


def in_layout(cls: torch.Tensor, loc: torch.Tensor, d, layout: str) -> list[torch.Tensor]:
    if layout == "flat":
        return [cls, loc]
    return [m for t in (cls, loc) for m in testing.to_levels(t, d.levels, d.per_location, layout)]


@pytest.mark.parametrize("name", ["sigmoid", "softmax", "smooth_l1", "detection"])
def test_double_backward_and_forward_mode(name: str) -> None:
    """The reference supports both (A45, A54); weights constant, so that finite differences agree."""
    c = testing.classification_inputs(7, 3, 2, dtype=F64, positive_share=0.5)
    s = testing.classification_inputs(7, 3, 2, dtype=F64, positive_share=0.5, softmax=True)
    pred, target = testing.delta_inputs(8, 2, dtype=F64)
    d = testing.detection_inputs(9, classes=2, per_location=1, levels=((1, 2),), positive_share=0.5, dtype=F64)
    functions = {
        "sigmoid": (
            c.logits,
            lambda x: ik.iou_balanced_sigmoid_focal_loss(x, c.labels, c.iou, eta=0.0, backend="reference"),
        ),
        "softmax": (
            s.logits,
            lambda x: ik.iou_balanced_cross_entropy(x, s.labels, s.iou, eta=0.0, backend="reference"),
        ),
        "smooth_l1": (pred, lambda x: ik.iou_balanced_smooth_l1_loss(x, target, lambda_=0.0, backend="reference")),
        "detection": (
            d.cls_logits,
            lambda x: (
                ik.iou_balanced_detection_loss(x, *d.arguments()[1:], eta=0.0, backend="reference").classification
            ),
        ),
    }
    x, function = functions[name]
    x = x.clone().requires_grad_()
    assert gradcheck(function, (x,), check_forward_ad=True, **TOLERANCE)
    assert gradgradcheck(function, (x,), eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    _, jvp = torch.func.jvp(function, (x.detach(),), (tangent,))
    torch.testing.assert_close(jvp, (torch.autograd.grad(function(x), x)[0] * tangent).sum())


@pytest.mark.parametrize("coder", ["delta", "fovea"])
def test_box_coders(backend: str, coder: str) -> None:
    """decode and encode are differentiable in both arguments on every backend."""
    d = testing.detection_inputs(10, levels=((1, 2),), per_location=1, dtype=F64)
    anchors = d.anchors.clone().requires_grad_()
    deltas = (d.bbox_deltas[0] * 0.3).clone().requires_grad_()
    boxes = (d.anchors + 3.0).requires_grad_()

    def decode(deltas, anchors):
        return ik.decode_boxes(deltas, anchors, weights=(10.0, 10.0, 5.0, 5.0), box_coder=coder, backend=backend)

    def encode(boxes, anchors):
        return ik.encode_boxes(boxes, anchors, weights=(10.0, 10.0, 5.0, 5.0), box_coder=coder, backend=backend)

    assert gradcheck(decode, (deltas, anchors), eps=1e-6, atol=1e-6)
    assert gradcheck(decode, (deltas, d.anchors), eps=1e-6, atol=1e-6)
    assert gradcheck(encode, (boxes, anchors), eps=1e-6, atol=1e-6)
    _, jvp = torch.func.jvp(lambda b: encode(b, d.anchors), (boxes.detach(),), (torch.ones_like(d.anchors),))
    assert jvp.abs().sum() > 0  # never a silent zero tangent
    for result in (
        ik.paired_box_iou(boxes, anchors, backend=backend),
        ik.delta_iou(deltas, deltas + 1, box_coder=coder, backend=backend),
    ):
        assert not result.requires_grad
