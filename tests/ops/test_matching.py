"""The CPU kernel of matching on every instruction set, number of threads and piece of memory."""

import pytest
import torch

import ioubal_kernels as ik
from ioubal_kernels import ops, testing_matching
from ioubal_kernels.ops.library import isa_levels, limit_isa
from ioubal_kernels.testing_matching import matching_case, padded_boxes, torchvision_matches

LEVELS = isa_levels() if not ops.load_error("cpu") else []


def retinanet_case(boxes=12, images=2):
    """Anchors in their usual order over 3 levels, 28,350 of them: several chunks of blocks."""
    anchors = []
    for stride, height, width in ((8, 50, 50), (16, 25, 24), (32, 10, 5)):
        y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
        shift = torch.stack((x, y, x, y), -1).reshape(-1, 1, 4)
        half = stride * torch.tensor([2.0, 2.5, 3.2])[:, None] * torch.tensor([[0.7, 1.4], [1, 1], [1.4, 0.7]])[:, None]
        half = half.reshape(-1, 2)
        anchors.append((shift + torch.cat((-half, half), 1)).reshape(-1, 4))
    g = torch.Generator().manual_seed(5)
    corner = [torch.rand(boxes, 2, generator=g) * 300 for _ in range(images)]
    return torch.cat(anchors), [torch.cat((c, c + 8 + torch.rand(boxes, 2, generator=g) ** 2 * 200), 1) for c in corner]


RULES = [{"allow_low_quality": q, "force_best": f} for q in (False, True) for f in (False, True)]


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_decides_as_torchvision(level):
    limit_isa(level)
    for seed in range(150):
        case = matching_case(seed)
        got = ik.match_anchors(case.anchors, case.gt_boxes, **case.options, backend="cpu")
        assert torch.equal(got, torchvision_matches(case.anchors, case.gt_boxes, **case.options)), case.what
    anchors, boxes = retinanet_case()
    for rule in RULES:
        got = ik.match_anchors(anchors, boxes, **rule, backend="cpu")
        assert torch.equal(got, torchvision_matches(anchors, boxes, high=0.5, low=0.4, **rule))


@pytest.mark.parametrize("per_image", (False, True))
def test_the_same_for_any_number_of_threads(per_image):
    anchors, boxes = retinanet_case(images=3)
    boxes[1][3] = torch.tensor([2000.0, 2000, 2010, 2010])  # no anchor overlaps it
    boxes[2][0, 2] = torch.inf
    if per_image:
        anchors = torch.stack((anchors, anchors.flip(0), anchors * 1.5))
    for rule in RULES:
        torch.set_num_threads(1)
        one = ik.match_anchors(anchors, boxes, **rule, backend="cpu")
        assert torch.equal(one, torchvision_matches(anchors, boxes, high=0.5, low=0.4, **rule))
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            assert torch.equal(ik.match_anchors(anchors, boxes, **rule, backend="cpu"), one)


def test_many_boxes_and_many_ties():
    """More boxes than fit a vector or a list of a block, all anchors alike: every anchor is the best of every box."""
    g = torch.Generator().manual_seed(9)
    boxes = testing_matching.draw_boxes(g, "random", 300)
    anchors = torch.tensor([[20.0, 20, 70, 70]]).expand(3000, 4)
    for rule in RULES:
        got = ik.match_anchors(anchors, [boxes, boxes[:1]], **rule, backend="cpu")
        assert torch.equal(got, torchvision_matches(anchors, [boxes, boxes[:1]], high=0.5, low=0.4, **rule))


@pytest.mark.parametrize("level", LEVELS)
def test_pairs_that_must_not_be_culled(level):
    """IoUs of 0 / 0 far apart: one anchor without area, anywhere in a block, and a box without; areas of 25 and -25."""
    limit_isa(level)
    regular = torch.tensor([[0.0, 0, 5, 5]]).expand(150, 4)
    empty, inverted = torch.tensor([[-90.0, -90, -90, -85]]), torch.tensor([[-90.0, -90, -95, -85]])
    options = {"high": 0.5, "low": 0.4, "allow_low_quality": False, "force_best": False}
    for place in range(150):
        anchors = regular.clone()
        anchors[place, 2 + place % 2] = 0.0
        got = ik.match_anchors(anchors, [empty], **options, backend="cpu")
        assert (got[0] == 0).nonzero().tolist() == [[place]] and torch.equal(
            got, torchvision_matches(anchors, [empty], **options)
        )
    assert (torchvision_matches(regular, [inverted], **options) == 0).all()
    assert (ik.match_anchors(regular, [inverted], **options, backend="cpu") == 0).all()


@pytest.mark.parametrize("level", LEVELS)
def test_any_alignment(level):
    limit_isa(level)
    for rows in (1, 5, 16, 127, 130, 1025):
        anchors, boxes = retinanet_case()
        anchors = anchors[1000 : 1000 + rows]
        want = torchvision_matches(anchors, boxes, high=0.5, low=0.4, allow_low_quality=True, force_best=False)
        for offset in (0, 1, 2, 3, 7):
            store = torch.full((4 * rows + offset,), torch.nan)
            store[offset:] = anchors.reshape(-1)
            shifted = store[offset:].view(rows, 4)
            assert torch.equal(ik.match_anchors(shifted, padded_boxes(boxes), backend="cpu"), want)


def test_poisoned_allocations_are_overwritten():
    anchors, boxes = retinanet_case()
    want = ik.match_anchors(anchors, boxes, backend="cpu")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(ik.match_anchors(anchors, boxes, backend="cpu"), want)
        cells = ik.match_fovea(
            [boxes[0], boxes[0][:0]], [(9, 7), (3, 0)], strides=(16, 32), scale_ranges=((0, 99),) * 2
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert int(cells.min()) == -1 and int(cells.max()) < len(boxes[0])
