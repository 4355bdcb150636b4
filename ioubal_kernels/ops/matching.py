"""Matching of anchors and cells with gt boxes: integers, without gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import library
from .autograd import refuse_transforms
from .library import op
from .workspace import matching_workspace

_MAX_LISTED = 64  # images whose boxes come as a list; kMaxImages of csrc/cuda


def _tensors(given: Tensor | Sequence[Tensor] | None) -> Sequence[Tensor]:
    return () if given is None else (given,) if isinstance(given, Tensor) else given


def _listed(
    gt_boxes: Tensor | Sequence[Tensor], gt_labels: Tensor | Sequence[Tensor] | None, backend: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Boxes, and labels or no tensor at all, as the ops take them: a list over images, or one padded tensor."""
    if isinstance(gt_boxes, Tensor):
        return [gt_boxes.detach().contiguous()], [] if gt_labels is None else [gt_labels.contiguous()]
    boxes = [b.detach().contiguous() for b in gt_boxes]
    labels = [] if gt_labels is None else [t.contiguous() for t in gt_labels]
    if backend == "cpu" or len(boxes) <= _MAX_LISTED:
        return boxes, labels
    pad = torch.nn.utils.rnn.pad_sequence
    return [pad(boxes, True, torch.nan)], [pad(labels, True, -1)] if labels else []


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
    backend: str | None = None,
) -> Tensor:
    """Index (N, R) of each anchor's box, -1 or -2; see ``functional_matching.match_anchors``."""
    refuse_transforms("match_anchors", constants=(anchors, *_tensors(gt_boxes), *_tensors(gt_labels)))
    backend = backend or library.backend_of(anchors)
    anchors = anchors.detach().contiguous()
    boxes, labels = _listed(gt_boxes, gt_labels, backend)
    out = torch.empty((len(gt_boxes), anchors.shape[-2]), dtype=dtype, device=anchors.device)
    places = boxes[0].shape[1] if boxes and boxes[0].ndim == 3 else max([0, *(b.shape[0] for b in boxes)])
    workspace = matching_workspace(backend, anchors.shape, len(gt_boxes), places, anchors.device)
    op("match_anchors", backend)(
        anchors, boxes, labels, float(high), float(low), allow_low_quality, force_best, out, workspace
    )
    return out


def match_fovea(
    gt_boxes: Tensor | Sequence[Tensor],
    gt_labels: Tensor | Sequence[Tensor] | None,
    *,
    level_shapes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    scale_ranges: Sequence[tuple[float, float]],
    sigma: float,
    dtype: torch.dtype,
    backend: str | None = None,
) -> Tensor:
    """Index (N, R) of each cell's box or -1; see ``functional_matching.match_fovea``."""
    first = gt_boxes if isinstance(gt_boxes, Tensor) else next(iter(gt_boxes), torch.empty(0))
    refuse_transforms("match_fovea", constants=(*_tensors(gt_boxes), *_tensors(gt_labels)))
    backend = backend or library.backend_of(first)
    boxes, labels = _listed(gt_boxes, gt_labels, backend)
    heights, widths = [int(h) for h, _ in level_shapes], [int(w) for _, w in level_shapes]
    rows = sum(h * w for h, w in zip(heights, widths, strict=True))
    out = torch.empty((len(gt_boxes), rows), dtype=dtype, device=first.device)
    smallest, largest = [float(s) for s, _ in scale_ranges], [float(s) for _, s in scale_ranges]
    op("match_fovea", backend)(
        boxes, labels, heights, widths, [int(s) for s in strides], smallest, largest, float(sigma), out
    )
    return out
