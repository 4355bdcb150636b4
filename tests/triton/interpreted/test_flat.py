"""The flat losses and the boxes in the interpreter."""

import pytest
import torch
from checks import DTYPES, check_flat, ids
from guarded import guarded

import ioubal_kernels as ik
from ioubal_kernels import testing
from ioubal_kernels.ops import workspace
from ioubal_kernels.triton_kernels import cross_entropy

SHAPES = ((1, 1), (33, 3), (39, 80), (13, 91), (1100, 2))
OPTIONS = {
    "mean": {},
    "sum, eps": {"reduction": "sum", "eps": 0.3},
    "weight, scopes, divisor": {"weight": True, "scopes": True, "avg_factor": 17.5},
    "none": {"reduction": "none"},
}
focal, softmax = ik.iou_balanced_sigmoid_focal_loss, ik.iou_balanced_cross_entropy


def options_of(name, inputs):
    options = dict(OPTIONS[name])
    if options.pop("weight", False):
        options["weight"] = inputs.weight
    if options.pop("scopes", False):
        options |= {"scope_ids": inputs.scope_ids, "num_scopes": inputs.num_scopes}
    return options


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("gamma", (2.0, 1.5))
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_sigmoid_focal(dtype, gamma, shape, options):
    inputs = testing.classification_inputs(seed=shape[0], rows=shape[0], classes=shape[1], dtype=dtype)
    check_flat(focal, inputs.logits, inputs.labels, inputs.iou, gamma=gamma, **options_of(options, inputs))


@pytest.mark.parametrize("eta", (0.0, 3.0))
@pytest.mark.parametrize("alpha", (None, 0.0, 1.0))
@pytest.mark.parametrize("gamma", (0.0, 1.0, 5.0))
def test_sigmoid_focal_parameters(gamma, alpha, eta):
    inputs = testing.classification_inputs(seed=3, rows=(4, 9), classes=11, index_dtype=torch.int32)
    check_flat(focal, inputs.logits, inputs.labels, inputs.iou, alpha=alpha, eta=eta, gamma=gamma, weight=inputs.weight)


@pytest.mark.parametrize("scale", (1.0, 0.5))
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_sigmoid_focal_in_place(dtype, scale):
    inputs = testing.classification_inputs(rows=30, classes=8, dtype=dtype)
    check_flat(focal, inputs.logits, inputs.labels, inputs.iou, inplace=True, grad_scale=scale)


@pytest.mark.parametrize("name", [n for n, _ in testing.same_values_other_memory(torch.zeros(3, 3))])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=ids)
def test_addresses(dtype, name):
    inputs = testing.classification_inputs(rows=20, classes=16, dtype=dtype)
    moved = dict(testing.same_values_other_memory(inputs.logits))[name]
    got = testing.loss_and_gradient(focal, inputs, backend="triton")
    inputs.logits = moved
    again = testing.loss_and_gradient(focal, inputs, backend="triton")
    check_flat(focal, moved, inputs.labels, inputs.iou)
    testing.assert_close_budget(again[0], got[0].double(), torch.float32, "loss")
    testing.assert_close_budget(again[1], got[1].double(), dtype)


def floor_of(inputs, chosen, options):
    """softmax - 1 cancels at the target in the oracle's inputs' precision: judged against the row's own scale."""
    rows, classes = inputs.logits.shape
    divisor = {"mean": max(int((inputs.labels >= 0).sum()), 1), "sum, eps": 1.0, "none": 1.0}.get(options, 17.5)
    row = inputs.weight if "weight" in chosen else torch.ones(rows)
    target = torch.nn.functional.one_hot(inputs.labels.clamp(min=0).long(), classes)
    return testing.FLOOR + target * row[:, None].double() / divisor


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", ((33, 3), (65, 21), (31, 81), (3, 1203)), ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_cross_entropy(dtype, shape, options):
    rows, classes = shape
    inputs = testing.classification_inputs(seed=rows, rows=rows, classes=classes, softmax=True, dtype=dtype)
    chosen = options_of(options, inputs)
    background = (0 if classes % 2 else -1) % classes
    check_flat(
        softmax,
        inputs.logits,
        inputs.labels,
        inputs.iou,
        floor=floor_of(inputs, chosen, options),
        loss_floor=0.1 if options == "none" else testing.FLOOR,
        background_index=background,
        **chosen,
    )


@pytest.mark.parametrize("order", ("sorted", "mixed"))
def test_cross_entropy_of_many_scopes(monkeypatch, order):
    """Several tiles of sums, each with a few of the scopes (images of a batch) or with all; two scopes without rows."""
    monkeypatch.setattr(cross_entropy, "SUM_ROWS", 128)
    monkeypatch.setattr(workspace, "_TRITON_ROWS", 128)
    rows, scopes = 300, 9
    inputs = testing.classification_inputs(seed=6, rows=rows, classes=5, softmax=True, ignored_share=0.1)
    ids = torch.arange(rows) * 7 // rows + 1
    ids = ids if order == "sorted" else ids[torch.randperm(rows, generator=torch.Generator().manual_seed(1))]
    options = {"scope_ids": ids, "num_scopes": scopes, "reduction": "sum"}
    check_flat(softmax, inputs.logits, inputs.labels, inputs.iou, floor=floor_of(inputs, {}, "sum, eps"), **options)


def test_scopes_take_little_memory():
    """SSD300, 64 images, a scope each: kept in proportion to rows times scopes, the sums would exceed the logits."""
    (room,) = workspace.rows_workspace("triton", "cross_entropy", 558_848, 81, 64, torch.device("meta"))
    assert room.nbytes < 558_848 * 81 * 2 / 10


def test_cross_entropy_of_long_rows():
    """More columns than a program keeps in registers."""
    inputs = testing.classification_inputs(seed=2, rows=5, classes=5000, softmax=True)
    check_flat(softmax, inputs.logits, inputs.labels, inputs.iou, floor=0.2)


@pytest.mark.parametrize("given_iou", (True, False))
@pytest.mark.parametrize("weight", (None, 1, 2))
@pytest.mark.parametrize("beta", (0.0, 0.11))
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_smooth_l1(dtype, beta, weight, given_iou):
    rows = 150 if weight is None else 57
    pred, target = testing.delta_inputs(seed=2, rows=rows, dtype=dtype)
    iou = torch.rand(rows, generator=torch.Generator().manual_seed(1)) if given_iou else None
    weights = {None: None, 1: torch.linspace(0, 2, rows), 2: torch.linspace(0, 2, 4 * rows).reshape(rows, 4)}[weight]
    check_flat(
        ik.iou_balanced_smooth_l1_loss,
        pred,
        target,
        iou,
        beta=beta,
        w_loc=3.049,
        normalize=weight != 1,
        reduction="none" if given_iou == (weight == 2) else "mean",
        weight=weights,
        box_weights=(10.0, 10.0, 5.0, 5.0) if weight else (1.0, 1.0, 1.0, 1.0),
    )


@pytest.mark.parametrize("normalize", (True, False))
def test_smooth_l1_scopes(normalize):
    pred, target = testing.delta_inputs(rows=140)
    scopes = torch.arange(140) // 50
    check_flat(ik.iou_balanced_smooth_l1_loss, pred, target, normalize=normalize, scope_ids=scopes, num_scopes=3)


@pytest.mark.parametrize("op", ("decode", "encode", "paired_box_iou", "delta_iou"))
@pytest.mark.parametrize("coder", ("delta", "fovea"))
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_boxes(dtype, coder, op):
    g = torch.Generator().manual_seed(4)
    corner = torch.rand(300, 2, generator=g) * 100
    anchors = torch.cat([corner, corner + torch.rand(300, 2, generator=g) * 50 + 10], 1).to(dtype)
    deltas = (torch.randn(300, 4, generator=g) * 0.3).to(dtype)
    boxes = (anchors.float() + torch.randn(300, 4, generator=g)).to(dtype)
    # A corner is centre - size / 2, both up to 300: three roundings of that are 10 times the float32 budget. IoUs and
    # encoded deltas are of size 1, and differences of coordinates as well.
    if op == "decode":
        results = []
        for leaf, others, backend in ((deltas.double(), anchors.double(), "reference"), (deltas, anchors, "triton")):
            leaf = guarded(leaf).requires_grad_()
            out = ik.decode_boxes(leaf, guarded(others), box_coder=coder, backend=backend)
            (grad,) = torch.autograd.grad((out * torch.tensor([1.0, 2, 3, 4])).sum(), leaf)
            results.append((out.detach(), grad))
        testing.assert_close_budget(results[1][0], results[0][0], torch.float32, floor=10.0)
        testing.assert_close_budget(results[1][1], results[0][1], dtype)
        return
    function = {"encode": ik.encode_boxes, "paired_box_iou": ik.paired_box_iou, "delta_iou": ik.delta_iou}[op]
    first, second = (deltas.clone(), deltas.flip(0)) if op == "delta_iou" else (boxes, anchors)
    if op == "delta_iou":  # centres or sides far away, one of each
        first.view(-1)[0:20:5], first.view(-1)[20:40:5] = torch.inf, -torch.inf
    chosen = {} if op == "paired_box_iou" else {"box_coder": coder}
    want = function(first.double(), second.double(), backend="reference", **chosen)
    got = function(guarded(first), guarded(second), backend="triton", **chosen)
    testing.assert_close_budget(got, want, torch.float32, floor=1.0)
