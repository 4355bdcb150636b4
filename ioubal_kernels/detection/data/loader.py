"""Batches for training and evaluation: deterministic for any number of workers, resumable at any batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .records import Dataset
from .transforms import TransformConfig


@dataclass
class Batch:
    """A batch of images and their targets.

    Attributes:
        images: float32 (N, 3, H, W), normalised, zero-padded right and below to a common multiple of `size_divisor`.
        targets: N dicts: `boxes` float32 (G, 4) x1 y1 x2 y2 in pixels of `images` (boxes to train on only), `labels` int64 (G,),
            `image_id` int, `orig_size` (height, width) of the file, `size` (height, width) before padding,
            `scale` (sx, sy): network pixels per file pixel, without augmentation (see `boxes_to_original`).
        epoch: the epoch of these samples.
        bad: (path, message) of images replaced because `on_bad_image="skip"`.
    """

    images: torch.Tensor
    targets: list[dict[str, Any]]
    epoch: int = 0
    bad: tuple[tuple[str, str], ...] = ()


def boxes_to_original(boxes: torch.Tensor, target: dict[str, Any]) -> torch.Tensor:
    """Detections of an unaugmented image, (D, 4) in network pixels, as pixels of the file, clipped to it."""
    raise NotImplementedError


class TrainLoader:
    """An endless stream of training batches over epochs; `state_dict` says where it is.

    `for batch in loader` continues from the current state, for ever (the caller breaks after its number of steps). The order
    is a permutation from (seed, epoch); an epoch's incomplete last batch is left out. The state counts the batches handed
    out, not those prefetched by workers, so a resumed loader goes on with exactly the next batch, for any number of workers.

    Args:
        dataset: the split.
        transform: sizes and augmentation.
        batch_size: images per batch and rank.
        seed: of order and augmentation.
        workers: processes; 0 loads in this one.
        rank, world_size: this process takes its slice of each global batch.
        on_bad_image: "raise", or "skip": replace by another sample (the same one every time), counted in `bad_images`.
        bad_image_limit: with "skip": the share of the dataset's images that may be bad (always at least one).
        cache: "none" or "ram": keep decoded, resized images in memory (uint8).
        timeout: seconds to wait for a worker before giving up.
        max_pixels: refuse larger images before decoding.

    Raises:
        DataError: empty dataset, or fewer images than batch_size * world_size.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: TransformConfig,
        batch_size: int,
        *,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        on_bad_image: str = "raise",
        bad_image_limit: float = 0.001,
        cache: str = "none",
        timeout: float = 120.0,
        max_pixels: int = 100_000_000,
    ) -> None:
        raise NotImplementedError

    @property
    def batches_per_epoch(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Batch]:
        raise NotImplementedError

    def state_dict(self) -> dict[str, int]:
        """{"epoch", "position" (samples of the epoch already used, all ranks), "seed", "num_samples"}: plain ints."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise NotImplementedError


def eval_loader(
    dataset: Dataset,
    transform: TransformConfig,
    batch_size: int,
    *,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    on_bad_image: str = "raise",
    cache: str = "none",
    timeout: float = 120.0,
    max_pixels: int = 100_000_000,
) -> Any:
    """Every image once, in order, without augmentation: an iterable of `Batch` with `len()` (may be iterated again and again).

    Each rank gets every world_size-th image, nothing is padded or repeated. With `on_bad_image="skip"` a bad image is left out.
    """
    raise NotImplementedError
