"""Softmax cross entropy takes many rows at a time: every way such a tile can be filled, against the float64 oracle."""

import pytest
import torch
import torch.nn.functional as F

import ioubal_kernels as ik
from ioubal_kernels import testing
from ioubal_kernels.ops.library import isa_levels, limit_isa

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COLUMNS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 80, 81, 1204)
INF, NAN = float("inf"), float("nan")


def run(x, labels, iou, weight, backend, reduction="none", **options):
    leaf = x.detach().clone().requires_grad_()
    loss = ik.iou_balanced_cross_entropy(
        leaf, labels, iou, weight=weight, reduction=reduction, backend=backend, **options
    )
    loss.backward(torch.linspace(0.5, 2.0, loss.numel()).reshape(loss.shape).to(loss.dtype))
    return loss.detach(), leaf.grad


def reduced(x, labels, iou, weight, backend, **options):
    """Through the pass that meets the sums and scales the positives' gradients afterwards."""
    return run(x, labels, iou, weight, backend, "sum", grad_scale=0.5, **options)


def compare(x, labels, iou, weight=None, *, loss_floor=0.1, target_floor=1.0, what=""):
    """Single losses and gradients on every instruction set. target_floor: the target's entry, p - 1, is judged against
    this size; loss_floor: log(sum) has an absolute error."""
    want, want_grad = run(x.double(), labels, iou, weight, "reference")
    want_sum, want_sum_grad = reduced(x.double(), labels, iou, weight, "reference")
    floor = testing.FLOOR + target_floor * F.one_hot(labels.clamp(min=0), x.shape[1])
    for isa in isa_levels():
        limit_isa(isa)
        loss, grad = run(x, labels, iou, weight, "cpu")
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        testing.assert_close_budget(loss, want, wide, "gradient", loss_floor, what=f"{what}, isa {isa}: losses")
        testing.assert_close_budget(grad, want_grad, x.dtype, "gradient", floor, what=f"{what}, isa {isa}: gradient")
        loss, grad = reduced(x, labels, iou, weight, "cpu")
        size = 1 + want.abs().nan_to_num(0, 0, 0).sum()
        testing.assert_close_budget(loss, want_sum, wide, "gradient", size, what=f"{what}, isa {isa}: sum")
        testing.assert_close_budget(grad, want_sum_grad, x.dtype, "gradient", floor, what=f"{what}, isa {isa}: sum")


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_that_are_not_full(dtype, columns):
    for rows in (1, 2, 7, 8, 9, 23, 24, 25, 63, 64, 65, 131):
        inputs = testing.classification_inputs(rows, rows, columns, softmax=True, dtype=dtype, positive_share=0.5)
        compare(inputs.logits, inputs.labels, inputs.iou, inputs.weight, what=f"{rows} rows")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(dtype):
    x = torch.zeros(0, 81, dtype=dtype, requires_grad=True)
    loss = ik.iou_balanced_cross_entropy(x, torch.zeros(0, dtype=torch.int64), torch.zeros(0), backend="cpu")
    loss.backward()
    assert loss.item() == 0 and x.grad.shape == (0, 81)


@pytest.mark.parametrize("columns", (3, 21, 81))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tile_of_extremes(dtype, columns):
    """Every pair of extreme logits, infinities included, in rows beside ordinary, ignored and NaN ones. A row with a
    positive target of +inf loss would make the others' normaliser its own limit: the bad rows are background here."""
    values = testing.extreme_logits(dtype)
    g = torch.Generator().manual_seed(0)
    rows = values.numel() + 12
    inputs = testing.classification_inputs(1, rows, columns, softmax=True, dtype=dtype)
    x, labels = inputs.logits.clone(), inputs.labels.clone()
    for at, value in enumerate(values):
        x[at, torch.randint(0, columns, (), generator=g)] = value
        labels[at] = at % 2 - 1  # background or ignored
    x[-1, 0], x[-2], x[-3, columns - 1], x[-4, 1], x[-5] = NAN, -INF, INF, -INF, INF
    labels[-12:] = torch.tensor([0, 1, 2, -1, 1, 2, 0, -1, 0, 0, -1, 0])
    compare(x, labels, inputs.iou, what="extremes")
    compare(x[:-5], labels[:-5], inputs.iou[:-5], what="without NaN")


@pytest.mark.parametrize("spread", (15.0, 45.0, 300.0))
@pytest.mark.parametrize("offset", (-100.0, -39.9, 0.0, 39.9, 1e4))
def test_logits_of_any_size(offset, spread):
    """Around the border to which no maximum is needed, and far beyond."""
    inputs = testing.classification_inputs(2, 50, 81, softmax=True, spread=spread)
    compare(inputs.logits + offset, inputs.labels, inputs.iou, inputs.weight, what=f"{offset} +- {spread}")


@pytest.mark.parametrize("columns", (2, 21, 81))
@pytest.mark.parametrize("offset", (0.0, 100.0))
def test_confident_rows_keep_their_relative_precision(offset, columns):
    """Neither the loss nor the target's gradient is formed as a difference of nearly equal numbers."""
    g = torch.Generator().manual_seed(4)
    labels = torch.randint(0, columns, (200,), generator=g)
    x = torch.randn(200, columns, generator=g) + offset
    x[torch.arange(200), labels] += torch.linspace(0, 25, 200)
    x = x.round(decimals=2)
    compare(x, labels, torch.rand(200, generator=g), loss_floor=1e-7, target_floor=1e-7, what="confident rows")


@pytest.mark.parametrize("label_dtype", (torch.int32, torch.int64), ids=str)
def test_one_hostile_row_changes_no_other(label_dtype):
    """Through whichever path its tile goes, a row's result is within the budget of the same number."""
    inputs = testing.classification_inputs(3, 100, 21, softmax=True, index_dtype=label_dtype)
    x = inputs.logits.clone()
    others = torch.arange(100) != 50
    inputs.labels[50] = 0
    for isa in isa_levels():
        limit_isa(isa)
        want, want_grad = run(x, inputs.labels, inputs.iou, None, "cpu")
        for value in (NAN, INF, -INF, 1e30, 41.0):
            x[50, 7] = value
            loss, grad = run(x, inputs.labels, inputs.iou, None, "cpu")
            testing.assert_close_budget(loss[others], want[others].double(), torch.float32, "gradient", 0.1, what=isa)
            floor = testing.FLOOR + F.one_hot(inputs.labels.long().clamp(min=0), 21)[others]
            testing.assert_close_budget(grad[others], want_grad[others].double(), torch.float32, "gradient", floor)


@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("columns", (5, 81))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_a_normaliser_as_large_as_a_small_loss_needs_it(dtype, columns, weighted):
    """A single positive with a positive IoU, so sure of itself that its plain gradient is no normal float32, carries
    the weight of all: its gradient is large, and must not be scaled up from what was too small."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, columns, (200,), generator=g)
    x = torch.randn(200, columns, generator=g).round(decimals=1)
    iou = torch.zeros(200)
    labels[77], iou[77] = 1, 0.5
    x[77, 1] = 80.0
    x = x.to(dtype)
    weight = torch.full((200,), 1e-3) if weighted else None
    loss, grad = reduced(x, labels, iou, weight, "cpu")
    want, want_grad = reduced(x.double(), labels, iou, weight, "reference")
    testing.assert_close_budget(loss, want, torch.float32, "loss")
    floor = testing.FLOOR + F.one_hot(labels, columns) * (torch.arange(200) != 77)[:, None]
    testing.assert_close_budget(grad, want_grad, dtype, "gradient", floor)
    assert float(want_grad[77].abs().max()) > 0.05 * (1e-3 if weighted else 1)
