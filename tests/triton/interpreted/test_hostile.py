"""Bad values, extreme logits, autograd, compilation and process groups in the interpreter."""

import ctypes
import math
import mmap

import pytest
import torch
import triton
import triton.language as tl
from checks import DTYPES, check_detection, check_flat, ids
from guarded import guarded, guarded_inputs

import ioubal_kernels as ik
from ioubal_kernels import testing
from ioubal_kernels.ops.library import SCHEMAS, op
from ioubal_kernels.ops.workspace import detection_workspace, matching_workspace, rows_workspace
from ioubal_kernels.triton_kernels._launch import pack, pointer, pointer_at, unpack

focal, softmax = ik.iou_balanced_sigmoid_focal_loss, ik.iou_balanced_cross_entropy


@triton.jit
def copy_kernel(addresses, out, second):
    tl.store(out + 2, unpack(addresses[0]) != 0)
    tl.store(out, tl.load(pointer(addresses[0], tl.float32)))
    tl.store(out + 1, tl.load(pointer_at(addresses, second, tl.float32)))


def test_addresses_whose_packed_form_has_32_bits():
    """Where the heap of a Python at a fixed address lies, its numbers are between 2^31 and 2^32 once packed."""
    libc, protection = ctypes.CDLL(None), mmap.PROT_READ | mmap.PROT_WRITE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000  # and over no other memory
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    for place in range(0x8000000, 0x10000000, 0x100000):
        if (start := libc.mmap(place, mmap.PAGESIZE, protection, flags, -1, 0)) == place:
            break
    assert 2**31 <= pack(start)[0] < 2**32
    ctypes.cast(start, ctypes.POINTER(ctypes.c_float))[0] = 2.5
    out = torch.zeros(3)
    copy_kernel[(1,)](pack(start, start), out, 1)
    assert out.tolist() == [2.5, 2.5, 1.0]


@pytest.mark.parametrize("label", (-1, 0))
@pytest.mark.parametrize("gamma", (0.0, 1.0, 2.0, 0.5))
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_extreme_logits(dtype, gamma, label):
    x = testing.extreme_logits(dtype).reshape(-1, 1)
    labels, ones = torch.full((x.shape[0],), label), torch.ones(x.shape[0])
    check_flat(focal, x, labels, ones, gamma=gamma, eta=0.0, reduction="none")


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_ignored_anchors_vanish_whatever_their_logits(layout, bad):
    inputs = testing.detection_inputs(seed=3, images=1, classes=3, ignored_share=0.4)
    ignored = inputs.matched_idxs == ik.IGNORE
    inputs.cls_logits[ignored] = bad
    inputs.bbox_deltas[ignored] = bad
    used = guarded_inputs(inputs.in_layout(layout))
    for head in used.heads():
        head.requires_grad_()
    out = ik.iou_balanced_detection_loss(*used.arguments(), backend="triton")
    (out.classification + out.localization).backward()
    assert out.classification.isfinite() and out.localization.isfinite()
    assert all(head.grad.isfinite().all() for head in used.heads())


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("layout", ("flat", "nchw"))
def test_an_infinite_grad_output_leaves_ignored_anchors_at_zero(layout, inplace):
    inputs = testing.detection_inputs(seed=3, images=1, classes=3, ignored_share=0.4)
    ignored = inputs.matched_idxs == ik.IGNORE
    used = inputs.in_layout(layout).requiring_grad()
    given = used._map_heads(lambda t: t * 1)
    out = ik.iou_balanced_detection_loss(*given.arguments(), backend="triton", inplace=inplace)
    (out.classification * math.inf).backward()
    logits = used.heads()[: len(used.heads()) // 2]
    grad = logits[0].grad if layout == "flat" else testing.from_levels([x.grad for x in logits], inputs.per_location)
    assert bool((grad[ignored] == 0).all()) and bool(grad[~ignored].isinf().any())


def test_a_nan_logit_stays_in_its_row():
    inputs = testing.classification_inputs(rows=40, classes=8)
    labels = torch.full((40,), -1)
    inputs.logits[7, 3] = math.nan
    x = guarded(inputs.logits).requires_grad_()
    loss = focal(x, labels, inputs.iou, backend="triton")
    loss.backward()
    assert loss.isnan() and x.grad.isnan().sum() == 1 and x.grad[7, 3].isnan()


@pytest.mark.parametrize(
    "row", ([math.inf, 0.0, 1.0], [math.inf, math.inf, 0.0], [-math.inf] * 3, [math.nan, 0.0, 1.0])
)
@pytest.mark.parametrize("target", (0, 1, 2))
def test_softmax_limits(row, target):
    x = torch.tensor([[0.3, -1.0, 2.0], row, [0.1, 0.2, 0.3]])
    labels, iou = torch.tensor([1, target, -1]), torch.tensor([0.5, 0.5, 0.5])
    if row[1] == math.inf and target < 2:
        # The target among several +inf has no limit. The reference has a gradient of 0 beside a loss of NaN.
        x.requires_grad_()
        loss = softmax(x, labels, iou, eta=0.0, background_index=2, reduction="none", backend="triton")
        loss.sum().backward()
        assert loss.isnan().tolist() == [False, True, False] and x.grad.isnan().all(1).tolist() == [False, True, False]
        return
    check_flat(softmax, x, labels, iou, eta=0.0, background_index=2, reduction="none", floor=1.0, loss_floor=1.0)


def test_saturated_positives_beside_one_without_iou():
    """S / D would overflow float32: it is bounded."""
    for name, leaf, rest, options in testing.saturated_positives(60.0, 1e-18):
        leaf.requires_grad_()
        loss = getattr(ik, name)(leaf, *rest, **options, backend="triton")
        loss.backward()
        assert loss.isfinite() and bool(leaf.grad.isfinite().all())


@pytest.mark.parametrize("value", (7, -5, 2**31 - 1, -(2**31)))
def test_unchecked_bad_values_poison_the_loss_and_touch_nothing(value, monkeypatch):
    monkeypatch.setenv("IOUBAL_CHECK", "0")
    rows = testing.classification_inputs(rows=30, classes=5)
    labels = rows.labels.clone()
    labels[11] = value
    assert focal(guarded(rows.logits), guarded(labels), guarded(rows.iou), backend="triton").isnan()
    if value > 0:
        labels = labels.clamp(min=0)
        assert softmax(guarded(rows.logits), guarded(labels), guarded(rows.iou), backend="triton").isnan()
    scopes = rows.scope_ids.clone()
    scopes[3] = value
    given = {"scope_ids": guarded(scopes), "num_scopes": 3, "backend": "triton"}
    labels = rows.labels.clamp(min=0)
    for loss in (focal, softmax):
        assert loss(guarded(rows.logits), guarded(labels), guarded(rows.iou), **given).isnan()
    for layout in ("flat", "nchw"):
        inputs = testing.detection_inputs(seed=1, images=2, positive_share=0.4)
        inputs.matched_idxs[1, 4] = value
        used = guarded_inputs(inputs.in_layout(layout))
        for head in used.heads():
            head.requires_grad_()
        out = ik.iou_balanced_detection_loss(*used.arguments(), backend="triton")
        (out.classification + out.localization).backward()
        assert out.classification.isnan() and out.localization.isnan()


def test_second_backward_double_backward_and_no_grad():
    rows = testing.classification_inputs(rows=20, classes=4)
    x = rows.logits.clone().requires_grad_()
    loss = focal(x, rows.labels, rows.iou, backend="triton")
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(2 * loss, x, retain_graph=True)
    torch.testing.assert_close(second, 2 * first)
    (again,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        again.sum().backward()
    with torch.no_grad():
        assert torch.equal(focal(x, rows.labels, rows.iou, backend="triton"), loss)


def test_compiled_without_a_graph_break(monkeypatch):
    monkeypatch.undo()  # Dynamo does not trace the guarded allocations
    inputs = testing.detection_inputs(seed=2, images=1, classes=3)

    def step(logits, deltas):
        rest = (inputs.anchors, inputs.matched_idxs, inputs.gt_boxes, inputs.gt_labels)
        out = ik.iou_balanced_detection_loss(logits, deltas, *rest, backend="triton")
        return out.classification + out.localization

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().clone().requires_grad_() for t in (inputs.cls_logits, inputs.bbox_deltas)]
        loss = function(*leaves)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_process_group_of_one(tmp_path):
    """The sums in an op of their own, the losses from them."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        rows = testing.classification_inputs(rows=20, classes=4, softmax=True)
        pred, target = testing.delta_inputs(rows=20)
        for function, arguments in (
            (focal, (rows.logits, rows.labels, rows.iou)),
            (softmax, (rows.logits, rows.labels, rows.iou)),
            (ik.iou_balanced_smooth_l1_loss, (pred, target)),
        ):
            results = []
            for group in (None, "world"):
                x = arguments[0].clone().requires_grad_()
                loss = function(x, *arguments[1:], backend="triton", process_group=group)
                loss.backward()
                results.append((loss.detach(), x.grad))
            assert all(torch.equal(a, b) for a, b in zip(*results))
        check_detection(testing.detection_inputs(images=1), process_group="world", normalizer_scope="image")
        nothing = torch.zeros(0, 4)
        assert focal(nothing, nothing[:, 0].long(), nothing[:, 0], backend="triton", process_group="world") == 0
    finally:
        dist.destroy_process_group()


def samples():
    """One call of every op."""
    w = [1.0, 1.0, 2.0, 2.0]
    rows = testing.classification_inputs(rows=5, classes=3, softmax=True)
    pred, target = testing.delta_inputs(rows=5)
    head = (rows.labels, rows.iou, None, None, 1)
    scaling = (None, 0.0, 1.0, None, 1.0)
    for name, first, second, parameters, loss_parameters in (
        ("focal", rows.logits, head, (1.5, 0.25, 2.0), (0.0,)),
        ("cross_entropy", rows.logits, head, (0, 1.5), (0.0,)),
        ("smooth_l1", pred, (target, None, None, None, 1), (1.5, 0.11, w, False), (2.0, 0.0)),
    ):
        inputs, grad, sums = (first, *second, *parameters), torch.empty_like(first), torch.zeros(2, 4).double()
        scratch = rows_workspace("triton", name, 5, first.shape[1], 1, first.device)
        each = torch.empty_like(first) if name == "focal" else torch.empty(5)
        request = False if name == "focal" else None
        loss = (*inputs, *loss_parameters)
        yield f"{name}_sums", (*inputs, sums, scratch)
        yield f"{name}_fill", (*loss, *scaling, True, sums, torch.empty(()), [grad], scratch)
        yield f"{name}_elementwise", (*loss, request, True, sums, each, scratch)
        # After a fill: the workspace is as it left it.
        op(f"{name}_fill", "triton")(*loss, *scaling, True, sums, torch.empty(()), [grad], scratch)
        yield f"{name}_backward", (*loss, *scaling, False, sums, torch.tensor(2.0), grad, scratch)
    d = testing.detection_inputs(images=1).padded()
    inputs = (
        *([d.cls_logits], [d.bbox_deltas], d.anchors, d.matched_idxs, [d.gt_boxes], [d.gt_labels]),
        *(d.level_sizes, 0, 1.5, 0.25, 2.0, 1.5, 0.11, 0, w),
    )
    loss = (*inputs, 0.0, 3.0, False, 1.0, None, 0.0, None, 0.0, 1.0, None, 1.0)
    scratch = detection_workspace("triton", 1, d.anchors.shape[0], 3, 1, 1, 1, 1, d.anchors.device)
    grads = [torch.empty_like(d.cls_logits)], [torch.empty_like(d.bbox_deltas)]
    outputs = [torch.empty(()), torch.empty(()), torch.empty((), dtype=torch.int64), torch.empty(())]
    sums, one = torch.zeros(2, 4).double(), torch.ones(())
    yield "detection_sums", (*inputs, sums, scratch)
    yield "detection_fill", (*loss, True, sums, outputs, *grads, scratch)
    op("detection_fill", "triton")(*loss, True, sums, outputs, *grads, scratch)
    yield "detection_backward", (*loss, False, sums, one, one, *grads, scratch)
    boxes = torch.tensor([0.0, 0.0, 5.0, 5.0]) + pred
    out = torch.empty(5, 4)
    yield "decode_boxes", (pred, boxes, w, 0, out)
    yield "decode_boxes_backward", (torch.ones(5, 4), pred, boxes, w, 0, out)
    yield "encode_boxes", (boxes, boxes, w, 0, out)
    yield "paired_box_iou", (boxes, boxes, torch.empty(5))
    yield "delta_iou", (pred, target, w, 0, torch.empty(5))
    yield "rescale", ([pred.clone()], torch.tensor(2.0), None, 1.0)
    scratch = matching_workspace("triton", boxes.shape, 2, 3, boxes.device)
    listed = [boxes[:3] + 1, boxes[:2]], []
    yield "match_anchors", (boxes, *listed, 0.5, 0.4, True, True, torch.empty(2, 5, dtype=torch.int32), scratch)
    levels = ([3], [4], [8], [1.0], [64.0])
    yield "match_fovea", ([d.gt_boxes], [d.gt_labels], *levels, 0.4, torch.empty(1, 12, dtype=torch.int64))


@pytest.mark.parametrize("name", sorted(schema.split(".")[0] for schema in SCHEMAS))
def test_opcheck(name, monkeypatch):
    monkeypatch.undo()  # opcheck compares copies: ordinary allocations
    (arguments,) = (arguments for found, arguments in samples() if found == name)
    results = torch.library.opcheck(op(name, "triton"), arguments)
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4
