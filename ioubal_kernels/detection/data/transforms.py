"""Resizing, augmentation and normalisation of an image with its boxes; random only in (seed, epoch, sample).

Geometry is done by the kernels of torchvision.transforms.v2; its random classes draw from torch's global generator
and are used, with a generator of their own, for SSD's augmentation of the image file only (`file_augment`).
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

from .records import DataError, ImageRecord


@dataclass(frozen=True)
class TransformConfig:
    """How images become network input.

    Attributes:
        size: (H, W): every image is resized to exactly this (stretched), or None.
        short_side, long_side: with `size=None`: scale so that the short side is `short_side` and the long one at most
            `long_side`.
        keep_ratio: with `size`: fit inside and pad right and below instead of stretching.
        size_divisor: batches are padded right and below to a multiple of this.
        hflip, vflip: probability of mirroring.
        zoom: scale jitter, 0.25 = factor in [0.75, 1.25], with crop or padding to the same size.
        jitter: strength of brightness, contrast and saturation jitter (0.1 = factors in [0.9, 1.1]); hue turns by up to
            jitter / 5 of the circle.
        min_visible: a box cropped by `zoom` stays when at least this share of its area is left.
        mean, std: of RGB in [0, 1].
        short_side_range: with `size=None`, in training: each sample's short side is drawn from these (low, high), both
            included, instead of `short_side`, which evaluation keeps.
        photometric, zoom_out, iou_crop: SSD's augmentation of the image before it is resized, in this order:
            probability of each distortion of the colours, of a canvas 1 to 4 times as large filled with the mean, of
            a crop with a smallest IoU with one of the boxes (a box stays when its centre does).

    Raises:
        DataError: a value out of range.
    """

    size: tuple[int, int] | None = (128, 128)
    short_side: int = 800
    long_side: int = 1333
    keep_ratio: bool = False
    size_divisor: int = 32
    hflip: float = 0.5
    vflip: float = 0.0
    zoom: float = 0.0
    jitter: float = 0.0
    min_visible: float = 0.3
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    short_side_range: tuple[int, int] | None = None
    photometric: float = 0.0
    zoom_out: float = 0.0
    iou_crop: float = 0.0

    @property
    def changes_file(self) -> bool:
        """Whether a training sample needs the image as it is in the file, not one already of network size."""
        return self.short_side_range is not None or max(self.photometric, self.zoom_out, self.iou_crop) > 0

    @property
    def usual_short_side(self) -> int:
        """The short side in training on average; `short_side` where none is drawn."""
        return self.short_side if self.short_side_range is None else round(sum(self.short_side_range) / 2)

    def __post_init__(self) -> None:
        limits = {"zoom": 0.9}
        for name in ("hflip", "vflip", "zoom", "jitter", "min_visible", "photometric", "zoom_out", "iou_crop"):
            high = limits.get(name, 1.0)
            value = getattr(self, name)
            if not 0.0 <= value <= high:
                raise DataError(f"TransformConfig: {name}: expected a number from 0 to {high:g}, got {value!r}")
        sides = [*(self.size or ()), self.short_side, self.long_side, self.size_divisor]
        if any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides):
            raise DataError(
                "TransformConfig: size, short_side, long_side, size_divisor: expected positive integers, got "
                f"{self.size}, {self.short_side}, {self.long_side}, {self.size_divisor}"
            )
        if self.size is not None and len(self.size) != 2:
            raise DataError(f"TransformConfig: size: expected (height, width), got {self.size!r}")
        if self.size is None and self.long_side < self.short_side:
            raise DataError(
                f"TransformConfig: long_side: expected at least short_side = {self.short_side}, got {self.long_side}"
            )
        if self.short_side_range is not None:
            low_high = tuple(self.short_side_range)
            valid = len(low_high) == 2 and all(isinstance(v, int) and not isinstance(v, bool) for v in low_high)
            if self.size is not None or not valid or not 1 <= low_high[0] <= low_high[1] <= self.long_side:
                raise DataError(
                    "TransformConfig: short_side_range: expected integers 1 <= low <= high <= long_side = "
                    f"{self.long_side} with size None, got {self.short_side_range!r} with size {self.size!r}"
                )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise DataError(
                f"TransformConfig: mean, std: expected three numbers, std > 0, got {self.mean!r}, {self.std!r}"
            )


def sample_random(seed: int, epoch: int, index: int, use: str = "") -> random.Random:
    """The random numbers of one sample in one epoch, whichever process loads it and whatever was loaded before.

    Another `use` gives other numbers, so that one kind of augmentation leaves those of the others alone.
    """
    digest = hashlib.blake2b(f"{seed}/{epoch}/{index}{use}".encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "little"))


def resized_shape(width: int, height: int, config: TransformConfig) -> tuple[int, int]:
    """(H, W) the image is resized to, before any padding."""
    if config.size is not None:
        full_height, full_width = config.size
        if not config.keep_ratio:
            return full_height, full_width
        scale = min(full_height / height, full_width / width)
        limit = config.size
    else:
        scale = min(config.short_side / min(width, height), config.long_side / max(width, height))
        limit = (config.long_side, config.long_side)
    return (
        min(limit[0], max(1, int(math.floor(height * scale + 0.5)))),
        min(limit[1], max(1, int(math.floor(width * scale + 0.5)))),
    )


def resize(pixels: np.ndarray, config: TransformConfig) -> torch.Tensor:
    """uint8 (H0, W0, 3) pixels as uint8 (3, H, W), antialiased bilinear; without the padding of `keep_ratio`."""
    return resize_image(torch.from_numpy(pixels).permute(2, 0, 1), config)


def resize_image(image: torch.Tensor, config: TransformConfig) -> torch.Tensor:
    """`resize` of uint8 (3, H0, W0)."""
    shape = resized_shape(image.shape[2], image.shape[1], config)
    return F.resize_image(image, list(shape), antialias=True).contiguous()


def augment(
    image: torch.Tensor, boxes: torch.Tensor, config: TransformConfig, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mirrors, zooms and recolours one image of network size.

    Every random number is drawn whether it is used or not, so that switching one augmentation off leaves the others
    alone.

    Args:
        image: uint8 (3, H, W).
        boxes: float32 (G, 4), x1 y1 x2 y2 in its pixels.
        config: strengths and probabilities.
        rng: from `sample_random`.

    Returns:
        image uint8 (3, H, W), boxes (G', 4) that are still visible, and which ones: bool (G,).
    """
    draws = [rng.random() for _ in range(10)]
    height, width = image.shape[-2:]
    if draws[0] < config.hflip:
        image = F.horizontal_flip_image(image)
        boxes = torch.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), dim=1)
    if draws[1] < config.vflip:
        image = F.vertical_flip_image(image)
        boxes = torch.stack((boxes[:, 0], height - boxes[:, 3], boxes[:, 2], height - boxes[:, 1]), dim=1)
    keep = torch.ones(len(boxes), dtype=torch.bool)
    if config.zoom > 0:
        image, boxes, keep = _zoom(image, boxes, 1 + config.zoom * (2 * draws[2] - 1), draws[3], draws[4], config)
    if config.jitter > 0:
        image = _recolour(image, config.jitter, draws[5:9])
    return image, boxes[keep], keep


def _zoom(
    image: torch.Tensor, boxes: torch.Tensor, factor: float, across: float, down: float, config: TransformConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales by `factor`, then crops or pads at a random place to the size it had."""
    height, width = image.shape[-2:]
    new_height, new_width = max(1, round(height * factor)), max(1, round(width * factor))
    # Enlarged: (left, top) of the crop; reduced: minus the padding.
    left = (
        math.floor(across * (new_width - width + 1))
        if new_width >= width
        else -math.floor(across * (width - new_width + 1))
    )
    top = (
        math.floor(down * (new_height - height + 1))
        if new_height >= height
        else -math.floor(down * (height - new_height + 1))
    )
    image = F.resize_image(image, [new_height, new_width], antialias=True)
    image = F.pad_image(
        image,
        [max(-left, 0), max(-top, 0), max(width - new_width + left, 0), max(height - new_height + top, 0)],
        fill=mean_colour(config),
    )
    image = F.crop_image(image, max(top, 0), max(left, 0), height, width)
    scale = boxes.new_tensor([new_width / width, new_height / height] * 2)
    moved = boxes * scale - boxes.new_tensor([left, top, left, top])
    clipped = torch.stack(
        (
            moved[:, 0].clamp(0, width),
            moved[:, 1].clamp(0, height),
            moved[:, 2].clamp(0, width),
            moved[:, 3].clamp(0, height),
        ),
        dim=1,
    )
    extent = clipped[:, 2:] - clipped[:, :2]
    area = (moved[:, 2:] - moved[:, :2]).prod(dim=1)
    keep = (extent > 0).all(dim=1) & (extent.prod(dim=1) >= config.min_visible * area)
    return image, clipped, keep


def mean_colour(config: TransformConfig) -> list[float]:
    """The colour that becomes (almost) 0 when normalised, R, G, B in 0 .. 255, whole numbers."""
    return [float(round(255 * value)) for value in config.mean]


_LUMA = (0.299, 0.587, 0.114)
_TO_YIQ = np.array([_LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])


def _recolour(image: torch.Tensor, strength: float, draws: list[float]) -> torch.Tensor:
    """Brightness, contrast, saturation and hue of uint8 (3, H, W), as one linear map of the colours.

    Not by torchvision's kernels: their contrast takes a float mean, which for large images depends on the number of
    threads (a loader worker has one), and their hue alone takes longer than everything else together.
    """
    bright, contrast, saturation = (max(0.0, 1 + strength * (2 * draw - 1)) for draw in draws[:3])
    angle = 2 * math.pi * 0.2 * strength * (2 * draws[3] - 1)
    cos, sin = math.cos(angle), math.sin(angle)
    # The chroma part (I, Q) is turned by the hue's angle and scaled by the saturation.
    turn = np.array([[1, 0, 0], [0, saturation * cos, -saturation * sin], [0, saturation * sin, saturation * cos]])
    matrix = bright * contrast * (np.linalg.inv(_TO_YIQ) @ turn @ _TO_YIQ)
    # Integer sums are exact in any order.
    sums = image.sum(dim=(1, 2), dtype=torch.int64).tolist()
    grey = sum(weight * total for weight, total in zip(_LUMA, sums)) / (image.shape[1] * image.shape[2])
    offset = bright * (1 - contrast) * grey
    red, green, blue = image.to(torch.float32)
    rows = [red * float(row[0]) + green * float(row[1]) + blue * float(row[2]) + offset for row in matrix]
    return torch.stack(rows).round_().clamp_(0, 255).to(torch.uint8)


def normalise(image: torch.Tensor, config: TransformConfig) -> torch.Tensor:
    """uint8 (3, H, W) as float32, (x / 255 - mean) / std, zero-padded right and below to `config.size` if set."""
    mean = torch.tensor(config.mean, dtype=torch.float32).view(3, 1, 1)
    std = torch.tensor(config.std, dtype=torch.float32).view(3, 1, 1)
    result = (image.to(torch.float32) / 255 - mean) / std
    if config.size is not None:
        height, width = config.size
        result = torch.nn.functional.pad(result, (0, width - result.shape[-1], 0, height - result.shape[-2]))
    return result


def prepare(
    image: torch.Tensor, record: ImageRecord, config: TransformConfig, rng: random.Random | None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """A resized image and its record as network input and target (see `Batch`); `rng` None: no augmentation.

    Args:
        image: uint8 (3, H, W) from `resize`.
        record: its annotations.
        config: normalisation and augmentation.
        rng: random numbers of this sample.
    """
    height, width = image.shape[-2:]
    scale = (width / record.width, height / record.height)
    trainable = record.trainable
    boxes = torch.from_numpy(record.boxes[trainable]) * torch.tensor([*scale, *scale], dtype=torch.float32)
    labels = torch.from_numpy(record.labels[trainable])
    if rng is not None:
        image, boxes, keep = augment(image, boxes, config, rng)
        labels = labels[keep]
    target = {
        "boxes": boxes,
        "labels": labels,
        "image_id": record.id,
        "orig_size": (record.height, record.width),
        "size": (height, width),
        "scale": scale,
    }
    return normalise(image, config), target
