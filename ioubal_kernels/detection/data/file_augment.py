"""SSD's augmentation, which changes the image as it is in the file, before it gets the network's size.

torchvision's random classes draw from torch's global generator. They run with a state of that generator made from the
sample's own random numbers, which is put back: a sample depends on (seed, epoch, index) only and nobody else's numbers
are used up.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .records import ImageRecord
from .transforms import TransformConfig, mean_colour

MAX_CANVAS_PIXELS = 64_000_000
"""`zoom_out` makes no larger canvas; a photograph of 4 megapixels can be enlarged four times on each side."""

_MIN_CROP_SIDE = 8


class _Distort(v2.RandomPhotometricDistort):
    """Contrast around a mean that is summed in integers: torchvision's float mean depends on the number of threads."""

    def _call_kernel(self, functional: Any, inpt: Any, *args: Any, **kwargs: Any) -> Any:
        if functional is not F.adjust_contrast:
            return super()._call_kernel(functional, inpt, *args, **kwargs)
        factor = kwargs["contrast_factor"]
        grey = F.rgb_to_grayscale_image(inpt.as_subclass(torch.Tensor))
        mean = int(grey.sum(dtype=torch.int64)) / grey.numel()
        blended = inpt.as_subclass(torch.Tensor).to(torch.float32) * factor + (1 - factor) * mean
        return tv_tensors.wrap(blended.clamp_(0, 255).to(torch.uint8), like=inpt)


def augment_file(
    image: torch.Tensor, record: ImageRecord, config: TransformConfig, rng: random.Random
) -> tuple[torch.Tensor, ImageRecord]:
    """Distorts, enlarges and crops one image.

    Args:
        image: uint8 (3, H, W), as in the file; not written.
        record: its annotations. Crowd and difficult boxes are left out of the result.
        config: `photometric`, `zoom_out`, `iou_crop`, and the mean to fill with.
        rng: the numbers of this sample; as many are drawn whatever is switched on.

    Returns:
        image uint8 (3, H', W') and a record of its size with the boxes that are left, in its pixels, and their labels.
    """
    wants_crop = rng.random() < config.iou_crop
    seeds = [rng.getrandbits(63) for _ in range(3)]
    labels = torch.from_numpy(record.train_labels)
    sample: tuple[torch.Tensor, torch.Tensor] = (
        tv_tensors.Image(image),
        tv_tensors.BoundingBoxes(torch.from_numpy(record.train_boxes), format="XYXY", canvas_size=image.shape[-2:]),
    )
    # Not torch.manual_seed: it would also set the generators of every GPU, which nothing puts back.
    with torch.random.fork_rng(devices=[]):
        if config.photometric > 0:
            torch.default_generator.manual_seed(seeds[0])
            sample = (_Distort(p=config.photometric)(sample[0]), sample[1])
        if config.zoom_out > 0:
            torch.default_generator.manual_seed(seeds[1])
            largest = max(1.0, min(4.0, math.sqrt(MAX_CANVAS_PIXELS / (image.shape[1] * image.shape[2]))))
            fill = {tv_tensors.Image: mean_colour(config), "others": 0}
            sample = v2.RandomZoomOut(fill=fill, side_range=(1.0, largest), p=config.zoom_out)(*sample)
        # Without a box no crop has an overlap, and the search for one only ends by chance.
        if wants_crop and len(labels) > 0 and min(sample[0].shape[-2:]) >= _MIN_CROP_SIDE:
            torch.default_generator.manual_seed(seeds[2])
            sample = v2.RandomIoUCrop()(*sample)
    boxes = sample[1].as_subclass(torch.Tensor)
    height, width = sample[0].shape[-2:]
    boxes = torch.stack(
        [boxes[:, k].clamp(0, width if k % 2 == 0 else height) for k in range(4)], dim=1
    )  # torchvision clamps what it crops; what it only shifts is inside up to rounding
    # RandomIoUCrop gives boxes whose centre is outside no extent.
    keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    left = boxes[keep].numpy()
    none = torch.zeros(len(left), dtype=torch.bool).numpy()
    changed = replace(
        record,
        width=width,
        height=height,
        boxes=left,
        labels=labels[keep].numpy(),
        iscrowd=none,
        difficult=none,
        areas=(left[:, 2:] - left[:, :2]).prod(axis=1),
    )
    return sample[0].as_subclass(torch.Tensor), changed
