"""Matching in the interpreter: torchvision's very decisions on every kind of box, and FoveaBox's cells."""

import functools

import guarded
import pytest
import torch
from triton.runtime import interpreter as triton_interpreter

import ioubal_kernels as ik
from ioubal_kernels.ops import matching
from ioubal_kernels.testing_matching import BOX_KINDS, draw_boxes, matching_case, padded_boxes, torchvision_matches

RULES = [{"allow_low_quality": q, "force_best": f} for q in (False, True) for f in (False, True)]
match_anchors = functools.partial(ik.match_anchors, backend="triton")
match_fovea = functools.partial(ik.match_fovea, backend="triton")


class GuardedTorch:
    """torch for ops.matching: results end at a guard page, too, and hold rubbish before they are written."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, shape, dtype=None, device=None):
        if shape == 0:
            return torch.empty(0)
        return guarded.storage(shape[0] * shape[1], dtype, 0x7F).view(shape)


@pytest.fixture(autouse=True)
def guard_results(monkeypatch):
    monkeypatch.setattr(matching, "torch", GuardedTorch())


def each(tensors):
    return [guarded.guarded(t) for t in tensors]


def drawn(seed, kind, rows, boxes, images=2, own=False):
    """Anchors of one kind, boxes of `kind`, as many in every image as `boxes` says."""
    g = torch.Generator().manual_seed(seed)
    other = BOX_KINDS[seed % len(BOX_KINDS)]
    anchors = draw_boxes(g, other, rows * (images if own else 1))
    anchors = anchors.reshape(images, rows, 4) if own else anchors
    return anchors, [draw_boxes(g, kind, boxes[i % len(boxes)]) for i in range(images)]


def check(anchors, boxes, *, high=0.5, low=0.4, **rule):
    """A list and padded boxes, int64 and int32, against torchvision's Matcher."""
    want = torchvision_matches(anchors.float(), [b.float() for b in boxes], high=high, low=low, **rule)
    anchors, options = guarded.guarded(anchors), {"high": high, "low": low, **rule}
    assert torch.equal(match_anchors(anchors, each(boxes), **options), want)
    padded = guarded.guarded(padded_boxes(boxes))
    got = match_anchors(anchors, padded, dtype=torch.int32, **options)
    assert got.dtype == torch.int32 and torch.equal(got.long(), want)
    return want


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("kind", BOX_KINDS)
def test_parity(kind, rule):
    """Anchors of another kind each time; an image without boxes; blocks that are not full."""
    turn = BOX_KINDS.index(kind) * 4 + RULES.index(rule)
    high, low = ((0.5, 0.4), (0.3, 0.0), (0.0, 0.0), (0.2, 0.2))[(turn + turn // 4) % 4]
    anchors, boxes = drawn(turn, kind, (150, 128, 7)[turn % 3], (4, 0) if turn % 2 else (3, 2), own=turn % 5 == 0)
    check(anchors, boxes, high=high, low=low, **rule)


@pytest.mark.parametrize("seed", range(40))
def test_parity_of_drawn_batches(seed):
    case = matching_case(seed)
    anchors = case.anchors[..., :400, :]
    check(anchors, case.gt_boxes, **case.options)


def grid_anchors(height, width, stride=8):
    """Three anchors per location, in the usual order."""
    y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
    half = torch.tensor([[16.0, 16], [11, 23], [23, 11]])
    shift = torch.stack((x, y, x, y), -1).reshape(-1, 1, 4)
    return (shift + torch.cat((-half, half), 1)).reshape(-1, 4)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_parity_where_blocks_are_culled(rule):
    """Anchors as detectors have them, boxes that touch few blocks, ties across blocks, irregular boxes and blocks."""
    anchors = grid_anchors(16, 16)
    corner = torch.tensor([[10.0, 8], [100, 90], [100, 90], [64, 64], [3, 120], [16, 16]])
    boxes = torch.cat((corner, corner + torch.tensor([[30.0, 34], [12, 15], [12, 15], [32, 32], [90, 9], [0, 0]])), 1)
    want = check(anchors, [boxes, boxes[3:4]], **rule)
    assert len(want.unique()) > 3
    check(anchors, [boxes[:5], boxes[:0]], **rule)
    odd = boxes.clone()
    odd[1, 2], odd[2, 3] = -50.0, torch.inf
    anchors[300, 2] = anchors[300, 0]
    anchors[500] = torch.tensor([40.0, 40, 30, 30])
    check(anchors, [odd, boxes[:2] + 1000], **rule)


@pytest.mark.parametrize("count", (31, 32, 33, 65))
def test_more_boxes_than_lanes(count):
    anchors, boxes = drawn(3, "random", 5, (count, 1))
    anchors[4] = boxes[0][count - 1]
    want = check(anchors, boxes, allow_low_quality=True, force_best=True)
    assert want[0, 4] == count - 1
    check(anchors, boxes, allow_low_quality=True, force_best=False)


@pytest.mark.parametrize("index", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_parity_of_padded_places_and_dtypes(dtype, index, monkeypatch):
    """Places without a box anywhere, by NaN or by a label of -1; anchors and boxes of any dtype, and of two."""
    monkeypatch.setenv("IOUBAL_CHECK", "0")  # a NaN in a list is an error where values are checked
    for seed in (1, 2):
        anchors, boxes = drawn(seed, ("grid", "random")[seed % 2], 40, (33, 3), own=seed == 1)
        boxes, anchors = [b.to(dtype) for b in boxes], anchors if index is torch.int32 else anchors.to(dtype)
        padded = padded_boxes(boxes)
        padded[:, ::3] = torch.nan
        labels = torch.arange(padded.shape[1]).expand(2, -1) % 5 - 1
        for gt_labels in (None, labels.to(index).contiguous()):
            options = {"allow_low_quality": seed == 1, "force_best": True, "dtype": index}
            want = ik.match_anchors(anchors, padded, gt_labels=gt_labels, backend="reference", **options)
            gt = guarded.guarded(padded), None if gt_labels is None else guarded.guarded(gt_labels)
            assert torch.equal(match_anchors(guarded.guarded(anchors), gt[0], gt_labels=gt[1], **options), want)
            listed = each(padded), None if gt_labels is None else each(gt_labels)
            assert torch.equal(match_anchors(anchors, listed[0], gt_labels=listed[1], **options), want)


def test_the_iou_is_torchvisions_to_the_last_bit():
    """A threshold set to an anchor's very IoU matches it, the next number does not."""
    g = torch.Generator().manual_seed(3)
    anchors, box = draw_boxes(g, "random", 40), torch.tensor([[20.3, 17.7, 71.9, 80.1]])
    iou = ik.paired_box_iou(anchors, box.expand(40, 4).contiguous(), backend="reference")
    for row in iou.argsort(descending=True)[:4].tolist():
        value, above = float(iou[row]), float(torch.nextafter(iou[row], torch.tensor(2.0)))
        assert match_anchors(anchors, [box], high=value, low=0.0, allow_low_quality=False)[0, row] == 0
        assert match_anchors(anchors, [box], high=above, low=above, allow_low_quality=False)[0, row] == -1


def test_nothing_there():
    anchors, box = torch.rand(5, 4), torch.rand(2, 4)
    assert match_anchors(anchors[:0], [box, box]).shape == (2, 0)
    assert match_anchors(anchors, []).shape == (0, 5)
    nothing = {"strides": (), "scale_ranges": ()}
    assert match_fovea([box], [], **nothing).shape == (1, 0) and match_fovea([], [], **nothing).shape == (0, 0)
    assert match_fovea([box], [(0, 3)], strides=(8,), scale_ranges=((1, 2),)).shape == (1, 0)
    for empty in ([box[:0]] * 2, torch.zeros(2, 0, 4), torch.full((2, 3, 4), torch.nan)):
        for options in ({}, {"high": 0.5, "low": 0.0}, {"high": 0.0, "low": 0.0, "force_best": True}):
            assert (match_anchors(anchors, empty, **options) == -1).all()
        assert (match_fovea(empty, [(2, 3)], strides=(8,), scale_ranges=((0, 1e9),)) == -1).all()


def test_more_images_than_addresses():
    anchors = grid_anchors(3, 3)
    boxes = [anchors[i % 27 : i % 27 + i % 2] + 1 for i in range(66)]
    assert torch.equal(match_anchors(anchors, boxes), ik.match_anchors(anchors, boxes, backend="reference"))


def test_float64_is_refused():
    with pytest.raises(TypeError, match="float64"):
        match_anchors(torch.rand(5, 4).double(), [torch.rand(2, 4)])
    with pytest.raises(TypeError, match="float64"):
        match_fovea([torch.rand(2, 4).double()], [(2, 2)], strides=(8,), scale_ranges=((1, 2),))


def test_launches(monkeypatch):
    """Three at most for any batch, two where no box's largest IoU matters, one for cells."""
    launches, launch = [], triton_interpreter.GridExecutor.__call__
    monkeypatch.setattr(
        triton_interpreter.GridExecutor,
        "__call__",
        lambda *a, **k: (launches.append(a[0].fn.__name__), launch(*a, **k)),
    )
    anchors, boxes = drawn(3, "random", 20, (3,), images=3)
    for rule, count in zip(RULES, (2, 3, 3, 3), strict=True):
        launches.clear()
        match_anchors(anchors, boxes, **rule)
        assert len(launches) == count
    launches.clear()
    match_fovea(boxes, [(2, 3), (1, 2)], strides=(8, 16), scale_ranges=((1, 64), (32, 128)))
    assert len(launches) == 1


# ----------------------------------------------------------------------------------------------- FoveaBox

SHAPES = [(13, 17), (0, 4), (5, 8), (1, 1)]
STRIDES, RANGES = (8, 16, 32, 64), ((1, 64), (16, 128), (64, 1e9), (0, 2e19))


def fovea_boxes(seed, count):
    g = torch.Generator().manual_seed(seed)
    corner = torch.randint(-50, 140, (count, 2), generator=g).float()
    side = torch.randint(0, 90, (count, 2), generator=g) * torch.rand(count, 1, generator=g)
    boxes = torch.cat((corner, corner + side), 1)
    return (boxes / 16).round() * 16 if seed % 2 else boxes  # ties, and bounds that are met exactly


@pytest.mark.parametrize(
    "dtype, sigma",
    ((torch.float32, 0.4), (torch.float32, 0.7), (torch.bfloat16, 0.7), (torch.float16, 1.0), (torch.float32, 1.0)),
    ids=str,
)
def test_fovea_parity(dtype, sigma):
    options = {"strides": STRIDES, "scale_ranges": RANGES, "sigma": sigma}
    for seed, counts in enumerate(((6, 0), (9, 1), (33, 2))):
        boxes = [fovea_boxes(3 * seed + i, count).to(dtype) for i, count in enumerate(counts)]
        want = ik.match_fovea(boxes, SHAPES, backend="reference", **options)
        assert len(want.unique()) > 3
        assert torch.equal(match_fovea(each(boxes), SHAPES, **options), want)
        padded = padded_boxes(boxes)
        labels = (torch.arange(padded.shape[1]).expand(2, -1) % 4 - 1).int().contiguous()
        options["dtype"] = torch.int32
        want = ik.match_fovea(padded, SHAPES, gt_labels=labels, backend="reference", **options)
        got = match_fovea(guarded.guarded(padded), SHAPES, gt_labels=guarded.guarded(labels), **options)
        assert torch.equal(got, want)
        del options["dtype"]


@pytest.mark.parametrize("kind", BOX_KINDS)
def test_fovea_parity_of_all_kinds(kind):
    g = torch.Generator().manual_seed(5)
    boxes = [draw_boxes(g, kind, 7), draw_boxes(g, kind, 3)]
    options = {"strides": STRIDES, "scale_ranges": RANGES}
    want = ik.match_fovea(boxes, SHAPES, backend="reference", **options)
    assert torch.equal(match_fovea(each(boxes), SHAPES, **options), want)


def test_compiled_without_a_graph_break(monkeypatch):
    monkeypatch.undo()  # Dynamo does not trace the guarded allocations
    anchors, boxes = drawn(3, "random", 30, (3, 2))
    padded = padded_boxes(boxes)

    def matches(anchors, padded):
        cells = match_fovea(padded, [(2, 3)], strides=(8,), scale_ranges=((1, 64),))
        return match_anchors(anchors, padded, force_best=True), cells

    compiled = torch.compile(matches, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(anchors, padded), matches(anchors, padded), strict=True):
        assert torch.equal(got, want)
