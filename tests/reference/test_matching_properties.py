"""Properties of matching that hold whatever the boxes are, tried by hypothesis."""

import hypothesis
import torch
from hypothesis import strategies as st

import ioubal_kernels as ik
from ioubal_kernels import backends
from ioubal_kernels.testing_matching import torchvision_matches

BACKENDS = [name for name in ("cpu", "reference") if backends.unavailable_reason(name) is None]
tried = hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)

corners = st.integers(0, 12)
sides = st.integers(0, 8)
any_float = st.floats(width=32, allow_nan=False)


@st.composite
def grid_boxes(draw: st.DrawFn, smallest: int, largest: int, side: st.SearchStrategy = sides) -> torch.Tensor:
    """Integer corners: IoUs tie, sides may be 0."""
    rows = draw(st.lists(st.tuples(corners, corners, side, side), min_size=smallest, max_size=largest))
    boxes = torch.tensor([(x, y, x + w, y + h) for x, y, w, h in rows], dtype=torch.float32)
    return boxes.reshape(-1, 4)


@st.composite
def wild_boxes(draw: st.DrawFn, smallest: int, largest: int) -> torch.Tensor:
    rows = draw(st.lists(st.tuples(*[any_float] * 4), min_size=smallest, max_size=largest))
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


@st.composite
def rules(draw: st.DrawFn, force: bool = True) -> dict:
    high, low = sorted(draw(st.tuples(*[st.sampled_from((0.0, 0.1, 0.25, 0.4, 0.5, 0.7, 1.0))] * 2)), reverse=True)
    quality, best = draw(st.booleans()), force and draw(st.booleans())
    return {"high": high, "low": low, "allow_low_quality": quality, "force_best": best}


some_anchors, some_boxes = grid_boxes(1, 40), grid_boxes(1, 8)


def match(anchors: torch.Tensor, boxes: object, **options: object) -> torch.Tensor:
    """The backends' common answer."""
    first, *others = (ik.match_anchors(anchors, boxes, **options, backend=name) for name in BACKENDS)
    assert all(torch.equal(first, other) for other in others)
    return first


@tried
@hypothesis.given(st.one_of(wild_boxes(1, 20), some_anchors), st.one_of(wild_boxes(0, 6), some_boxes), rules())
def test_any_floats_decide_as_torchvision(anchors: torch.Tensor, boxes: torch.Tensor, rule: dict) -> None:
    assert torch.equal(match(anchors, [boxes], **rule), torchvision_matches(anchors, [boxes], **rule))


@tried
@hypothesis.given(some_anchors, st.lists(grid_boxes(0, 6), min_size=1, max_size=4), rules())
def test_an_image_does_not_see_the_others(anchors: torch.Tensor, boxes: list, rule: dict) -> None:
    together = match(anchors, boxes, **rule)
    assert torch.equal(together, torch.cat([match(anchors, [b], **rule) for b in boxes]))
    assert torch.equal(together, match(anchors.expand(len(boxes), -1, 4), boxes, **rule))


@tried
@hypothesis.given(some_anchors, some_boxes, rules(force=False), st.randoms(use_true_random=False))
def test_the_order_of_anchors_is_the_order_of_the_result(
    anchors: torch.Tensor, boxes: torch.Tensor, rule: dict, random: object
) -> None:
    order = torch.tensor(random.sample(range(len(anchors)), len(anchors)))
    assert torch.equal(match(anchors[order], [boxes], **rule), match(anchors, [boxes], **rule)[:, order])


@tried
@hypothesis.given(
    grid_boxes(1, 40, st.integers(1, 8)), grid_boxes(1, 8, st.integers(1, 8)), rules(force=False),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_the_order_of_boxes_decides_ties_only(
    anchors: torch.Tensor, boxes: torch.Tensor, rule: dict, random: object
) -> None:
    order = torch.tensor(random.sample(range(len(boxes)), len(boxes)))
    before, after = match(anchors, [boxes], **rule)[0], match(anchors, [boxes[order]], **rule)[0]
    assert torch.equal(before.clamp(max=0), after.clamp(max=0))
    at = before >= 0
    first, second = (ik.paired_box_iou(b[m[at]], anchors[at]) for b, m in ((boxes, before), (boxes[order], after)))
    assert torch.equal(first, second)


@tried
@hypothesis.given(some_anchors, some_boxes, rules(force=False))
def test_duplicates_change_nothing(anchors: torch.Tensor, boxes: torch.Tensor, rule: dict) -> None:
    assert torch.equal(match(anchors, [torch.cat((boxes, boxes))], **rule), match(anchors, [boxes], **rule))


@tried
@hypothesis.given(some_anchors, some_boxes, rules())
def test_a_box_far_away_changes_nothing_by_the_thresholds(
    anchors: torch.Tensor, boxes: torch.Tensor, rule: dict
) -> None:
    rule = {**rule, "allow_low_quality": False, "force_best": False}
    far = torch.tensor([[1e4, 1e4, 1e4 + 5, 1e4 + 7]])
    want = match(anchors, [boxes], **rule)
    assert torch.equal(match(anchors, [torch.cat((boxes, far))], **rule), want)
    low_quality = match(anchors, [torch.cat((boxes, far))], **{**rule, "allow_low_quality": True})
    assert (low_quality >= 0).all()


@tried
@hypothesis.given(some_anchors, some_boxes, rules(), st.integers(-60, 60), st.integers(-1000, 1000))
def test_scaling_by_a_power_of_two_and_moving_by_whole_pixels(
    anchors: torch.Tensor, boxes: torch.Tensor, rule: dict, power: int, shift: int
) -> None:
    want = match(anchors, [boxes], **rule)
    assert torch.equal(match((anchors + shift), [boxes + shift], **rule), want)
    assert torch.equal(match(anchors * 2.0**power, [boxes * 2.0**power], **rule), want)


@tried
@hypothesis.given(some_anchors, some_boxes, rules())
def test_axes_may_be_swapped(anchors: torch.Tensor, boxes: torch.Tensor, rule: dict) -> None:
    swap = [1, 0, 3, 2]
    assert torch.equal(match(anchors[:, swap], [boxes[:, swap]], **rule), match(anchors, [boxes], **rule))


@tried
@hypothesis.given(
    grid_boxes(1, 40, st.integers(1, 8)), grid_boxes(1, 8, st.integers(1, 8)), st.sampled_from((0.3, 0.5, 0.7))
)
def test_every_box_has_an_anchor(anchors: torch.Tensor, boxes: torch.Tensor, high: float) -> None:
    """Forced, every box that shares its best anchor with no later box is matched; restored, its best anchors are."""
    forced = match(anchors, [boxes], high=high, low=high, allow_low_quality=False, force_best=True)[0]
    assert len(boxes) - 1 in forced.tolist()
    restored = match(anchors, [boxes], high=high, low=0.1)[0]
    iou = torch.stack([ik.paired_box_iou(b.expand_as(anchors), anchors) for b in boxes])
    assert (restored[(iou == iou.amax(1, keepdim=True)).any(0)] >= 0).all()
