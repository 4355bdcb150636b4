"""The benchmarked heads: RetinaNet at 800 x 1333 pixels, 200,700 anchors an image, 80 classes unless told otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ioubal_kernels import testing

Levels = Sequence[tuple[int, int]]
CLASSES, PER_LOCATION = 80, 9
ANCHORS = 200700
SMALL_LEVELS = ((4, 4), (2, 2))  # of a dry run
MIDDLE_LEVELS = ((25, 42), (13, 21), (7, 11))


def anchors_of(levels: Levels) -> int:
    """Anchors of an image."""
    return PER_LOCATION * sum(h * w for h, w in levels)


def retinanet_inputs(
    dtype: torch.dtype, layout: str, seed: int, small: bool = False, images: int = 1, device: str = "cpu"
) -> testing.DetectionInputs:
    """About 300 positives and 1,000 ignored anchors an image, logits around -4.6 as usual at the start; float32 deltas.

    The logits are drawn on their device: on a GPU the same seed gives other numbers than on the CPU, but always the
    same ones.
    """
    levels = SMALL_LEVELS if small else testing.RETINANET_LEVELS
    return with_logits(targets(seed, levels, images, device), dtype, layout, seed)


def targets(
    seed: int,
    levels: Levels,
    images: int,
    device: str,
    index_dtype: torch.dtype = torch.int64,
    classes: int = CLASSES,
    positive_share: float = 300 / ANCHORS,
) -> testing.DetectionInputs:
    """The inputs without their logits, flat, in float32: what the dtypes and layouts of a batch share."""
    flat = testing.detection_inputs(
        seed=seed,
        images=images,
        classes=1,  # logits of the wanted size come later
        per_location=PER_LOCATION,
        levels=levels,
        positive_share=positive_share,
        ignored_share=1000 / ANCHORS,
        max_boxes=10,
        index_dtype=index_dtype,
        device=device,
    )
    generator = torch.Generator().manual_seed(seed)
    flat.gt_labels = [torch.randint(0, classes, t.shape, generator=generator).to(t) for t in flat.gt_labels]
    return flat


def with_logits(
    flat: testing.DetectionInputs,
    dtype: torch.dtype,
    layout: str,
    seed: int,
    delta_dtype: torch.dtype = torch.float32,
    classes: int = CLASSES,
) -> testing.DetectionInputs:
    """`targets` with logits and deltas of these dtypes and this layout, which require gradients."""
    device = flat.bbox_deltas.device
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.empty((*flat.bbox_deltas.shape[:2], classes), device=device)
    logits.normal_(-4.6, 1.5, generator=generator)
    heads = replace(flat, cls_logits=logits.to(dtype), bbox_deltas=flat.bbox_deltas.to(delta_dtype))
    return heads.in_layout(layout).requiring_grad()


def grid_anchors(levels: Levels, device: str) -> torch.Tensor:
    """RetinaNet's anchors of levels with strides 8, 16, ...: three sizes and three aspect ratios a location, (R, 4)."""
    found = []
    for level, (height, width) in enumerate(levels):
        stride = 8 << level
        sizes = [4 * stride * 2 ** (octave / 3) for octave in range(3)]
        shapes = torch.tensor([(size / ratio**0.5, size * ratio**0.5) for ratio in (0.5, 1.0, 2.0) for size in sizes])
        base = torch.cat((-shapes, shapes), 1) / 2
        y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
        centres = torch.stack((x, y, x, y), -1).reshape(-1, 1, 4)
        found.append((centres + base).reshape(-1, 4))
    return torch.cat(found).to(device)


def draw_boxes(seed: int, images: int, boxes: int, device: str) -> list[torch.Tensor]:
    """So many boxes in each 1333 x 800 image, of sizes from 16 to 400 pixels, small ones as frequent as large ones."""
    g = torch.Generator().manual_seed(seed)
    size = 16 * 25 ** torch.rand(images, boxes, 2, generator=g)
    centre = torch.rand(images, boxes, 2, generator=g) * torch.tensor([1333.0, 800.0])
    corners = torch.cat((centre - size / 2, centre + size / 2), 2).clamp(min=0)
    corners = torch.minimum(corners, torch.tensor([1333.0, 800.0, 1333.0, 800.0]))
    return [each.to(device) for each in corners]
