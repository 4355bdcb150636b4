"""Sums over the processes of a group: what the losses need of torch.distributed, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def resolve_process_group(op: str, group: Any) -> Any:
    """The group to reduce over: None stays None, ``"world"`` becomes the default group, a group is returned as it is.

    Raises ValueError for another string or when no default group exists, TypeError for anything that is not a group.
    """
    if group is None:
        return None
    dist = torch.distributed
    if isinstance(group, str):
        if group != "world":
            raise ValueError(f"{op}: process_group must be None, a process group or 'world', got {group!r}")
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                f"{op}: process_group='world' needs an initialised default group; call"
                " torch.distributed.init_process_group first, or pass process_group=None"
            )
        return dist.group.WORLD
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"{op}: process_group must be None, a process group or 'world', got {type(group).__name__}")
    return group


def world_size(group: Any) -> int:
    """Number of processes in the group, 1 without one."""
    return 1 if group is None else torch.distributed.get_world_size(group)


def all_reduce_sums(tensors: Sequence[Tensor], group: Any) -> list[Tensor]:
    """Sums of each tensor over the group, in one all-reduce. The tensors share a dtype and device; the inputs stay
    unchanged.
    """
    if group is None:
        return list(tensors)
    packed = torch.cat([t.detach().reshape(-1) for t in tensors])
    torch.distributed.all_reduce(packed, group=group)
    parts = packed.split([t.numel() for t in tensors])
    return [part.reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]
