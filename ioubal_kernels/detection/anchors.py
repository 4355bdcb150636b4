"""Which anchor scale fits a dataset's boxes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .data import Dataset, TransformConfig
from .models.retinanet import make_anchor_generator

FITTING_IOU = 0.5
SCALE_CANDIDATES = tuple(1.0 * 2 ** (i / 4) for i in range(15))  # 1 .. 11.3 strides


class AnchorFit(NamedTuple):
    """How well anchors of one scale fit a set of boxes."""

    scale: float
    covered: float  # share of the boxes with an anchor of IoU >= 0.5, 1.0 without boxes
    mean_best_iou: float


def network_boxes(dataset: Dataset, transform: TransformConfig) -> tuple[Tensor, Tensor]:
    """The boxes to train on in pixels of the unaugmented network input (G, 4), their images' height, width (G, 2).

    Where each sample draws its short side, that input is of the middle of the range.
    """
    boxes, sizes = [np.zeros((0, 4), np.float32)], [np.zeros((0, 2), np.float32)]
    for record in dataset.records:
        if transform.size is None:
            factor = min(
                transform.usual_short_side / min(record.width, record.height),
                transform.long_side / max(record.width, record.height),
            )
            scale_x = scale_y = factor
        else:
            scale_y, scale_x = transform.size[0] / record.height, transform.size[1] / record.width
            if transform.keep_ratio:
                scale_x = scale_y = min(scale_x, scale_y)
        scaled = record.train_boxes * np.array([scale_x, scale_y, scale_x, scale_y], np.float32)
        boxes.append(scaled)
        sizes.append(np.tile(np.array([record.height * scale_y, record.width * scale_x], np.float32), (len(scaled), 1)))
    return torch.from_numpy(np.concatenate(boxes)), torch.from_numpy(np.concatenate(sizes))


def best_anchor_iou(
    boxes: Tensor, image_sizes: Tensor, strides: tuple[int, ...], octaves: tuple[float, ...], scale: float
) -> Tensor:
    """Largest IoU (G,) of each box with the anchors of the cell nearest to its centre, on every level.

    Args:
        boxes: (G, 4) in pixels of the network's input.
        image_sizes: (G, 2) height and width of each box's image there.
        strides: of the pyramid's levels.
        octaves: anchor sizes of a level, in units of the smallest.
        scale: smallest anchor edge in strides.
    """
    generator = make_anchor_generator(strides, scale, octaves)
    generator.set_cell_anchors(torch.float32, boxes.device)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    candidates = []
    for stride, cell in zip(strides, generator.cell_anchors, strict=True):
        last = ((image_sizes.flip(1) - 1) / stride).floor()
        nearest = torch.minimum((centers / stride).round().clamp(min=0), last) * stride
        candidates.append(nearest.repeat(1, 2)[:, None, :] + cell[None])
    anchors = torch.cat(candidates, dim=1)
    corner_low = torch.maximum(anchors[..., :2], boxes[:, None, :2])
    corner_high = torch.minimum(anchors[..., 2:], boxes[:, None, 2:])
    intersection = (corner_high - corner_low).clamp(min=0).prod(-1)
    areas = (anchors[..., 2:] - anchors[..., :2]).prod(-1) + (boxes[:, 2:] - boxes[:, :2]).prod(-1)[:, None]
    return (intersection / (areas - intersection)).amax(dim=1)


def anchor_fit(
    boxes: Tensor, image_sizes: Tensor, strides: tuple[int, ...], octaves: tuple[float, ...], scale: float
) -> AnchorFit:
    """Coverage of boxes (G, 4) by the anchors of one scale."""
    if boxes.shape[0] == 0:
        return AnchorFit(scale, 1.0, 0.0)
    best = best_anchor_iou(boxes, image_sizes, strides, octaves, scale)
    return AnchorFit(scale, (best >= FITTING_IOU).float().mean().item(), best.mean().item())


def choose_anchor_scale(
    boxes: Tensor, image_sizes: Tensor, strides: tuple[int, ...], octaves: tuple[float, ...]
) -> AnchorFit:
    """The scale covering most boxes; between scales that cover equally many, the one with the larger mean IoU."""
    fits = [anchor_fit(boxes, image_sizes, strides, octaves, scale) for scale in SCALE_CANDIDATES]
    return max(fits, key=lambda fit: (fit.covered, fit.mean_best_iou))
