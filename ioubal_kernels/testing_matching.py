"""Seeded boxes for the tests of matching: ordinary ones, and those on which careless matchers differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# What draw_boxes knows. All but "random" give ties, or IoUs of 0 / 0, or areas beyond float32.
BOX_KINDS = ("random", "grid", "empty", "nested", "inverted", "huge", "tiny", "infinite", "mixed")
_THRESHOLDS = ((0.5, 0.4), (0.7, 0.3), (0.5, 0.5), (0.0, 0.0), (1.0, 0.0), (0.3, 0.0), (0.1, 0.05), (0.2, 0.2))
# Around the ends of vectors, blocks (128) and chunks (1,024) of anchors.
_ROWS = (1, 2, 7, 15, 16, 17, 100, 127, 128, 129, 200, 257, 300, 1023, 1024, 1025, 2500)
_BOXES = (0, 1, 2, 5, 9, 17, 40)


def draw_boxes(generator: torch.Generator, kind: str, count: int) -> Tensor:
    """Boxes (count, 4) float32 of a kind: "grid" of few integer corners, "empty" the same with zero sides too, "nested"
    squares around one centre, "inverted" ones, "huge" up to 1e38, "tiny" ones whose area underflows, "infinite" with
    some infinite coordinates, "mixed" one of these after the other."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator).float()

    if kind == "random":
        corner = uniform(count, 2) * 100
        return torch.cat((corner, corner + uniform(count, 2) * 60), 1)
    if kind in ("grid", "empty"):
        corner = integers(8, count, 2)
        return torch.cat((corner, corner + integers(5, count, 2) + (kind == "grid")), 1)
    if kind == "nested":
        half = integers(20, count, 1)
        return torch.cat((50 - half, 50 - half, 50 + half, 50 + half), 1)
    if kind == "inverted":
        return uniform(count, 4) * 100
    if kind == "huge":
        a, b = ((uniform(count, 4) - 0.5) * 10 ** (uniform(count, 1) * 76 - 37)).split(2, 1)
        return torch.cat((torch.minimum(a, b), torch.maximum(a, b)), 1)
    if kind == "tiny":
        return draw_boxes(generator, "empty", count) * 1e-21
    if kind == "infinite":
        boxes = draw_boxes(generator, "random", count)
        boxes[uniform(count, 4) < 0.1] = torch.inf
        boxes[uniform(count, 4) < 0.1] = -torch.inf
        return boxes
    if kind == "mixed":
        kinds = torch.randint(0, len(BOX_KINDS) - 1, (count,), generator=generator).tolist()
        drawn = [draw_boxes(generator, BOX_KINDS[k], 1) for k in kinds]
        return torch.cat(drawn) if drawn else torch.zeros(0, 4)
    raise ValueError(f"draw_boxes: kind must be one of {', '.join(BOX_KINDS)}, got {kind!r}")


class MatchingCase(NamedTuple):
    """Arguments of ``match_anchors``."""

    anchors: Tensor
    gt_boxes: list[Tensor]
    options: dict[str, Any]  # high, low, allow_low_quality, force_best
    what: str  # for messages


def matching_case(seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> MatchingCase:
    """A batch with everything drawn: kinds and numbers of anchors and boxes, thresholds, rules. Every tenth has a NaN
    among the anchors."""
    g = torch.Generator().manual_seed(seed)

    def pick(choices: Sequence[Any]) -> Any:
        return choices[int(torch.randint(0, len(choices), (1,), generator=g))]

    images, rows, per_image = pick((1, 2, 3)), pick(_ROWS), pick((False, False, True))
    kinds = pick(BOX_KINDS), pick(BOX_KINDS)
    anchors = draw_boxes(g, kinds[0], rows * (images if per_image else 1))
    if seed % 10 == 0:
        anchors[torch.rand(anchors.shape, generator=g) < 1 / anchors.numel()] = torch.nan
    if per_image:
        anchors = anchors.reshape(images, rows, 4)
    boxes = [draw_boxes(g, kinds[1], pick(_BOXES)).to(device, dtype) for _ in range(images)]
    high, low = pick(_THRESHOLDS)
    options = {"high": high, "low": low, "allow_low_quality": pick((True, False)), "force_best": pick((True, False))}
    what = f"case {seed}: {kinds[0]} anchors {tuple(anchors.shape)}, {kinds[1]} boxes, {options}"
    return MatchingCase(anchors.to(device, dtype), boxes, options, what)


def padded_boxes(boxes: Sequence[Tensor], extra: int = 2) -> Tensor:
    """Boxes (N, G, 4) with `extra` unused places, NaN, behind the longest list."""
    longest = max((b.shape[0] for b in boxes), default=0) + extra
    padded = torch.full((len(boxes), longest, 4), torch.nan)
    padded = padded.to(boxes[0]) if boxes else padded
    for i, each in enumerate(boxes):
        padded[i, : each.shape[0]] = each
    return padded


def torchvision_matches(
    anchors: Tensor, gt_boxes: Sequence[Tensor], high: float, low: float, allow_low_quality: bool, force_best: bool
) -> Tensor:
    """What torchvision's box_iou, Matcher and SSDMatcher decide, image by image: (N, R) int64."""
    from torchvision.models.detection._utils import Matcher
    from torchvision.ops import box_iou

    matcher = Matcher(high, low, allow_low_quality)
    result = torch.full((len(gt_boxes), anchors.shape[-2]), -1)
    for i, boxes in enumerate(gt_boxes):
        if boxes.shape[0] == 0 or anchors.shape[-2] == 0:
            continue
        quality = box_iou(boxes, anchors if anchors.ndim == 2 else anchors[i])
        result[i] = matcher(quality)
        if force_best:  # SSDMatcher's second half
            result[i][quality.max(dim=1).indices] = torch.arange(boxes.shape[0])
    return result
