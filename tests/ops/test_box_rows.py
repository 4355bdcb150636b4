"""Box coders, IoU and smooth L1 on the CPU: the formulas evaluated on vectors, on every instruction set, against plain
PyTorch in float64. Ends of tiles, mixed dtypes, and what no detector should send."""

import math

import pytest
import torch

import ioubal_kernels as ik
from ioubal_kernels import testing
from ioubal_kernels.ops.library import isa_levels, limit_isa

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ROWS = (1, 2, 3, 7, 8, 9, 63, 64, 65, 8193)  # around a vector, a tile and what a thread takes
WEIGHTS = ((1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0))
INF, NAN = math.inf, math.nan


def boxes_and_deltas(rows, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    centers, sizes = torch.rand(rows, 2, generator=g) * 50, torch.rand(rows, 2, generator=g) * 30 + 1
    anchors = torch.cat((centers - sizes / 2, centers + sizes / 2), 1)
    deltas = torch.randn(rows, 4, generator=g)
    return anchors.to(dtype), (anchors + torch.randn(rows, 4, generator=g)).to(dtype), deltas.to(dtype)


def hostile(usual):
    """Rows with every pair of special values in two of the four coordinates, in float64."""
    special = [0.0, -0.0, 1.0, -3.0, 4.5, -4.5, 1e-310, 1e-30, 1e8, -1e8, 1e200, -1e200, INF, -INF, NAN]
    rows = [
        [a if c == i else b if c == j else usual[c] for c in range(4)]
        for i in range(4) for j in range(i + 1, 4) for a in special for b in special
    ]  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64)


def both(function, result, *tensors, what):
    """The CPU's results, of dtype `result`, against the reference's in float64."""
    want = function(*(t.double() for t in tensors), backend="reference")
    for level in isa_levels():
        limit_isa(level)
        got = function(*tensors, backend="cpu")
        assert got.dtype == result
        testing.assert_close_budget(got, want, result, floor=1e-13, what=f"{what}, isa {level}")


@pytest.mark.parametrize("coder", ("delta", "fovea"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_rows(dtype, coder):
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    for rows in ROWS:
        anchors, boxes, deltas = boxes_and_deltas(rows, dtype, seed=rows)
        for weights in WEIGHTS:
            o = {"weights": weights, "box_coder": coder}
            for name, function, tensors in (
                ("decode", lambda d, a, o=o, **k: ik.decode_boxes(d, a, **o, **k), (deltas, anchors)),
                ("encode", lambda b, a, o=o, **k: ik.encode_boxes(b, a, **o, **k), (boxes, anchors)),
                ("delta_iou", lambda p, t, o=o, **k: ik.delta_iou(p, t, **o, **k), (deltas, deltas.flip(0))),
            ):
                if name == "encode" and coder == "fovea" and dtype in (torch.bfloat16, torch.float16):
                    continue  # near 0 a log of rounded boxes has no digits to compare
                both(function, wide, *tensors, what=f"{name}, {rows} rows, {o}")
        both(ik.paired_box_iou, wide, boxes, anchors, what=f"paired, {rows} rows")


@pytest.mark.parametrize("deltas, anchors", ((torch.bfloat16, torch.float64), (torch.float64, torch.float32)), ids=str)
def test_decoded_boxes_are_float64_where_one_input_is(deltas, anchors):
    a, _, d = boxes_and_deltas(7)
    both(ik.decode_boxes, torch.float64, d.to(deltas), a.to(anchors), what=f"{deltas}, {anchors}")


@pytest.mark.parametrize("coder", ("delta", "fovea"))
def test_values_no_detector_sends(coder):
    anchors = torch.tensor([2.0, 3.0, 12.0, 9.0], dtype=torch.float64)
    good = torch.tensor([0.25, -0.5, 0.125, 0.75], dtype=torch.float64)
    odd_deltas, odd_boxes = hostile(good.tolist()), hostile(anchors.tolist())
    # Sides at plus and minus 1e200 lose the anchor, each formula in its own way.
    far = odd_boxes[(odd_boxes.abs() == 1e200).sum(1) < 2]
    usual, box = good.expand_as(odd_deltas).contiguous(), anchors.expand_as(odd_boxes).contiguous()
    o = {"box_coder": coder}
    for what, function, tensors in (
        ("decode deltas", lambda d, a, **k: ik.decode_boxes(d, a, **o, **k), (odd_deltas, box)),
        ("decode anchors", lambda d, a, **k: ik.decode_boxes(d, a, **o, **k), (usual, odd_boxes)),
        ("encode boxes", lambda b, a, **k: _any_not_finite(ik.encode_boxes(b, a, **o, **k)), (far, box[: len(far)])),
        ("encode anchors", lambda b, a, **k: ik.encode_boxes(b, a, **o, **k), (box, odd_boxes)),
        ("delta_iou pred", lambda p, t, **k: ik.delta_iou(p, t, **o, **k), (odd_deltas, usual)),
        ("delta_iou target", lambda p, t, **k: ik.delta_iou(p, t, **o, **k), (usual, odd_deltas)),
        ("paired", ik.paired_box_iou, (odd_boxes, box)),
    ):
        both(function, torch.float64, *tensors, what=what)


def _any_not_finite(deltas):
    """A box at infinity has no centre: infinite or NaN, as the order of the formula's operations has it."""
    return deltas.where(deltas.isfinite(), INF)


@pytest.mark.parametrize("coder", ("delta", "fovea"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_decoding(dtype, coder):
    for rows in (1, 9, 65):
        anchors, _, deltas = boxes_and_deltas(rows, dtype)
        deltas[0, 2], deltas[rows - 1, 3] = 4.2, -5.0  # beyond the clamp
        grad = torch.randn(rows, 4, generator=torch.Generator().manual_seed(1)).to(dtype)

        def gradient(d, a, g, backend):
            leaf = d.detach().clone().requires_grad_()
            ik.decode_boxes(leaf, a, box_coder=coder, backend=backend).backward(g)
            return leaf.grad

        both(gradient, dtype, deltas, anchors, grad, what=f"{rows} rows")


def test_a_row_does_not_know_its_neighbours():
    """A row's result is the same to the bit wherever it stands, whatever stands beside it."""
    anchors, boxes, deltas = boxes_and_deltas(200, torch.float32)
    wild = torch.full((7, 4), INF)
    for level in isa_levels():
        limit_isa(level)
        for function, a, b in ((ik.decode_boxes, deltas, anchors), (ik.encode_boxes, boxes, anchors),
                               (ik.delta_iou, deltas, deltas.flip(0).contiguous())):  # fmt: skip
            whole = function(a, b, backend="cpu")
            shifted = function(torch.cat((wild, a)), torch.cat((wild, b)), backend="cpu")[7:]
            assert torch.equal(whole, shifted), (function.__name__, level)


def test_exponential_and_logarithm():
    """To 2 ulp over their whole range: the sizes of boxes are exponentials, their deltas logarithms."""
    unit = torch.tensor([-0.5, -0.5, 0.5, 0.5], dtype=torch.float64)
    t = torch.linspace(-4.135, 4.135, 40_001, dtype=torch.float64)
    deltas = torch.stack((t * 0, t * 0, t, -t), 1)
    ratio = torch.cat((torch.logspace(-320, 300, 40_000, dtype=torch.float64), 1 + t * 1e-3, 1 + t * 1e-9))
    boxes = torch.stack((ratio * 0, ratio * 0, ratio, ratio), 1)
    for level in isa_levels():
        limit_isa(level)
        decoded = ik.decode_boxes(deltas, unit.expand_as(deltas).contiguous(), backend="cpu")
        width = decoded[:, 2] - decoded[:, 0]
        assert (width / t.exp() - 1).abs().max() < 4 * 2.0**-53 and width[20_000] == 1, level
        logs = ik.encode_boxes(boxes, unit.expand_as(boxes).contiguous(), backend="cpu")[:, 2]
        want = ratio.log()
        assert ((logs - want).abs() <= 4 * 2.0**-53 * want.abs()).all(), level


@pytest.mark.parametrize("lambda_", (0.0, 0.25, 1.0, 1.5, 3.0, 40.0))
def test_powers_of_the_iou(lambda_):
    """iou^lambda for IoUs from 0 to above 1: each row's plain loss is 1."""
    iou = torch.cat((torch.tensor([0.0, 1e-300, 1e-30, 0.5, 1.0, 1.5, -0.5, NAN]), torch.rand(1000))).double()
    target = torch.zeros(len(iou), 4, dtype=torch.float64)
    pred = target.clone()
    pred[:, 1] = 1.0
    want = torch.ones_like(iou) if lambda_ == 0 else iou.clamp(0, 1) ** lambda_
    for level in isa_levels():
        limit_isa(level)
        rows = ik.iou_balanced_smooth_l1_loss(
            pred, target, iou, lambda_=lambda_, beta=0.0, reduction="none", backend="cpu"
        )
        testing.assert_close_budget(rows, want, torch.float64, what=f"isa {level}")


@pytest.mark.parametrize("options", ({}, {"normalize": True, "eps": 0.1}, {"beta": 0.0}, {"lambda_": 0.7}), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_smooth_l1_by_rows_and_tiles(dtype, options):
    """More rows than a block of sums; weights of a row, or of its coordinates in another dtype; scopes."""
    g = torch.Generator().manual_seed(3)
    for rows in (1, 65, 4161):
        target = torch.randn(rows, 4, generator=g)
        pred, target = (target + torch.randn(rows, 4, generator=g) * 0.2).to(dtype), target.to(dtype)
        scope_ids = torch.randint(0, 3, (rows,), generator=g)
        for weight in (None, torch.rand(rows, generator=g), torch.rand(rows, 4, generator=g).double()):
            given = {**options, "weight": weight, "scope_ids": scope_ids, "num_scopes": 3}

            def loss_and_gradient(p, t, backend, given=given, reduction="none"):
                leaf = p.detach().clone().requires_grad_()
                loss = ik.iou_balanced_smooth_l1_loss(leaf, t, **given, reduction=reduction, backend=backend)
                loss.backward(torch.linspace(0.5, 2, loss.numel()).to(loss.dtype).view(loss.shape))
                return loss.detach(), leaf.grad

            for reduction in ("none", "mean"):
                want, want_grad = loss_and_gradient(pred.double(), target.double(), "reference", reduction=reduction)
                for level in isa_levels():
                    limit_isa(level)
                    loss, grad = loss_and_gradient(pred, target, "cpu", reduction=reduction)
                    wide = torch.float64 if dtype is torch.float64 else torch.float32
                    testing.assert_close_budget(loss, want, wide, floor=1e-7, what=f"{rows} rows, isa {level}: loss")
                    testing.assert_close_budget(grad, want_grad, dtype, floor=1e-7, what=f"{rows} rows, isa {level}")


def test_a_nan_stays_one_in_sixteen_bits():
    """Whatever bits it has: rounding a mantissa that is all ones would carry into the sign."""
    weight = torch.full((9,), -1, dtype=torch.int32).view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        for level in isa_levels():
            limit_isa(level)
            pred = torch.ones(9, 4, dtype=dtype, requires_grad=True)
            ik.iou_balanced_smooth_l1_loss(pred, torch.zeros(9, 4), weight=weight, backend="cpu").backward()
            assert pred.grad.isnan().all(), (dtype, level)
