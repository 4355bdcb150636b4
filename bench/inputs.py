"""The benchmarked case: RetinaNet at 800 x 1333 pixels, 200,700 anchors an image, 80 classes."""

from __future__ import annotations

from dataclasses import replace

import torch

from ioubal_kernels import testing

CLASSES, PER_LOCATION = 80, 9
ANCHORS = 200700
SMALL_LEVELS = ((4, 4), (2, 2))
SMALL_ANCHORS = PER_LOCATION * sum(h * w for h, w in SMALL_LEVELS)


def retinanet_inputs(
    dtype: torch.dtype, layout: str, seed: int, small: bool = False, images: int = 1, device: str = "cpu"
) -> testing.DetectionInputs:
    """About 300 positives and 1,000 ignored anchors an image, logits around -4.6 as usual at the start; float32 deltas.

    The logits are drawn on their device: on a GPU the same seed gives other numbers than on the CPU, but always the
    same ones.
    """
    return with_logits(targets(seed, small, images, device), dtype, layout, seed)


def targets(
    seed: int, small: bool, images: int, device: str, index_dtype: torch.dtype = torch.int64
) -> testing.DetectionInputs:
    """The inputs without their logits, flat, in float32: what the dtypes and layouts of a batch share."""
    flat = testing.detection_inputs(
        seed=seed,
        images=images,
        classes=1,  # logits of the wanted size come later
        per_location=PER_LOCATION,
        levels=SMALL_LEVELS if small else testing.RETINANET_LEVELS,
        positive_share=300 / ANCHORS,
        ignored_share=1000 / ANCHORS,
        max_boxes=10,
        index_dtype=index_dtype,
        device=device,
    )
    generator = torch.Generator().manual_seed(seed)
    flat.gt_labels = [torch.randint(0, CLASSES, t.shape, generator=generator).to(t) for t in flat.gt_labels]
    return flat


def with_logits(
    flat: testing.DetectionInputs,
    dtype: torch.dtype,
    layout: str,
    seed: int,
    delta_dtype: torch.dtype = torch.float32,
) -> testing.DetectionInputs:
    """`targets` with logits and deltas of these dtypes and this layout, which require gradients."""
    device = flat.bbox_deltas.device
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.empty((*flat.bbox_deltas.shape[:2], CLASSES), device=device)
    logits.normal_(-4.6, 1.5, generator=generator)
    heads = replace(flat, cls_logits=logits.to(dtype), bbox_deltas=flat.bbox_deltas.to(delta_dtype))
    return heads.in_layout(layout).requiring_grad()
