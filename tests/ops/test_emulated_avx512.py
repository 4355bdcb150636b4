"""The AVX-512 kernels on any machine: their source compiled over emulated intrinsics, against float64."""

import ctypes
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_iou

import ioubal_kernels as ik
from ioubal_kernels import testing, testing_matching
from ioubal_kernels.reference_terms import focal_term

HERE = Path(__file__).resolve().parent
COMPILER = os.environ.get("CXX", "g++")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VARIANTS = ((4, torch.float32), (4, torch.bfloat16), (4, torch.float16), (5, torch.bfloat16))
FOCAL_VARIANTS = (*VARIANTS, *((6, dtype) for dtype in DTYPES))
GRADIENT, LOSS = 1, 2

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"{COMPILER} is absent")]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    library = tmp_path_factory.mktemp("emulated") / "kernels.so"
    include = [HERE.parents[1] / "csrc", HERE / "emulated", Path(torch.__file__).parent / "include"]
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", *(f"-I{path}" for path in include)]
    source = HERE / "emulated" / "emulated_kernels.cpp"
    built = subprocess.run([COMPILER, *flags, str(source), "-o", str(library)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    loaded = ctypes.CDLL(str(library))
    loaded.focal.restype = ctypes.c_double
    loaded.softmax.restype = None
    loaded.match.restype = ctypes.c_int64
    loaded.box_rows.restype = None
    return loaded


def call_focal(
    kernels,
    isa,
    x,
    gamma,
    scale=0.3,
    mask=None,
    start=0,
    period=0,
    skips=(),
    output=GRADIENT,
    stream=False,
    by_octave=False,
):
    """(total, out, logits of the positives); skips: (first, count, positive or -1) each."""
    listed = torch.tensor(skips, dtype=torch.int64).view(-1, 3)
    positives = torch.full((len(listed) + 1,), float("nan"), dtype=torch.float64)
    out = torch.full_like(x, float("nan"))
    i64, f64, pointer = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
    total = kernels.focal(
        *(
            isa,
            DTYPES.index(x.dtype),
            pointer(x.data_ptr()),
            pointer(out.data_ptr()),
            i64(x.numel()),
            f64(scale),
            f64(gamma),
        ),
        *(pointer(mask.data_ptr() if mask is not None else 0), i64(start), i64(period)),
        *(pointer(listed.data_ptr()), i64(len(listed)), pointer(positives.data_ptr()), output, int(stream)),
        int(by_octave),
    )
    return total, out, positives


def oracle(x, gamma):
    """Loss and derivative of every logit as a negative entry, in float64."""
    x = x.double().requires_grad_()
    loss = focal_term(x, gamma)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


@pytest.mark.parametrize("gamma", (0.0, 1.0, 2.0, 0.5, 3.3))
@pytest.mark.parametrize("isa, dtype", FOCAL_VARIANTS, ids=str)
def test_dense_pass(kernels, isa, dtype, gamma):
    g = torch.Generator().manual_seed(0)
    for n, shift in itertools.product((1, 15, 16, 17, 64, 333, 9000), (0, 1, 5)):
        x = (torch.randn(n + shift, generator=g) * 8 - 2).to(dtype)[shift:]
        loss, grad = oracle(x, gamma)
        total, out, _ = call_focal(kernels, isa, x, gamma)
        # A few entries have an element's budget (their errors do not average out), a sum of many its own.
        assert abs(total - float(loss.sum())) <= (1e-6 if n >= 64 else 8e-6) * float(loss.sum())
        testing.assert_close_budget(out, 0.3 * grad, dtype, what=f"{n} entries, gradient")
        streamed_total, streamed, _ = call_focal(kernels, isa, x, gamma, stream=True)
        assert streamed_total == total and torch.equal(streamed, out)
        _, each, _ = call_focal(kernels, isa, x, gamma, output=LOSS)
        testing.assert_close_budget(each, 0.3 * loss, dtype, what=f"{n} entries, loss")


@pytest.mark.parametrize("isa, dtype", FOCAL_VARIANTS, ids=str)
def test_masked_pass(kernels, isa, dtype):
    g = torch.Generator().manual_seed(1)
    for n, period, start in itertools.product((100, 1000), (1, 3, 77, 640), (0, 2)):
        start %= period
        x = torch.randn(n, generator=g).to(dtype)
        keep = torch.rand(period, generator=g) > 0.3
        bytes_ = (keep.to(torch.uint8) * 255)[torch.arange(period + 256) % period].contiguous()
        counted = keep[(torch.arange(n) + start) % period]
        x[~counted] = float("nan")  # must not be felt
        loss, grad = oracle(torch.where(counted, x, 0), 2.0)
        total, out, _ = call_focal(kernels, isa, x, 2.0, mask=bytes_, start=start, period=period)
        want = float((loss * counted).sum())
        assert abs(total - want) <= 1e-6 * want
        testing.assert_close_budget(out, torch.where(counted, 0.3 * grad, 0.0), dtype, what=f"period {period}")


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("isa, dtype", FOCAL_VARIANTS, ids=str)
def test_left_out_entries(kernels, isa, dtype, masked):
    """Single positives and whole rows, at the ends, across chunks, side by side, with and without a periodic mask."""
    g = torch.Generator().manual_seed(4)
    for n, shift in itertools.product((1, 40, 255, 257, 1000, 9000), (0, 3)):
        x = (torch.randn(n + shift, generator=g) * 2 - 3).to(dtype)[shift:]
        marks, skips, at = [0, 1, 2, 79, 250, 256, 500, 511, 512, 767, 998, 8190, 8999], [], 0
        for first in marks:
            count = (1, 80, 1, 600)[len(skips) % 4]
            first = max(first, at)
            if first >= n:
                break
            skips.append((first, min(count, n - first), len(skips) if count == 1 else -1))
            at = first + count
        counted = torch.ones(n, dtype=torch.bool)
        for first, count, _ in skips:
            counted[first : first + count] = False
        mask, period = None, 0
        if masked:
            period = 77
            keep = torch.rand(period, generator=g) > 0.2
            mask = (keep.to(torch.uint8) * 255)[torch.arange(period + 256) % period].contiguous()
            counted &= keep[(torch.arange(n) + 5) % period]
        loss, grad = oracle(torch.where(counted, x, 0), 2.0)
        singles = torch.tensor([first for first, _, positive in skips if positive >= 0], dtype=torch.int64)
        wild = ~counted
        wild[singles] = False
        x[wild] = float("nan")  # must not be felt
        total, out, positives = call_focal(kernels, isa, x, 2.0, mask=mask, start=5, period=period, skips=skips)
        want = float((loss * counted).sum())
        assert abs(total - want) <= (1e-6 if n >= 255 else 8e-6) * want
        testing.assert_close_budget(out, torch.where(counted, 0.3 * grad, 0.0), dtype, what=f"{n} entries")
        numbers = torch.tensor([positive for _, _, positive in skips if positive >= 0], dtype=torch.int64)
        assert torch.equal(positives[numbers], x[singles].double())
        assert positives.isnan().sum() == len(positives) - len(numbers)


@pytest.mark.parametrize("spread", (0.6, 1.5))  # the inner octaves are enough for most chunks, or for few
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("gamma", (0.0, 2.0, 0.5))
def test_looked_up_by_octave(kernels, gamma, masked, spread):
    """What is written is what is computed, to the bit: with several logits of no octave, too many of them, none that
    can be looked up at all, entries left out and a mask of any period."""
    g = torch.Generator().manual_seed(5)
    n = 9000
    x = torch.randn(n, generator=g) * spread - 4.6
    x[300:304], x[1100:1108], x[2000:2009], x[4444] = 0.7, -0.2, 1e-3, 3.0
    x[3000:3040:3], x[6000], x[7000], x[8500] = 2.0, -40.0, 1e-5, 16.0
    x = x.to(torch.bfloat16)
    skips = [(700, 1, 0), (5000, 80, -1), (8900, 1, 2)]
    for period in (1, 77, 640, 4001) if masked else (0,):
        counted, options = torch.ones(n, dtype=torch.bool), {"skips": skips}
        if masked:
            keep = torch.rand(period, generator=g) > 0.2
            keep[0] = True
            mask = (keep.to(torch.uint8) * 255)[torch.arange(period + 256) % period].contiguous()
            options |= {"mask": mask, "start": 5 % period, "period": period}
            counted = keep[(torch.arange(n) + 5 % period) % period]
        for first, count, _ in skips:
            counted[first : first + count] = False
        # What does not count must not be felt, whether it could be looked up or not.
        for hidden in (x, torch.full_like(x, float("nan"))):
            shown = torch.where(counted, x, hidden)
            shown[700], shown[8900] = x[700], x[8900]
            computed, want, _ = call_focal(kernels, 6, shown, gamma, **options)
            total, out, positives = call_focal(kernels, 6, shown, gamma, by_octave=True, **options)
            assert torch.equal(out, want) and total == pytest.approx(computed, rel=1e-6)
            assert positives[0] == x[700] and positives[2] == x[8900]
            alone, _, _ = call_focal(kernels, 6, shown, gamma, by_octave=True, output=0, **options)
            assert alone == pytest.approx(computed, rel=1e-6)
            streamed = call_focal(kernels, 6, shown, gamma, by_octave=True, stream=True, **options)
            assert streamed[0] == total and torch.equal(streamed[1], out)


@pytest.mark.parametrize("value", (-0.498046875, -0.5, -0.99609375, -1.0, -7.96875, -8.0, -15.9375, -16.0))
def test_ends_of_the_octaves(kernels, value):
    """Among logits for which the inner octaves, from -1 to -8, are enough."""
    x = (torch.randn(1500, generator=torch.Generator().manual_seed(6)) * 0.6 - 4.6).clamp(-7.5, -1.5)
    x[600] = value
    x = x.to(torch.bfloat16)
    computed, want, _ = call_focal(kernels, 6, x, 2.0)
    total, out, _ = call_focal(kernels, 6, x, 2.0, by_octave=True)
    assert torch.equal(out, want) and total == pytest.approx(computed, rel=1e-6)


@pytest.mark.parametrize("isa, dtype", FOCAL_VARIANTS, ids=str)
def test_extremes(kernels, isa, dtype):
    x = testing.extreme_logits(dtype)
    x = x[x.isfinite()]
    for gamma in (0.0, 2.0, 0.5):
        _, grad = oracle(x, gamma)
        _, out, _ = call_focal(kernels, isa, x, gamma)
        testing.assert_close_budget(out, 0.3 * grad, dtype, what=f"gamma {gamma}")
        for special, want in ((float("inf"), 0.3), (float("-inf"), 0.0)):
            total, out, _ = call_focal(kernels, isa, torch.full((20,), special, dtype=dtype), gamma)
            assert torch.allclose(out.double(), torch.tensor(want, dtype=torch.float64), rtol=2**-8, atol=1e-30)
            assert total == float("inf") if special > 0 else total < 1e-30
    total, out, _ = call_focal(kernels, isa, torch.tensor([1.0, float("nan"), 2.0] * 30, dtype=dtype), 2.0)
    assert total != total and out.isnan().sum() == 30


def call_softmax(kernels, isa, x, target, scale, order=None, out=None, stream=False):
    rows = target.numel()
    loss = torch.full((rows,), float("nan"), dtype=torch.float64)
    tensors = (x, out, target, scale.double(), order, loss)
    pointers = [ctypes.c_void_p(0 if t is None else t.data_ptr()) for t in tensors]
    i64 = ctypes.c_int64
    kernels.softmax(
        *(isa, DTYPES.index(x.dtype), *pointers[:2], i64(x.shape[0]), i64(x.shape[1])),
        *(*pointers[2:5], i64(rows), pointers[5], int(stream)),
    )
    return loss


@pytest.mark.parametrize("columns", (1, 2, 3, 7, 15, 16, 17, 33, 63, 64, 65, 81, 1204))
@pytest.mark.parametrize("offset, spread", ((0.0, 3.0), (60.0, 3.0), (0.0, 60.0)))
@pytest.mark.parametrize("isa, dtype", VARIANTS, ids=str)
def test_softmax(kernels, isa, dtype, offset, spread, columns):
    """Without and with a shift by the rows' maxima; some rows ignored; all rows, and rows in another order."""
    g = torch.Generator().manual_seed(2)
    rows = 70
    x = (torch.randn(rows, columns, generator=g) * spread + offset).to(dtype)
    target, scale = torch.randint(0, columns, (rows,), generator=g), torch.rand(rows, generator=g) + 0.1
    target[5::9] = -1
    wide = x.double().requires_grad_()
    each = F.cross_entropy(wide, target, reduction="none", ignore_index=-1)
    (want,) = torch.autograd.grad(each @ scale.double(), wide)
    out = torch.full_like(x, float("nan"))
    loss = call_softmax(kernels, isa, x, target, scale, out=out)
    hot = F.one_hot(target.clamp(min=0), columns) * (target >= 0)[:, None]
    testing.assert_close_budget(loss, each, torch.float32, floor=0.1, what="losses")
    testing.assert_close_budget(out, want, dtype, floor=testing.FLOOR + hot * scale[:, None].double(), what="gradient")
    streamed = torch.full_like(x, float("nan"))
    assert torch.equal(call_softmax(kernels, isa, x, target, scale, out=streamed, stream=True), loss)
    assert torch.equal(streamed, out)
    order = torch.tensor([69, 68, 3, 3, 0, 41])
    loss = call_softmax(kernels, isa, x, target[order].contiguous(), scale, order)
    testing.assert_close_budget(loss, each[order], torch.float32, floor=0.1, what="losses of some rows")


@pytest.mark.parametrize("isa, dtype", VARIANTS, ids=str)
def test_softmax_of_rows_without_a_finite_loss(kernels, isa, dtype):
    """They announce themselves, and their neighbours do not notice."""
    x = (torch.randn(40, 21, generator=torch.Generator().manual_seed(3)) * 3).to(dtype)
    target, scale = torch.arange(40) % 21, torch.ones(40)
    x[3, 20] = x[11, 11] = float("nan")
    x[12, 0] = float("inf")
    x[20] = x[0, 9] = x[21, 0] = float("-inf")  # a whole row, one that is not the target, the target
    target[21] = 0
    bad = torch.zeros(40, dtype=torch.bool)
    bad[torch.tensor([3, 11, 12, 20, 21])] = True
    wide = x[~bad].double().requires_grad_()
    each = F.cross_entropy(wide, target[~bad], reduction="none")
    (want,) = torch.autograd.grad(each.sum(), wide)
    out = torch.full_like(x, float("nan"))
    loss = call_softmax(kernels, isa, x, target, scale, out=out)
    assert torch.equal(loss.isfinite(), ~bad)
    testing.assert_close_budget(loss[~bad], each, torch.float32, floor=0.1, what="losses")
    floor = testing.FLOOR + F.one_hot(target[~bad], 21).double()
    testing.assert_close_budget(out[~bad], want, dtype, floor=floor, what="gradient")


@pytest.mark.parametrize("kind", ("random", "grid"))
@pytest.mark.parametrize("count", (1, 15, 16, 33, 128))
def test_matching(kernels, kind, count):
    """A block's decisions, largest IoUs and their anchors, to the bit. Boxes far away are culled."""
    i64, f32, pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    whole, places = -(-count // 16) * 16, 21
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        anchors, boxes = testing_matching.draw_boxes(g, kind, count), testing_matching.draw_boxes(g, kind, places)
        boxes[::3] += torch.tensor([400.0, 0, 400, 0])
        iou = box_iou(boxes, anchors)
        want = testing_matching.torchvision_matches(anchors, [boxes], 0.5, 0.25, False, False)[0]
        memory = torch.cat((anchors, anchors[-1:].expand(whole - count, 4))).contiguous()
        matched, top = torch.empty(count, dtype=torch.int64), torch.zeros(places)
        hits = torch.zeros(places, whole, dtype=torch.uint8)
        tensors = [pointer(t.data_ptr()) for t in (memory, boxes, matched, top, hits)]
        listed = kernels.match(
            *(tensors[0], i64(count), i64(whole), tensors[1], i64(places), f32(0.5), f32(0.25)), *tensors[2:]
        )
        assert torch.equal(matched, want) and torch.equal(top, iou.amax(1))
        assert torch.equal(hits[:, :count].bool(), (iou == top[:, None]) & (top[:, None] > 0))
        assert int((top > 0).sum()) <= listed <= places - 7
    memory[0, 2] = memory[0, 0]
    assert kernels.match(
        *(tensors[0], i64(count), i64(whole), tensors[1], i64(places), f32(0.5), f32(0.25)), *tensors[2:]
    ) == -1  # fmt: skip


def call_boxes(kernels, function, a, b, *, box_coder="delta", beta=0.1, lambda_=1.5):
    """(out, losses, balances); the coder's weights are 10, 10, 5, 5."""
    rows, columns = len(a), 1 if function in ("iou", "delta_iou") else 4
    out, terms = torch.full((rows, columns), float("nan"), dtype=a.dtype), torch.zeros(2, rows, dtype=torch.float64)
    i64, f64, pointer = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
    kernels.box_rows(
        *(
            ("decode", "encode", "iou", "delta_iou", "smooth_l1").index(function),
            (*DTYPES, torch.float64).index(a.dtype),
        ),
        *(pointer(a.data_ptr()), pointer(b.data_ptr()), i64(rows), int(box_coder == "fovea")),
        *(f64(beta), f64(lambda_), pointer(out.data_ptr()), pointer(terms.data_ptr())),
    )
    return out.squeeze(1) if columns == 1 else out, *terms


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("rows", (1, 7, 8, 9, 64, 131))
def test_boxes(kernels, rows, dtype):
    """Coders, IoU and smooth L1 of rows, ends of vectors and tiles among them."""
    g = torch.Generator().manual_seed(rows)
    corner, size = torch.rand(rows, 2, generator=g) * 20, torch.rand(rows, 2, generator=g) * 9 + 1
    anchors = torch.cat((corner, corner + size), 1).to(dtype)
    boxes = torch.cat((corner - 0.5, corner + size * 0.7), 1).to(dtype)
    pred = torch.randn(rows, 4, generator=g).to(dtype)
    target = (pred.float() + torch.randn(rows, 4, generator=g) * 0.5).to(dtype)
    a, b, p, t = (x.double() for x in (anchors, boxes, pred, target))
    coder = {"weights": (10.0, 10.0, 5.0, 5.0), "backend": "reference"}
    for name in ("delta", "fovea"):
        o = {**coder, "box_coder": name}
        for function, given, want in (
            ("decode", (pred, anchors), ik.decode_boxes(p, a, **o)),
            ("encode", (boxes, anchors), ik.encode_boxes(b, a, **o)),
            ("delta_iou", (pred, target), ik.delta_iou(p, t, **o)),
        ):
            out = call_boxes(kernels, function, *given, box_coder=name)[0]
            testing.assert_close_budget(out, want, dtype, floor=1e-12, what=f"{function}, {name}")
    want = ik.paired_box_iou(b, a, backend="reference")
    testing.assert_close_budget(call_boxes(kernels, "iou", boxes, anchors)[0], want, dtype, what="iou")
    for beta, lambda_ in ((0.1, 1.5), (0.0, 0.0), (0.5, 0.8)):
        grad, loss, balance = call_boxes(kernels, "smooth_l1", pred, target, beta=beta, lambda_=lambda_)
        leaf = p.clone().requires_grad_()
        each = F.smooth_l1_loss(leaf, t, beta=beta, reduction="none").sum(1)
        (want,) = torch.autograd.grad(each.sum(), leaf)
        weight = ik.delta_iou(p, t, **coder) ** lambda_ if lambda_ else torch.ones(rows, dtype=torch.float64)
        testing.assert_close_budget(grad, want, dtype, floor=1e-12, what="gradient")
        testing.assert_close_budget(loss, each.detach(), torch.float64, what="losses")
        testing.assert_close_budget(balance, weight, torch.float64, what="balances")
