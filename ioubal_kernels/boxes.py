"""Box coders and IoU in plain PyTorch: any float dtype, differentiable, no checks.

Boxes are ``x1 y1 x2 y2`` with width ``x2 - x1``. Half precision inputs are computed in float32; results are float32,
or float64 as soon as one input is float64.

``delta`` coder (R-CNN): ``dx = wx * (cx - cxa) / wa``, ``dw = ww * log(w / wa)``, likewise y and h.
``fovea`` coder (FoveaBox): the anchor is a box around the cell's centre with the level's base size; the deltas are
``weight * log(distance / base)`` of the distances from the centre to the left, top, right and bottom side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BACKGROUND = -1
"""int: the label, or matched index, of an anchor that matches no box. Its entries are negatives."""
IGNORE = -2
"""int: the label, or matched index, of an anchor that takes no part: no loss, no gradient, whatever its values."""
BOX_CODERS = ("delta", "fovea")
UNIT_WEIGHTS = (1.0, 1.0, 1.0, 1.0)

# Predicted log-sizes are clamped before exp, so that an untrained head cannot overflow (torchvision's and
# MMDetection's bound).
LOG_SIZE_LIMIT = math.log(1000.0 / 16.0)
# FoveaBox clamps a target's distance over the base size to this range before the logarithm.
FOVEA_MIN, FOVEA_MAX = 1.0 / 16.0, 16.0


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 if a tensor is float64, else float32."""
    for t in tensors:
        if t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def decode(
    deltas: Tensor, anchors: Tensor, weights: Sequence[float] = UNIT_WEIGHTS, box_coder: str = "delta"
) -> Tensor:
    """Boxes (..., 4) of deltas (..., 4) relative to anchors (..., 4). Differentiable in both; log-sizes are clamped."""
    dtype = result_dtype(deltas, anchors)
    x1, y1, x2, y2 = anchors.to(dtype).unbind(-1)
    d0, d1, d2, d3 = _unweighted(deltas.to(dtype), weights)
    width, height = x2 - x1, y2 - y1
    cx, cy = x1 + 0.5 * width, y1 + 0.5 * height
    if box_coder == "fovea":
        left, top, right, bottom = (_exp(d) for d in (d0, d1, d2, d3))
        return torch.stack((cx - left * width, cy - top * height, cx + right * width, cy + bottom * height), dim=-1)
    cx, cy = cx + d0 * width, cy + d1 * height
    half_w, half_h = 0.5 * _exp(d2) * width, 0.5 * _exp(d3) * height
    return torch.stack((cx - half_w, cy - half_h, cx + half_w, cy + half_h), dim=-1)


def encode(boxes: Tensor, anchors: Tensor, weights: Sequence[float] = UNIT_WEIGHTS, box_coder: str = "delta") -> Tensor:
    """Deltas (..., 4) that ``decode`` turns into boxes (..., 4). Without area: infinite or NaN deltas."""
    dtype = result_dtype(boxes, anchors)
    bx1, by1, bx2, by2 = boxes.to(dtype).unbind(-1)
    ax1, ay1, ax2, ay2 = anchors.to(dtype).unbind(-1)
    width, height = ax2 - ax1, ay2 - ay1
    cx, cy = ax1 + 0.5 * width, ay1 + 0.5 * height
    if box_coder == "fovea":
        ratios = ((cx - bx1) / width, (cy - by1) / height, (bx2 - cx) / width, (by2 - cy) / height)
        deltas = [torch.log(r.clamp(FOVEA_MIN, FOVEA_MAX)) for r in ratios]
    else:
        bw, bh = bx2 - bx1, by2 - by1
        deltas = [
            (bx1 + 0.5 * bw - cx) / width,
            (by1 + 0.5 * bh - cy) / height,
            torch.log(bw / width),
            torch.log(bh / height),
        ]
    return torch.stack([d if w == 1.0 else d * w for d, w in zip(deltas, weights, strict=True)], dim=-1)


def paired_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU (...) of aligned boxes (..., 4). Inverted boxes have no area; two boxes without area: IoU 0. No gradient."""
    dtype = result_dtype(boxes1, boxes2)
    ax1, ay1, ax2, ay2 = boxes1.detach().to(dtype).unbind(-1)
    bx1, by1, bx2, by2 = boxes2.detach().to(dtype).unbind(-1)
    overlap_w = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    overlap_h = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    area1 = (ax2 - ax1).clamp(min=0) * (ay2 - ay1).clamp(min=0)
    area2 = (bx2 - bx1).clamp(min=0) * (by2 - by1).clamp(min=0)
    overlap = overlap_w * overlap_h
    return _ratio(overlap, area1 + area2 - overlap)


def delta_iou(
    pred_deltas: Tensor, target_deltas: Tensor, weights: Sequence[float] = UNIT_WEIGHTS, box_coder: str = "delta"
) -> Tensor:
    """IoU (...) of the two boxes that deltas (..., 4) and (..., 4) decode to on any one anchor. No gradient.

    Decoding shifts and scales each axis, and IoU is invariant to both, so the anchor cancels out.
    """
    dtype = result_dtype(pred_deltas, target_deltas)
    p0, p1, p2, p3 = _unweighted(pred_deltas.detach().to(dtype), weights)
    t0, t1, t2, t3 = _unweighted(target_deltas.detach().to(dtype), weights)
    if box_coder == "fovea":
        p0, p1, p2, p3, t0, t1, t2, t3 = (_exp(d) for d in (p0, p1, p2, p3, t0, t1, t2, t3))
        overlap = (torch.minimum(p0, t0) + torch.minimum(p2, t2)) * (torch.minimum(p1, t1) + torch.minimum(p3, t3))
        return _ratio(overlap, (p0 + p2) * (p1 + p3) + (t0 + t2) * (t1 + t3) - overlap)
    pw, ph, tw, th = _exp(p2), _exp(p3), _exp(t2), _exp(t3)
    overlap = _overlap(p0 - t0, pw, tw) * _overlap(p1 - t1, ph, th)
    return _ratio(overlap, pw * ph + tw * th - overlap)


def _overlap(shift: Tensor, width1: Tensor, width2: Tensor) -> Tensor:
    """Overlap of two intervals whose centres are `shift` apart."""
    return torch.minimum(torch.minimum(width1, width2), 0.5 * (width1 + width2) - shift.abs()).clamp(min=0)


def _ratio(overlap: Tensor, union: Tensor) -> Tensor:
    # union == 0 rather than union <= 0: a NaN coordinate must stay visible.
    empty = union == 0
    return torch.where(empty, 0.0, overlap / torch.where(empty, 1.0, union))


def _unweighted(deltas: Tensor, weights: Sequence[float]) -> tuple[Tensor, ...]:
    return tuple(d if w == 1.0 else d / w for d, w in zip(deltas.unbind(-1), weights, strict=True))


def _exp(log_size: Tensor) -> Tensor:
    return torch.exp(log_size.clamp(-LOG_SIZE_LIMIT, LOG_SIZE_LIMIT))
