"""Flat losses against the float64 oracle, loss and gradient, element by element: the cpu backend, and the CUDA kernels
over emulated threads."""

import pytest
import torch

import ioubal_kernels as ik
from ioubal_kernels import testing
from ioubal_kernels.ops import library

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# rows x classes: vector tails, single classes, a block border (65,536 entries), COCO's and LVIS's class counts.
SHAPES = ((1, 1), (33, 3), (257, 7), (40, 21), (129, 80), (900, 80), (31, 91), (5, 1203))
OPTIONS = {
    "mean": {},
    "sum, eps": {"reduction": "sum", "eps": 0.3},
    "weight, scopes, divisor": {"weight": True, "scopes": True, "avg_factor": 17.5},
}


def ids(value):
    return str(value).replace("torch.", "") if isinstance(value, torch.dtype) else None


def options_of(name, inputs):
    options = dict(OPTIONS[name])
    if options.pop("weight", False):
        options["weight"] = inputs.weight
    if options.pop("scopes", False):
        options |= {"scope_ids": inputs.scope_ids, "num_scopes": inputs.num_scopes}
    return options


def run(function, x, *rest, backend, grad_output=None, **options):
    leaf = x.detach().clone().requires_grad_()
    loss = function(leaf, *rest, backend=backend, **options)
    loss.backward(torch.ones_like(loss) if grad_output is None else grad_output.to(loss.dtype))
    return loss.detach(), leaf.grad


def compare(function, x, *rest, what, floor=testing.FLOOR, loss_floor=testing.FLOOR, **options):
    want_loss, want_grad = run(function, x.double(), *rest, backend="reference", **options)
    for variant in library.cpu_variants(x.dtype):
        loss, grad = run(function, x, *rest, backend="cpu", **options)
        assert loss.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32) and grad.dtype == x.dtype
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        kind = "gradient" if loss.ndim else "loss"  # single losses have the elements' budget
        testing.assert_close_budget(loss, want_loss, wide, kind, loss_floor, what=f"{what}, {variant}: loss")
        testing.assert_close_budget(grad, want_grad, x.dtype, "gradient", floor, what=f"{what}, {variant}: gradient")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("gamma", (0.0, 1.0, 2.0, 1.5))
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_sigmoid_focal(dtype, gamma, shape, options):
    inputs = testing.classification_inputs(seed=shape[0], rows=shape[0], classes=shape[1], dtype=dtype)
    compare(
        ik.iou_balanced_sigmoid_focal_loss,
        inputs.logits,
        inputs.labels,
        inputs.iou,
        what="focal",
        gamma=gamma,
        eta=1.5,
        **options_of(options, inputs),
    )


@pytest.mark.parametrize("eta", (0.0, 0.7, 3.0))
@pytest.mark.parametrize("alpha", (None, 0.0, 1.0, 0.6))
@pytest.mark.parametrize("reduction", ("none", "mean"))
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_sigmoid_focal_parameters(dtype, reduction, alpha, eta):
    inputs = testing.classification_inputs(seed=3, rows=(4, 29), classes=11, dtype=dtype, index_dtype=torch.int32)
    compare(
        ik.iou_balanced_sigmoid_focal_loss,
        inputs.logits,
        inputs.labels,
        inputs.iou,
        what="focal",
        alpha=alpha,
        eta=eta,
        reduction=reduction,
        weight=inputs.weight,
    )


@pytest.mark.parametrize("share", (0.0, 0.01, 0.5, 1.0))
@pytest.mark.parametrize("ignored", (0.0, 0.3, 1.0))
@pytest.mark.parametrize("classes", (1, 6, 80))
def test_sigmoid_focal_densities(classes, ignored, share):
    """From no positive to all of them: the pass walks around a few exceptions and masks many."""
    inputs = testing.classification_inputs(
        seed=5, rows=3000, classes=classes, positive_share=share, ignored_share=min(ignored, 1 - share)
    )
    compare(ik.iou_balanced_sigmoid_focal_loss, inputs.logits, inputs.labels, inputs.iou, what="densities")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] > 1], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("background", (0, -1))
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_cross_entropy(dtype, background, shape, options):
    rows, classes = shape
    inputs = testing.classification_inputs(seed=rows, rows=rows, classes=classes, softmax=True, dtype=dtype)
    chosen = options_of(options, inputs)
    # softmax - 1 cancels at the target: that entry is judged against the row's own scale.
    divisor = {"mean": max(int((inputs.labels >= 0).sum()), 1), "sum, eps": 1.0}.get(options, 17.5)
    row = inputs.weight if "weight" in chosen else torch.ones(rows)
    target = torch.nn.functional.one_hot(inputs.labels.clamp(min=0).long(), classes)
    floor = testing.FLOOR + (target * row[:, None].double() / divisor)
    compare(
        ik.iou_balanced_cross_entropy,
        inputs.logits,
        inputs.labels,
        inputs.iou,
        what="cross entropy",
        floor=floor,
        background_index=background % classes,
        **chosen,
    )


@pytest.mark.parametrize("classes", (2, 5, 81))
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_cross_entropy_rows(dtype, classes):
    inputs = testing.classification_inputs(seed=1, rows=(3, 17), classes=classes, softmax=True, dtype=dtype)
    target = torch.nn.functional.one_hot(inputs.labels.clamp(min=0).long(), classes)
    g = torch.linspace(0.5, 2.0, 51).reshape(3, 17)
    compare(
        ik.iou_balanced_cross_entropy,
        inputs.logits,
        inputs.labels,
        inputs.iou,
        what="rows",
        floor=testing.FLOOR + target.double(),
        loss_floor=0.1,  # log(sum) of a confident row: float32's sum, 1 + the rest, has an absolute error of 6e-8
        reduction="none",
        grad_output=g,
    )


@pytest.mark.parametrize("given_iou", (True, False))
@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("weight", (None, 1, 2))
@pytest.mark.parametrize("beta", (0.0, 0.11, 1.0))
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_smooth_l1(dtype, beta, weight, normalize, given_iou):
    rows = 5000 if weight is None else 57
    pred, target = testing.delta_inputs(seed=2, rows=rows, dtype=dtype)
    iou = torch.rand(rows, generator=torch.Generator().manual_seed(1)) if given_iou else None
    weights = {None: None, 1: torch.linspace(0, 2, rows), 2: torch.linspace(0, 2, 4 * rows).reshape(rows, 4)}[weight]
    for reduction in ("mean", "none"):
        compare(
            ik.iou_balanced_smooth_l1_loss,
            pred,
            target,
            iou,
            what="smooth L1",
            lambda_=1.5,
            beta=beta,
            w_loc=3.049,
            normalize=normalize,
            weight=weights,
            box_weights=(10.0, 10.0, 5.0, 5.0) if weight else (1.0, 1.0, 1.0, 1.0),
            reduction=reduction,
        )


DIVISORS = {
    "int64": torch.tensor(7),
    "int32": torch.tensor(7, dtype=torch.int32),
    "float16": torch.tensor(7.0, dtype=torch.float16),
    "strided": torch.tensor([7.0, 1.0])[0],
}


@pytest.mark.parametrize("divisor", DIVISORS.values(), ids=DIVISORS)
def test_divisors_in_tensors_of_any_kind(divisor):
    rows = testing.classification_inputs(seed=3, rows=40, classes=5, softmax=True)
    for loss in (ik.iou_balanced_sigmoid_focal_loss, ik.iou_balanced_cross_entropy):
        compare(loss, rows.logits, rows.labels, rows.iou, what="divisor", floor=1e-3, avg_factor=divisor)
    pred, target = testing.delta_inputs(rows=30)
    compare(ik.iou_balanced_smooth_l1_loss, pred, target, what="divisor", avg_factor=divisor)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("normalize", (True, False))
def test_smooth_l1_keeps_a_bad_row_to_itself(normalize, value):
    pred, target = testing.delta_inputs(rows=9)
    pred[4, 1] = value
    iou, others = torch.linspace(0, 1, 9), torch.arange(9) != 4
    options = {"normalize": normalize, "reduction": "none"}
    want, want_grad = run(ik.iou_balanced_smooth_l1_loss, pred.double(), target, iou, backend="reference", **options)
    loss, grad = run(ik.iou_balanced_smooth_l1_loss, pred, target, iou, backend="cpu", **options)
    testing.assert_close_budget(loss, want, torch.float32, what="losses")
    testing.assert_close_budget(grad[others], want_grad[others], torch.float32, what="gradients of the other rows")
    assert not loss[4].isfinite()


@pytest.mark.parametrize("label", (-2, -1, 2))
def test_unchecked_bad_scopes_poison_the_loss(label, monkeypatch):
    monkeypatch.setenv("IOUBAL_CHECK", "0")
    inputs = testing.classification_inputs(rows=12, classes=4, softmax=True)
    labels, scopes = inputs.labels.clamp(min=0), inputs.scope_ids.clone()
    labels[5], scopes[5] = label, 99
    for loss in (ik.iou_balanced_sigmoid_focal_loss, ik.iou_balanced_cross_entropy):
        for backend in ("cpu", "reference"):
            given = {"scope_ids": scopes, "num_scopes": 3, "backend": backend}
            assert loss(inputs.logits, labels, inputs.iou, **given).isnan()


@pytest.mark.parametrize("weight", (float("nan"), float("inf"), 1e38))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_the_weight_of_an_ignored_row_does_not_count(reduction, weight):
    """Whatever it is: at the start, among others, and where nothing else is left."""
    inputs = testing.classification_inputs(seed=8, rows=300, classes=8)
    for ignored in ([0, 1, 150, 151, 299], range(300)):
        labels, weights = inputs.labels.clone(), inputs.weight.clone()
        labels[list(ignored)], weights[list(ignored)] = ik.IGNORE, weight
        options = {"weight": weights, "reduction": reduction}
        compare(ik.iou_balanced_sigmoid_focal_loss, inputs.logits, labels, inputs.iou, what="focal", **options)
        labels = torch.where(labels == ik.BACKGROUND, 0, labels)
        compare(ik.iou_balanced_cross_entropy, inputs.logits, labels, inputs.iou, what="softmax", **options)


def test_a_weight_of_zero_does_not_hide_an_infinite_loss():
    inputs = testing.classification_inputs(rows=6, classes=3, softmax=True)
    logits, labels, weight = inputs.logits.clone(), torch.tensor([1, 2, 0, 1, 2, 0]), torch.ones(6)
    logits[1], weight[1] = torch.tensor([float("inf"), 0.0, 0.0]), 0.0
    for backend in ("cpu", "reference"):
        assert ik.iou_balanced_cross_entropy(logits, labels, inputs.iou, weight=weight, backend=backend).isnan()


def test_an_infinite_grad_output_leaves_ignored_rows_at_zero():
    inputs = testing.classification_inputs(rows=4, classes=3)
    labels = torch.tensor([0, -2, -1, 2])
    for backend in ("cpu", "reference"):
        x = inputs.logits.clone().requires_grad_()
        loss = ik.iou_balanced_sigmoid_focal_loss(x, labels, inputs.iou, reduction="none", backend=backend)
        loss.backward(torch.full_like(loss, float("inf")))
        assert torch.equal(x.grad[1], torch.zeros(3)) and bool(x.grad[0].isinf().all())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=ids)
@pytest.mark.parametrize("gamma", (0.0, 2.0, 0.5))
def test_every_16_bit_logit(gamma, dtype):
    """All finite bit patterns, as a positive and as a negative entry, in one call each."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()].reshape(-1, 1)
    ones = torch.ones(x.shape[0])
    for label in (-1, 0):
        compare(
            ik.iou_balanced_sigmoid_focal_loss,
            x.float(),
            torch.full((x.shape[0],), label),
            ones,
            what=f"all {dtype} logits, label {label}",
            gamma=gamma,
            eta=0.0,
            reduction="none",
        )
