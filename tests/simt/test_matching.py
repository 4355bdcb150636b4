"""What the CUDA kernels of matching promise beyond decisions: launches, order, memory, values nobody has checked."""

import matching_cases
import pytest
import torch
from matching_cases import RULES, check_anchors, check_cells, grid_anchors

import ioubal_kernels as ik
from ioubal_kernels import testing_matching
from ioubal_kernels.ops import library, workspace

pytestmark = pytest.mark.usefixtures("kernels")

LEVELS = {"level_shapes": ((9, 7), (4, 4)), "strides": (8, 16), "scale_ranges": ((0, 64), (32, 1000))}
NAN = float("nan")


def listed_boxes(images, count=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [testing_matching.draw_boxes(g, "random", count - image % 3) for image in range(images)]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("form", ("list", "padded", "no boxes", "own anchors"))
def test_three_launches_for_the_whole_batch(kernels, form, rule):
    """Two where only thresholds decide: the boxes, the decisions; a third for what needs every box's best anchor."""
    boxes, anchors = listed_boxes(17), grid_anchors(((9, 9), (4, 4)))
    if form == "padded":
        boxes = testing_matching.padded_boxes(boxes)
    elif form == "no boxes":
        boxes = [b[:0] for b in boxes]
    elif form == "own anchors":
        anchors = anchors.expand(17, -1, 4)
    before = kernels.launches
    got = ik.match_anchors(anchors, boxes, **rule, backend="cpu")
    second = rule["allow_low_quality"] or rule["force_best"]
    assert kernels.launches - before == (1 if form == "no boxes" else 3 if second else 2)
    assert torch.equal(got, ik.match_anchors(anchors, boxes, **rule, backend="reference"))


def test_one_launch_for_all_cells(kernels):
    boxes = listed_boxes(5)
    before = kernels.launches
    got = ik.match_fovea(boxes, **LEVELS, backend="cpu")
    assert kernels.launches - before == 1
    assert torch.equal(got, ik.match_fovea(boxes, **LEVELS, backend="reference"))


@pytest.mark.parametrize("kind", ("grid", "nested", "infinite"))
def test_the_same_in_any_order_of_threads(kernels, kind):
    """Which warps look again depends on the order in which they ran; what they decide does not. Ties everywhere."""
    g = torch.Generator().manual_seed(4)
    anchors = testing_matching.draw_boxes(g, kind, 700)
    boxes = [testing_matching.draw_boxes(g, kind, n) for n in (40, 3, 0, 9, 33)]
    for rule in RULES:
        want = ik.match_anchors(anchors, boxes, **rule, backend="reference")
        for seed in range(6):
            kernels.seed(seed)
            got = ik.match_anchors(anchors, boxes, **rule, backend="cpu")
            assert torch.equal(got, want), f"{rule}, seed {seed}"


@pytest.mark.parametrize("images", (64, 65, 130))
def test_many_images_with_listed_boxes(images):
    """A launch takes the boxes of 64 images by pointer; more are padded."""
    boxes, anchors = listed_boxes(images), grid_anchors(((5, 5),))
    labels = [torch.arange(len(b)) % 3 - 1 for b in boxes]
    for arguments in ({"gt_boxes": boxes}, {"gt_boxes": boxes, "gt_labels": labels}):
        check_anchors(anchors, arguments, f"{images} images", force_best=True)
        check_cells(arguments, f"{images} images", **LEVELS)


@pytest.mark.parametrize("label", (-2, -3, 99, 2**31 - 1, -(2**31), 2**40))
def test_unchecked_labels(label):
    """Only -1 says that there is no box; the class itself is not looked at."""
    labels = torch.full((2, 8), label, dtype=torch.int64 if label == 2**40 else torch.int32)
    labels[:, ::3] = -1
    arguments = {"gt_boxes": testing_matching.padded_boxes(listed_boxes(2)), "gt_labels": labels}
    got = check_anchors(grid_anchors(((6, 6),)), arguments, f"label {label}")
    assert set(got.unique().tolist()) & {1, 2, 4, 5}
    assert not set(got.unique().tolist()) & {0, 3, 6, 7}
    check_cells(arguments, f"label {label}", **LEVELS)


def test_unchecked_coordinates(monkeypatch):
    """A NaN in a list is no box, at any coordinate; NaN anchors are above every number, the first one of all."""
    monkeypatch.setenv("IOUBAL_CHECK", "0")
    anchors = grid_anchors(((8, 8), (3, 3)))
    for place, bad in ((place, bad) for place in range(4) for bad in (NAN, float("inf"), -float("inf"), 3e38, -3e38)):
        boxes = listed_boxes(2)
        boxes[0][2, place] = boxes[1][0, place] = bad
        odd = anchors.clone()
        odd[50, place] = odd[51, place] = odd[-1, place] = bad
        for rule in RULES:
            check_anchors(anchors, {"gt_boxes": boxes}, f"a box with {bad} at {place}", **rule)
            check_anchors(odd, {"gt_boxes": boxes}, f"boxes and anchors with {bad} at {place}", **rule)
        check_cells({"gt_boxes": boxes}, f"a box with {bad} at {place}", **LEVELS)


def test_nothing_to_match():
    """No images, no anchors, no boxes, no levels: results of the right shape, background where there is any."""
    anchors, boxes = grid_anchors(((3, 3),)), listed_boxes(2)
    for given, gt in ((anchors[:0], boxes), (anchors, []), (anchors[None][:0], torch.zeros(0, 3, 4))):
        check_anchors(given, {"gt_boxes": gt}, "nothing")
    for gt in ([b[:0] for b in boxes], torch.zeros(2, 0, 4), torch.full((2, 3, 4), NAN)):
        for options in ({}, {"force_best": True}, {"high": 0.0, "low": 0.0}):
            assert bool((check_anchors(anchors, {"gt_boxes": gt}, "no boxes", **options) == -1).all())
        assert bool((check_cells({"gt_boxes": gt}, "no boxes", **LEVELS) == -1).all())
    assert check_cells({"gt_boxes": boxes}, "no levels", level_shapes=(), strides=(), scale_ranges=()).shape == (2, 0)


def test_dtypes_of_their_own():
    """Anchors and boxes may each have a 16-bit dtype; both are converted before anything is computed."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    anchors, boxes = grid_anchors(((7, 9), (2, 2))) + 0.3, listed_boxes(3)
    for a, b in ((a, b) for a in dtypes for b in dtypes):
        for offset in (0, 1, 2):
            given = matching_cases.cases.placed(anchors.to(a), offset)
            check_anchors(given, {"gt_boxes": [x.to(b) for x in boxes]}, f"{a} at {offset}, {b}", force_best=True)


def test_what_the_launchers_refuse(monkeypatch):
    """float64, whose decisions float32 cannot make; more levels than a launch takes; a workspace that is too small."""
    anchors, boxes = grid_anchors(((4, 4),)), listed_boxes(2)
    numbers = (0.5, 0.4, True, False, torch.empty(2, len(anchors), dtype=torch.int64), [torch.empty(99).double()])
    call = library.op("match_anchors", "simt")
    with pytest.raises(RuntimeError, match="match_anchors: anchors must be float32, .* got float64"):
        call(anchors.double(), boxes, [], *numbers)
    with pytest.raises(RuntimeError, match="match_anchors: gt_boxes must be .* got float64"):
        call(anchors, [b.double() for b in boxes], [], *numbers)
    with pytest.raises(RuntimeError, match="match_fovea: gt_boxes must be .* got float64"):
        ik.match_fovea([b.double() for b in boxes], **LEVELS, backend="cpu")
    many = {"level_shapes": ((1, 1),) * 17, "strides": (8,) * 17, "scale_ranges": ((0, 9),) * 17}
    with pytest.raises(RuntimeError, match="match_fovea: at most 16 levels, got 17"):
        ik.match_fovea(boxes, **many, backend="cpu")
    whole = workspace._tensor
    monkeypatch.setattr(workspace, "_tensor", lambda *size: [whole(*size)[0][:4].clone()])
    with pytest.raises(RuntimeError, match="workspace is too small"):
        ik.match_anchors(anchors, boxes, backend="cpu")
