"""Resizing, augmentation and normalisation of one image with its boxes; random numbers from (seed, epoch, sample) alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TransformConfig:
    """How images become network input.

    Attributes:
        size: (H, W): every image is resized to exactly this (stretched), or None.
        short_side, long_side: with `size=None`: scale so that the short side is `short_side` and the long one at most `long_side`.
        keep_ratio: with `size`: fit inside and pad right and below instead of stretching.
        size_divisor: batches are padded right and below to a multiple of this.
        hflip, vflip: probability of mirroring.
        zoom: scale jitter, 0.25 = factor in [0.75, 1.25], with crop or padding to the same size.
        jitter: strength of brightness, contrast and saturation jitter (0.1 = factors in [0.9, 1.1]); hue moves by jitter / 5.
        min_visible: a cropped box stays when at least this share of its area is left.
        mean, std: of RGB in [0, 1].
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
