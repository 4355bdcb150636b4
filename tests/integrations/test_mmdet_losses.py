"""The losses registered in MMDetection: mmdet's own at eta = lambda = 0, this package's functions otherwise."""

from __future__ import annotations

import copy
import pickle

import mmdet_env
import pytest
import torch
from torch.testing import assert_close

mmdet = mmdet_env.load()

from mmdet.registry import MODELS  # noqa: E402  (mmdet_env skips this module where mmdet is missing)

import ioubal_kernels as ik  # noqa: E402
from ioubal_kernels import reference  # noqa: E402
from ioubal_kernels.integrations import mmdet as integration  # noqa: E402

ROWS, CLASSES = 40, 5


def same(got, want) -> None:
    """float32 on both sides: a few roundings an element, and cancellation (sigmoid(x) - 1) in mmdet's gradients, which
    is relative to the largest one.
    """
    assert_close(got, want, rtol=2e-5, atol=2e-6 * float(want.detach().abs().max()) if want.numel() else 0.0)


def sample(seed: int = 0, *, columns: int = CLASSES, positives: bool = True):
    """Logits, labels with background CLASSES, iou, weights of which some are 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(ROWS, columns, generator=generator)
    labels = torch.randint(0, CLASSES + 1, (ROWS,), generator=generator)
    labels[::2] = CLASSES
    if not positives:
        labels[:] = CLASSES
    weight = torch.randint(0, 3, (ROWS,), generator=generator).float()
    return logits, labels, torch.rand(ROWS, generator=generator), weight


def gradient(loss: torch.Tensor, of: torch.Tensor, seed: int = 5) -> torch.Tensor:
    """Of a random weighting of the loss's elements, so that none is hidden by a symmetry."""
    factors = torch.rand(loss.shape, generator=torch.Generator().manual_seed(seed)) + 0.5
    return torch.autograd.grad((loss * factors).sum(), of)[0]


def build(kind: str, **options):
    return MODELS.build({"type": kind, **options})


CASES = {
    "focal": ("IoUBalancedFocalLoss", "FocalLoss", {"use_sigmoid": True, "alpha": 0.3, "gamma": 1.5}, CLASSES),
    "softmax": ("IoUBalancedCrossEntropyLoss", "CrossEntropyLoss", {"use_sigmoid": False}, CLASSES + 1),
    "bce": ("IoUBalancedCrossEntropyLoss", "CrossEntropyLoss", {"use_sigmoid": True}, CLASSES),
}
REDUCTIONS = [
    ("mean", 7.0, None),
    ("mean", 0.0, None),
    ("mean", torch.tensor([6.0]), None),
    ("mean", None, None),
    ("sum", None, None),
    ("none", None, None),
    ("none", 7.0, None),
    ("sum", 7.0, "mean"),
    ("mean", None, "sum"),
    ("mean", 7.0, "none"),
]


@pytest.mark.parametrize("with_weight", [False, True], ids=["plain", "weight"])
@pytest.mark.parametrize(("reduction", "avg_factor", "override"), REDUCTIONS)
@pytest.mark.parametrize("case", CASES)
def test_classification_at_eta_0_is_mmdets(case, reduction, avg_factor, override, with_weight):
    balanced, stock, options, columns = CASES[case]
    options = {**options, "reduction": reduction, "loss_weight": 1.7}
    logits, labels, iou, weight = sample(columns=columns)
    weight = weight if with_weight else None
    call = {"avg_factor": avg_factor, "reduction_override": override}
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    want = build(stock, **options)(x, labels, weight, **call)
    got = build(balanced, eta=0.0, **options)(y, (labels, iou), weight, **call)
    if isinstance(avg_factor, torch.Tensor):
        want = want.reshape(())
    assert got.shape == want.shape
    same(got, want)
    same(gradient(got, y), gradient(want, x))
    # Labels alone leave nothing open at eta = 0.
    assert torch.equal(build(balanced, eta=0.0, **options)(y, labels, weight, **call), got)


@pytest.mark.parametrize("case", CASES)
def test_classification_is_the_reference(case):
    """Against this package's oracle in float64, whose labels are translated by hand."""
    balanced, _, options, columns = CASES[case]
    logits, labels, iou, weight = sample(3, columns=columns)
    x, y = logits.double().requires_grad_(), logits.clone().requires_grad_()
    shared = {
        "eta": 1.5, "eps": 0.0, "weight": weight, "reduction": "mean", "avg_factor": 7.0, "scope_ids": None,
        "num_scopes": None, "process_group": None, "grad_scale": 1.0,
    }  # fmt: skip
    if case == "softmax":
        want = reference.cross_entropy(x, labels, iou, background_index=CLASSES, **shared)
    else:
        own = torch.tensor([-1 if label == CLASSES else label for label in labels.tolist()])
        focal = {"alpha": 0.3, "gamma": 1.5} if case == "focal" else {"alpha": None, "gamma": 0.0}
        want = reference.sigmoid_focal_loss(x, own, iou, inplace=False, **focal, **shared)
    loss = build(balanced, eta=1.5, loss_weight=2.0, **options)
    got = loss(y, (labels, iou), weight, avg_factor=7.0)
    assert_close(got.double(), 2 * want, rtol=1e-6, atol=0.0)
    plain = build(balanced, eta=0.0, loss_weight=2.0, **options)(y, (labels, iou), weight, avg_factor=7.0)
    positive = (labels < CLASSES) & (weight > 0)
    grad = gradient(got, y)
    assert_close(grad.double(), 2 * gradient(want, x), rtol=1e-5, atol=1e-8)
    # The test can tell: positives' gradients differ from the plain loss's, and weight 0 has none.
    assert not torch.allclose(grad[positive], gradient(plain, y)[positive], rtol=0.01)
    assert (grad[weight == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
@pytest.mark.parametrize("case", CASES)
def test_weights_may_be_a_mask(case, dtype):
    balanced, _, options, columns = CASES[case]
    logits, labels, iou, weight = sample(columns=columns)
    loss, mask = build(balanced, **options), (weight > 0).to(dtype)
    got, want = (loss(logits, (labels, iou), w, avg_factor=7.0) for w in (mask, mask.float()))
    same(got, want)


@pytest.mark.parametrize("case", CASES)
def test_no_positives_and_no_rows(case):
    balanced, stock, options, columns = CASES[case]
    logits, labels, iou, weight = sample(columns=columns, positives=False)
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    got = build(balanced, **options)(y, (labels, iou), weight, avg_factor=1)
    want = build(stock, **options)(x, labels, weight, avg_factor=1)
    same(got, want)
    same(gradient(got, y), gradient(want, x))
    empty = logits[:0].requires_grad_()
    loss = build(balanced, **options)(empty, (labels[:0], iou[:0]), weight[:0])
    loss.backward()
    assert loss == 0 and empty.grad.shape == (0, columns)


@pytest.mark.parametrize("case", ["softmax", "bce"])
def test_mmdets_ignore_index(case):
    balanced, stock, options, columns = CASES[case]
    logits, labels, iou, _ = sample(columns=columns)
    labels[5:15] = -100
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    got = build(balanced, eta=0.0, **options)(y, (labels, iou), avg_factor=4)
    want = build(stock, **options)(x, labels, avg_factor=4)
    same(got, want)
    same(gradient(got, y), gradient(want, x))


def test_gradient_reaches_neither_iou_nor_weight():
    logits, labels, iou, weight = sample()
    iou.requires_grad_()
    logits.requires_grad_()
    build("IoUBalancedFocalLoss")(logits, (labels, iou), weight, avg_factor=3).backward()
    assert iou.grad is None and logits.grad is not None


# ------------------------------------------------------------------------------------------------ smooth L1


def boxes(seed: int = 1, coder: str = "delta"):
    """pred, target and (N, 4) weights as mmdet gives them, a third of the rows 0."""
    generator = torch.Generator().manual_seed(seed)
    pred, target = (0.4 * torch.randn(ROWS, 4, generator=generator) for _ in range(2))
    if coder == "boxes":
        pred, target = (torch.cat([30 * t[:, :2], 30 * t[:, :2] + 20 + 10 * t[:, 2:].abs()], 1) for t in (pred, target))
    weight = (torch.arange(ROWS) % 3 > 0).float()[:, None].repeat(1, 4)
    return pred, target, weight


@pytest.mark.parametrize("with_weight", [False, True], ids=["plain", "weight"])
@pytest.mark.parametrize(("reduction", "avg_factor", "override"), REDUCTIONS)
@pytest.mark.parametrize("beta", [0.0, 0.11, 1.0])
def test_smooth_l1_at_lambda_0_is_mmdets(beta, reduction, avg_factor, override, with_weight):
    pred, target, weight = boxes()
    weight = weight if with_weight else None
    options = {"reduction": reduction, "loss_weight": 2.3}
    x, y = pred.clone().requires_grad_(), pred.clone().requires_grad_()
    stock = build("SmoothL1Loss", beta=beta, **options) if beta else build("L1Loss", **options)
    call = {"avg_factor": avg_factor, "reduction_override": override}
    want = stock(x, target, weight, **call)
    got = build("IoUBalancedSmoothL1Loss", beta=beta, lambda_=0.0, **options)(y, target, weight, **call)
    if isinstance(avg_factor, torch.Tensor):
        want = want.reshape(())
    assert got.shape == want.shape
    same(got, want)
    same(gradient(got, y), gradient(want, x))


@pytest.mark.parametrize("normalize", [False, True], ids=["eq6", "eq7"])
@pytest.mark.parametrize("coder", ["delta", "stds", "fovea", "boxes"])
def test_smooth_l1_is_the_reference(coder, normalize):
    """Eq. 6 and 7 by the oracle in float64 with an IoU computed from decoded boxes."""
    pred, target, weight = boxes(coder=coder)
    anchor = torch.tensor([[10.0, 20.0, 42.0, 68.0]], dtype=torch.float64).expand(ROWS, 4)
    weights = (10.0, 10.0, 5.0, 5.0) if coder == "stds" else (1.0,) * 4
    if coder == "boxes":
        decoded = [t.double() for t in (pred, target)]
    else:
        name = "fovea" if coder == "fovea" else "delta"
        from ioubal_kernels.boxes import decode

        decoded = [decode(t.double(), anchor, weights, name) for t in (pred, target)]
    iou = torch.diagonal(torchvision_iou(*decoded))
    shared = {
        "lambda_": 1.5, "beta": 0.11, "w_loc": 3.0, "normalize": normalize, "eps": 0.0, "box_weights": weights,
        "weight": weight.double(), "reduction": "mean", "avg_factor": 9.0, "scope_ids": None, "num_scopes": None,
        "process_group": None, "grad_scale": 1.0,
    }  # fmt: skip
    x, y = pred.double().requires_grad_(), pred.clone().requires_grad_()
    want = reference.smooth_l1_loss(x, target.double(), iou, **shared)
    stds = {"target_stds": (0.1, 0.1, 0.2, 0.2)} if coder == "stds" else {}
    kind = "delta" if coder == "stds" else coder
    options = {"beta": 0.11, "lambda_": 1.5, "loss_weight": 3.0, "normalize": normalize, "box_coder": kind, **stds}
    loss = build("IoUBalancedSmoothL1Loss", **options)
    got = loss(y, target, weight, avg_factor=9.0)
    # Pixels in float32 as IoU's input: relative error of a few 1e-7 per coordinate of size 30, over extents of 20.
    close = {"rtol": 1e-5, "atol": 1e-7}
    assert_close(got.double(), want, **close)
    grad = gradient(got, y)
    assert_close(grad.double(), gradient(want, x), **close)
    assert (grad[weight[:, 0] == 0] == 0).all()
    elements = loss(y, target, weight, reduction_override="none")
    assert elements.shape == pred.shape
    assert_close(elements.sum() / 9.0, got, rtol=1e-5, atol=0.0)


def torchvision_iou(first, second):
    from torchvision.ops import box_iou

    return box_iou(first, second)


def test_smooth_l1_without_rows_or_weights():
    pred, target, weight = boxes()
    loss = build("IoUBalancedSmoothL1Loss")
    for rows in (0, ROWS):
        x = pred[:rows].clone().requires_grad_()
        got = loss(x, target[:rows], torch.zeros_like(weight[:rows]), avg_factor=1)
        got.backward()
        assert got == 0 and (x.grad == 0).all()
        assert loss(x, target[:rows], weight[:rows], reduction_override="none").shape == (rows, 4)
    assert loss(pred, target, weight[:, 0], avg_factor=2) == loss(pred, target, weight, avg_factor=2)


# ------------------------------------------------------------------------------------------------ configs, errors


def test_config_values_reach_the_loss_and_survive_copies():
    """The merged configs that mmdet's inheritance makes: another type on the stock losses' and QFL's arguments."""
    focal = build("IoUBalancedFocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0, eta=1.1)
    from_qfl = build("IoUBalancedFocalLoss", use_sigmoid=True, beta=1.5, loss_weight=1.0)
    assert (focal.eta, from_qfl.gamma, from_qfl.use_sigmoid, from_qfl.activated) == (1.1, 1.5, True, False)
    smooth = build("IoUBalancedSmoothL1Loss", loss_weight=3.049, beta=0.11, backend="reference")
    for loss in (focal, smooth):
        for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert repr(other) == repr(loss)
    assert "eta=1.1" in repr(focal) and "lambda_=1.5" in repr(smooth) and "reference" in repr(smooth)
    logits, labels, iou, _ = sample()
    with ik.use_backend("reference"):
        want = from_qfl(logits, (labels, iou), avg_factor=2)
    by_name = build("IoUBalancedFocalLoss", gamma=1.5, backend="reference")
    assert torch.equal(by_name(logits, (labels, iou), avg_factor=2), want)


LOGITS, LABELS, IOU, WEIGHT = sample()
PRED, TARGET, BOX_WEIGHT = boxes()
ERRORS = [
    ("IoUBalancedFocalLoss", {}, (LOGITS, LABELS), {}, TypeError, "target must be .labels, iou. unless eta is 0"),
    ("IoUBalancedFocalLoss", {}, (LOGITS, (LABELS, IOU[:3])), {}, ValueError, r"target\[1\] must have shape"),
    ("IoUBalancedFocalLoss", {}, (LOGITS, (LABELS[:3], IOU)), {}, ValueError, r"target\[0\] must have shape"),
    ("IoUBalancedFocalLoss", {}, (LOGITS, (LABELS + 9, IOU)), {}, ValueError, "classes from 0 to 4 or 5 .background."),
    ("IoUBalancedFocalLoss", {}, (LOGITS[None], (LABELS, IOU)), {}, ValueError, "pred must have shape"),
    ("IoUBalancedFocalLoss", {}, (LOGITS, (LABELS, IOU), LOGITS), {}, ValueError, "one weight for each row"),
    ("IoUBalancedFocalLoss", {}, (LOGITS, (LABELS, IOU)), {"avg_factor": -1.0}, ValueError, "avg_factor must be"),
    (
        "IoUBalancedFocalLoss",
        {"reduction": "sum"},
        (LOGITS, (LABELS, IOU)),
        {"avg_factor": 2.0},
        ValueError,
        "avg_factor must be None with reduction 'sum'",
    ),
    (
        "IoUBalancedCrossEntropyLoss",
        {},
        (LOGITS, (LABELS.clamp(max=4), IOU)),
        {"reduction_override": "max"},
        ValueError,
        "reduction_override must be one of",
    ),
    (
        "IoUBalancedCrossEntropyLoss",
        {},
        (LOGITS, (LABELS, IOU)),
        {},
        ValueError,
        "classes from 0 to 3 or 4 .background. for these softmax scores, got 5",
    ),
    ("IoUBalancedSmoothL1Loss", {}, (PRED[:, :3], TARGET), {}, ValueError, "pred must have shape"),
    ("IoUBalancedSmoothL1Loss", {}, (PRED, TARGET[:4]), {}, ValueError, "target must have shape"),
    ("IoUBalancedSmoothL1Loss", {}, (PRED, TARGET, BOX_WEIGHT[:, :2]), {}, ValueError, "weight must have shape"),
]


@pytest.mark.parametrize(("kind", "options", "arguments", "keywords", "error", "message"), ERRORS)
def test_bad_calls_say_what_they_got(kind, options, arguments, keywords, error, message):
    with pytest.raises(error, match=message) as caught:
        build(kind, **options)(*arguments, **keywords)
    assert ", got " in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("IoUBalancedFocalLoss", {"use_sigmoid": False}, "use_sigmoid must be True"),
        ("IoUBalancedFocalLoss", {"activated": True}, "activated must be False: pred are logits"),
        ("IoUBalancedFocalLoss", {"gamma": 1.0, "beta": 3.0}, "beta must be left out where gamma=1.0"),
        ("IoUBalancedFocalLoss", {"eta": -1.0}, "eta must be finite and at least 0"),
        ("IoUBalancedFocalLoss", {"alpha": 2.0}, "alpha must be between 0 and 1"),
        ("IoUBalancedFocalLoss", {"reduction": "avg"}, "reduction must be one of"),
        ("IoUBalancedCrossEntropyLoss", {"loss_weight": -1.0}, "loss_weight must be finite and at least 0"),
        ("IoUBalancedSmoothL1Loss", {"box_coder": "deltas"}, "did you mean 'delta'"),
        ("IoUBalancedSmoothL1Loss", {"target_stds": (1.0, 1.0)}, "target_stds must have four positive numbers"),
        ("IoUBalancedSmoothL1Loss", {"lambda_": -0.5}, "lambda_ must be finite and at least 0"),
    ],
)
def test_bad_configs_say_what_they_got(kind, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        getattr(integration, kind)(**options)
    assert str(caught.value).startswith(f"{kind}: ")
