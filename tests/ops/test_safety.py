"""Threads, memory bounds, alignment: what must hold whatever the machine does."""

import itertools
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import ioubal_kernels as ik
from ioubal_kernels import testing
from ioubal_kernels.ops.library import cpu_variants, isa_levels, limit_isa


def everything(layout):
    """Losses and gradients of every op on inputs of several blocks, as one list of tensors."""
    inputs = testing.detection_inputs(
        images=2,
        classes=80,
        per_location=9,
        levels=((40, 50), (9, 7)),
        positive_share=0.01,
        ignored_share=0.01,
        layout=layout,
    ).requiring_grad()
    out = ik.iou_balanced_detection_loss(*inputs.arguments(), normalize_loc=True)
    (out.classification + out.localization).backward()
    results = [*(t.detach() for t in out), *(t.grad for t in inputs.heads())]
    rows = testing.classification_inputs(rows=5000, classes=33, softmax=True)
    focal, softmax = ik.iou_balanced_sigmoid_focal_loss, ik.iou_balanced_cross_entropy
    for loss, dtype in ((focal, torch.float32), (focal, torch.bfloat16), (softmax, torch.float32)):
        x = rows.logits.clone().to(dtype).requires_grad_()
        value = loss(x, rows.labels, rows.iou, weight=rows.weight)
        value.backward()
        results += [value.detach(), x.grad]
    pred, target = testing.delta_inputs(rows=20000)
    pred.requires_grad_()
    value = ik.iou_balanced_smooth_l1_loss(pred, target, normalize=True)
    value.backward()
    return [*results, value.detach(), pred.grad, ik.delta_iou(pred.detach(), target)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_bitwise_the_same_for_any_number_of_threads_and_again(layout):
    for _ in cpu_variants(torch.bfloat16):
        torch.set_num_threads(1)
        one = everything(layout)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert same(everything(layout), one)
        for _ in range(3):
            assert same(everything(layout), one)


def test_from_several_python_threads():
    want, results = everything("nchw"), {}

    def work(i):
        results[i] = everything("nchw")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 4 and all(same(r, want) for r in results.values())


def test_uninitialised_memory_is_never_read():
    """With poisoned allocations every output element must still be written."""
    want = everything("channels_last")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory  # torch.empty gives NaN now
        assert same(everything("channels_last"), want)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_any_memory_any_alignment(dtype):
    inputs = testing.classification_inputs(rows=(3, 70), classes=13, dtype=dtype)
    for variant in cpu_variants(dtype):
        base = inputs.logits.clone().requires_grad_()
        want = ik.iou_balanced_sigmoid_focal_loss(base, inputs.labels, inputs.iou)
        want.backward()
        for name, other in testing.same_values_other_memory(inputs.logits):
            x = other.detach().requires_grad_()
            got = ik.iou_balanced_sigmoid_focal_loss(x, inputs.labels, inputs.iou)
            got.backward()
            assert torch.equal(x.grad, base.grad), (name, variant)
            # The float sums are grouped by the output's alignment, which the allocator decides.
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_denormals_are_restored():
    tiny = torch.tensor([1e-40])
    everything("flat")
    assert float(tiny * 0.5) > 0


GUARDED = """
import ctypes, mmap, sys, torch
import ioubal_kernels as ik
from ioubal_kernels import testing
from ioubal_kernels.ops.library import cpu_variants

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

def guarded(t, at_end):
    # t's values in memory that ends (or begins) at a page nobody may touch
    page, size = mmap.PAGESIZE, t.numel() * t.element_size()
    room = (size + page - 1) // page * page
    base = libc.mmap(None, room + 2 * page, 3, 0x22, -1, 0)
    libc.mprotect(base, page, 0)
    libc.mprotect(base + page + room, page, 0)
    start = base + page + (room - size if at_end else 0)
    if size == 0:
        return t
    buffer = (ctypes.c_char * size).from_address(start)
    flat = torch.frombuffer(buffer, dtype=t.dtype)
    out = flat.as_strided(t.shape, t.stride())
    out.copy_(t)
    return out

def op_everywhere(at_end):
    for layout in testing.LAYOUTS:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for levels in (((3, 5), (1, 1)), ((7, 11),)):
                shape = dict(classes=7, per_location=3, levels=levels)
                inputs = testing.detection_inputs(**shape, layout=layout, dtype=dtype).padded()
                place = lambda v: [guarded(t, at_end) for t in v] if isinstance(v, list) else guarded(v, at_end)
                arguments = [place(v) for v in inputs.arguments()]
                for t in (*arguments[0], *arguments[1]) if layout != "flat" else arguments[:2]:
                    t.requires_grad_()
                out = ik.iou_balanced_detection_loss(*arguments, inplace=True)  # the gradient is written there, too
                (out.classification + out.localization).backward()
    for classes in (1, 3, 16, 21):
        for rows in (1, 5, 64):
            i = testing.classification_inputs(rows=rows, classes=classes + 1, softmax=True)
            fixed = [guarded(t, at_end) for t in (i.labels, i.iou)]
            for loss in (ik.iou_balanced_sigmoid_focal_loss, ik.iou_balanced_cross_entropy):
                for reduction in ("mean", "none"):
                    loss(guarded(i.logits, at_end).requires_grad_(), *fixed, reduction=reduction).sum().backward()
    pred, target = (guarded(t, at_end) for t in testing.delta_inputs(rows=9))
    ik.iou_balanced_smooth_l1_loss(pred.requires_grad_(), target).backward()
    for boxes_op in (ik.encode_boxes, ik.decode_boxes, ik.paired_box_iou):
        boxes_op(pred.detach(), target)
    for rows in (1, 9, 64, 130):
        anchors = torch.rand(rows, 2).mul(50).repeat(1, 2) + torch.tensor([0.0, 0, 20, 20])
        for count in (1, 7, 17):
            boxes = guarded(anchors[torch.arange(count) % rows] + 1, at_end)
            ik.match_anchors(guarded(anchors, at_end), [boxes], force_best=True)
            ik.match_fovea([boxes], [(7, 9)], strides=[8], scale_ranges=[(1, 64)])

if sys.argv[1] == "probe":  # the guard itself: one element past the end must crash
    t = guarded(torch.ones(8), True)
    ctypes.cast(t.data_ptr() + 32, ctypes.POINTER(ctypes.c_float))[0]
else:
    for _ in cpu_variants(torch.bfloat16):
        op_everywhere(at_end=sys.argv[1] == "end")
    print("no access out of bounds")
"""


def run_guarded(mode):
    root = Path(__file__).resolve().parents[2]
    return subprocess.run([sys.executable, "-c", GUARDED, mode], capture_output=True, text=True, cwd=root, timeout=300)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mmap flags of Linux")
@pytest.mark.parametrize("mode", ("end", "begin"))
def test_no_access_past_protected_pages(mode):
    result = run_guarded(mode)
    assert result.returncode == 0 and "no access out of bounds" in result.stdout, result.stderr[-2000:]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mmap flags of Linux")
def test_the_guard_pages_guard():
    assert run_guarded("probe").returncode < 0


@pytest.mark.parametrize("bad", (7, 99, -3, 2**31 - 1, -(2**31), 2**40))
def test_unchecked_bad_labels_poison_the_loss_and_nothing_else(bad, monkeypatch):
    monkeypatch.setenv("IOUBAL_CHECK", "0")
    inputs = testing.classification_inputs(rows=40, classes=7)
    labels = inputs.labels.clone()
    labels[13] = bad
    assert ik.iou_balanced_sigmoid_focal_loss(inputs.logits, labels, inputs.iou).isnan()
    if bad >= 7:
        assert ik.iou_balanced_cross_entropy(inputs.logits, labels.clamp(min=0), inputs.iou).isnan()
    each = ik.iou_balanced_sigmoid_focal_loss(inputs.logits, labels, inputs.iou, reduction="none")
    assert each[13].isnan().all() and each.isnan().sum() == 7
    det = testing.detection_inputs().padded()
    det.matched_idxs = det.matched_idxs.long()
    det.matched_idxs[1, 3] = bad
    out = ik.iou_balanced_detection_loss(*det.arguments())
    assert out.classification.isnan() and out.localization.isnan()


@pytest.mark.parametrize("bits", (0x7FC00000, 0x7FC00001, 0x7FFFFFFF, 0x7F800001, -1, -0x2AAAAA))
@pytest.mark.parametrize("gamma", (0.0, 1.0, 2.0, 1.5))
def test_every_nan_stays_one(bits, gamma):
    """Also one whose low bits are set: arithmetic with integers must not make a number of it."""
    for isa, rows, label in itertools.product(isa_levels(), (8, 1000), (0, 1, -1)):
        limit_isa(isa)
        x = torch.zeros(rows, 3)
        x.view(torch.int32)[rows // 2, 1] = bits
        labels = torch.full((rows,), -1)
        labels[rows // 2] = label
        leaf = x.requires_grad_()
        loss = ik.iou_balanced_sigmoid_focal_loss(leaf, labels, torch.ones(rows), gamma=gamma)
        loss.backward()
        assert loss.isnan() and leaf.grad[rows // 2, 1].isnan() and leaf.grad.isnan().sum() == 1, (isa, rows, label)
