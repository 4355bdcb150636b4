"""The order of training samples: a pure function of (seed, epoch), cut into batches and ranks, resumable anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .records import DataError


@dataclass(frozen=True)
class Key:
    """What a worker needs to make one sample, and what the consumer needs to know where the stream is.

    `position` is the number of samples of the epoch that are used up, on all ranks, once this sample's batch has been.
    """

    epoch: int
    index: int
    position: int


def epoch_order(num_samples: int, seed: int, epoch: int) -> list[int]:
    """The permutation of an epoch."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_samples, generator=generator).tolist()


class BatchStream:
    """Endless batches of keys for one rank, from (epoch, position) on.

    An epoch is cut into global batches of batch_size * world_size samples; each rank takes its slice. What is left at
    the end of an epoch, less than a global batch, is left out.

    Args:
        num_samples: images of the dataset.
        batch_size: samples per batch and rank.
        seed: of the permutations.
        rank, world_size: the slice.

    Raises:
        DataError: fewer samples than one global batch, or an argument out of range.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
            raise DataError(
                "TrainLoader: batch_size, rank, world_size: expected batch_size >= 1 and 0 <= rank < world_size, "
                f"got {batch_size}, {rank}, {world_size}"
            )
        self.global_batch = batch_size * world_size
        if num_samples < self.global_batch:
            raise DataError(
                f"the training split: expected at least one batch of {batch_size} images for each of {world_size} "
                f"process{'es' if world_size > 1 else ''} = {self.global_batch} images, got {num_samples}; a smaller"
                " train.batch_size would do"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.epoch = 0
        self.position = 0

    @property
    def batches_per_epoch(self) -> int:
        """Complete global batches of an epoch that is read from its start."""
        return self.num_samples // self.global_batch

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, position = self.epoch, self.position
        while True:
            order = epoch_order(self.num_samples, self.seed, epoch)
            while position + self.global_batch <= self.num_samples:
                start = position + self.rank * self.batch_size
                position += self.global_batch
                yield [Key(epoch, index, position) for index in order[start : start + self.batch_size]]
            epoch, position = epoch + 1, 0
