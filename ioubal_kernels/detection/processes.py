"""The processes of one training: torchrun's environment, what they agree on, and who writes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import UsageError


class Processes:
    """One process or several: `rank` of `world_size`; rank 0 writes and talks. With one, methods cost nothing."""

    def __init__(self, rank: int = 0, world_size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.world_size = rank, world_size
        self.device = device or torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.world_size > 1

    @property
    def group(self) -> str | None:
        """The losses' `process_group`."""
        return "world" if self.several else None

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes of a tensor on `device`; the same bits everywhere."""
        if self.several:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds in any process."""
        if not self.several:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)))

    def from_first(self, value: Any) -> Any:
        """The first process's value in all of them; others wait for it."""
        if not self.several:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks, in all of them."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self.several:
            self.sum(torch.zeros(1, device=self.device))

    def share_buffers(self, module: nn.Module) -> None:
        """The first process's buffers (BatchNorm's statistics) in all of them."""
        if self.several:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module whose backward averages gradients over processes; the module itself with one."""
        if not self.several:
            return module
        devices = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=devices)


def launched_as() -> tuple[int, int, int]:
    """Rank, number of processes and rank on this machine, as torchrun says; (0, 1, 0) without it.

    Raises:
        UsageError: the variables contradict each other.
    """
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, 0
    try:
        rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"train: WORLD_SIZE is set, so RANK and LOCAL_RANK must be numbers as torchrun sets them: {error}"
        ) from None
    if not 0 <= rank < size or local < 0:
        raise UsageError(f"train: expected 0 <= RANK < WORLD_SIZE and LOCAL_RANK >= 0, got {rank}, {size}, {local}")
    return rank, size, local


@contextlib.contextmanager
def started(device: torch.device, timeout: float) -> Iterator[Processes]:
    """The processes of this training, connected for as long as the block runs.

    Args:
        device: this process's.
        timeout: seconds that a process waits for the others before all give up.

    Raises:
        UsageError: the other processes cannot be reached.
    """
    rank, size, _ = launched_as()
    if size == 1:
        yield Processes(device=device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(backend, timeout=limit, device_id=device if device.type == "cuda" else None)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"train: the {size} processes could not be connected: {error}") from error
    try:
        yield Processes(rank, size, device)
    finally:
        disconnect()


def disconnect() -> None:
    """Takes the process group down, at the end of a process that trained with DDP or may have failed.

    Not a collective: after an error the other processes may be gone.
    """
    # gloo's threads take the GIL to let go of the last collective's tensors. A process group that is freed before they
    # have, with the GIL held, waits for them for ever; one that DDP keeps alive has them end in an interpreter that is
    # going, which aborts ("terminate called without an active exception"): give the GIL away for a moment.
    time.sleep(0.2)
    with contextlib.suppress(Exception):
        dist.destroy_process_group()
