"""Matching of anchors and cells with gt boxes in plain PyTorch: the oracle, and the fallback on any device.

Decisions are torchvision's ``box_iou`` + ``Matcher`` (and MMDetection's ``FoveaHead``), computed in float32, or in
float64 as soon as one input is float64. All pairs are computed, but never at once: slices of anchors keep the memory
bounded. Nothing synchronises with the host or depends on values in its control flow.

A padded place (a NaN coordinate, or a label of -1) is no box. IoUs that are NaN (0 / 0 of two boxes without area,
infinite areas) count as torch's ``max`` counts them: above every number, the first one wins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import BACKGROUND, IGNORE, result_dtype

_PAIRS = 1 << 18  # pairs computed at once: about 16 MB


def match_anchors(
    anchors: Tensor,
    gt_boxes: Tensor | Sequence[Tensor],
    gt_labels: Tensor | Sequence[Tensor] | None,
    *,
    high: float,
    low: float,
    allow_low_quality: bool,
    force_best: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Index (N, R) of each anchor's box, BACKGROUND or IGNORE; see ``functional_matching.match_anchors``."""
    boxes, valid = _padded(gt_boxes, gt_labels, anchors)
    images, places = valid.shape
    rows = anchors.shape[-2]
    if images == 0 or rows == 0 or places == 0:
        return torch.full((images, rows), BACKGROUND, dtype=dtype, device=anchors.device)
    anchors = anchors.detach().to(boxes.dtype)
    slices = list(_slices(rows, images * places))

    values, indices = [], []
    best_iou = boxes.new_full((images, places), -1.0)  # of each box, over the anchors
    best_anchor = torch.zeros((images, places), dtype=torch.int64, device=boxes.device)
    for first, last in slices:
        iou = _iou(boxes, valid, anchors[..., first:last, :])
        value, index = iou.max(dim=1)
        values.append(value)
        indices.append(index)
        value, index = iou.max(dim=2)
        better = ~(value <= best_iou) & ~best_iou.isnan()
        best_anchor = torch.where(better, index + first, best_anchor)
        best_iou = torch.where(better, value, best_iou)
    value, index = torch.cat(values, 1), torch.cat(indices, 1)
    matched = torch.where(value < low, BACKGROUND, torch.where(value < high, IGNORE, index))
    if allow_low_quality:
        best = [
            ((_iou(boxes, valid, anchors[..., first:last, :]) == best_iou[:, :, None]) & valid[:, :, None]).any(1)
            for first, last in slices
        ]
        matched = torch.where(torch.cat(best, 1), index, matched)
    if force_best:
        # Where one anchor is the best of several boxes, the last of them has it.
        order = torch.where(valid, torch.arange(places, device=boxes.device), BACKGROUND)
        forced = torch.full_like(matched, BACKGROUND).scatter_reduce(1, best_anchor, order, "amax")
        matched = torch.where(forced >= 0, forced, matched)
    return torch.where(valid.any(1)[:, None], matched, BACKGROUND).to(dtype)


def match_fovea(
    gt_boxes: Tensor | Sequence[Tensor],
    gt_labels: Tensor | Sequence[Tensor] | None,
    *,
    level_shapes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    scale_ranges: Sequence[tuple[float, float]],
    sigma: float,
    dtype: torch.dtype,
) -> Tensor:
    """Index (N, R) of each cell's box or BACKGROUND; see ``functional_matching.match_fovea``."""
    boxes, valid = _padded(gt_boxes, gt_labels)
    images, places = valid.shape
    rows = sum(height * width for height, width in level_shapes)
    if images == 0 or rows == 0 or places == 0:
        return torch.full((images, rows), BACKGROUND, dtype=dtype, device=boxes.device)
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    levels = []
    for (height, width), stride, (smallest, largest) in zip(level_shapes, strides, scale_ranges, strict=True):
        if height * width == 0:
            continue
        # Areas against squared bounds: a root is not the same on every device. An infinite area is no size.
        taken = valid & (area >= smallest * smallest) & (area <= largest * largest) & area.isfinite()
        x1, y1, x2, y2 = (boxes / stride).unbind(-1)
        left, right = _shrunk(x1, x2, sigma, width)
        top, bottom = _shrunk(y1, y2, sigma, height)
        cells = []
        for first, last in _slices(height * width, images * places):
            cell = torch.arange(first, last, device=boxes.device)
            row, column = torch.div(cell, width, rounding_mode="floor"), cell % width
            inside = (left[..., None] <= column) & (column <= right[..., None])
            inside &= (top[..., None] <= row) & (row <= bottom[..., None]) & taken[..., None]
            contest = torch.where(inside, area[..., None], math.inf)
            # The smallest box has the cell; of equally small ones the last.
            index = places - 1 - contest.flip(1).min(dim=1).indices
            cells.append(torch.where(inside.any(1), index, BACKGROUND))
        levels.append(torch.cat(cells, 1))
    return torch.cat(levels, 1).to(dtype)


def _shrunk(low: Tensor, high: Tensor, sigma: float, cells: int) -> tuple[Tensor, Tensor]:
    """First and last cell whose centre lies in the box shrunk by sigma, in cells; clamped to the map."""
    half = 0.5 * (high - low)
    first = torch.ceil(low + (1 - sigma) * half - 0.5).clamp(0, cells - 1)
    last = torch.floor(low + (1 + sigma) * half - 0.5).clamp(0, cells - 1)
    return first, last


def _slices(rows: int, pairs_per_row: int) -> Iterator[tuple[int, int]]:
    step = max(_PAIRS // max(pairs_per_row, 1), 1)
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


def _iou(boxes: Tensor, valid: Tensor, anchors: Tensor) -> Tensor:
    """torchvision's IoU (N, G, C) of boxes (N, G, 4) and anchors (C, 4) or (N, C, 4), in its order of operations; -1
    where there is no box, below every IoU."""
    anchors = anchors if anchors.ndim == 3 else anchors[None]
    areas = [(b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1]) for b in (boxes, anchors)]
    boxes, anchors = boxes[:, :, None], anchors[:, None]
    sides = torch.minimum(boxes[..., 2:], anchors[..., 2:]) - torch.maximum(boxes[..., :2], anchors[..., :2])
    sides = sides.clamp(min=0)
    overlap = sides[..., 0] * sides[..., 1]
    union = areas[0][:, :, None] + areas[1][:, None] - overlap
    return torch.where(valid[:, :, None], overlap / union, -1.0)


def _padded(
    gt_boxes: Tensor | Sequence[Tensor], gt_labels: Tensor | Sequence[Tensor] | None, *others: Tensor
) -> tuple[Tensor, Tensor]:
    """Boxes (N, G, 4) in the dtype to compute in, and whether each place holds a box (N, G)."""
    if not isinstance(gt_boxes, Tensor):
        if not gt_boxes:
            device = others[0].device if others else None
            return torch.zeros((0, 0, 4), device=device), torch.zeros((0, 0), dtype=torch.bool, device=device)
        longest = max(b.shape[0] for b in gt_boxes)
        if gt_labels is not None:
            gt_labels = torch.stack([F.pad(t, (0, longest - t.shape[0]), value=BACKGROUND) for t in gt_labels])
        gt_boxes = torch.stack([F.pad(b, (0, 0, 0, longest - b.shape[0]), value=math.nan) for b in gt_boxes])
    boxes = gt_boxes.detach().to(result_dtype(gt_boxes, *others))
    valid = ~boxes.isnan().any(-1)
    return boxes, valid if gt_labels is None else valid & (gt_labels != BACKGROUND)
