"""Tensors that end at a page which must not be touched, and start after one: an access beyond is a crash."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ioubal_kernels.testing import DetectionInputs

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _protect(address: int) -> None:
    if _libc.mprotect(address, PAGE, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


def storage(count: int, dtype: torch.dtype, fill: int | None = None) -> Tensor:
    """A flat tensor between two guard pages that ends at the second; fill: of every byte."""
    size = count * dtype.itemsize
    if size == 0:
        return torch.empty(0, dtype=dtype)
    inner = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, inner + 2 * PAGE)  # lives as long as the tensor; unmapped with its guards
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _protect(start)
    _protect(start + PAGE + inner)
    tensor = torch.frombuffer(memory, dtype=dtype, count=count, offset=PAGE + inner - size)
    if fill is not None:
        tensor.view(torch.uint8).fill_(fill)
    return tensor


def empty(shape: Any, strides: Any, dtype: torch.dtype) -> Tensor:
    """Of any layout, filled with NaN: what is not written shows."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides)) if all(shape) else 0
    return storage(span, dtype, 0xFF).as_strided(tuple(shape), tuple(strides))


def guarded(t: Tensor) -> Tensor:
    """The same values and strides."""
    return empty(t.shape, t.stride(), t.dtype).copy_(t.detach())


def guarded_inputs(inputs: DetectionInputs) -> DetectionInputs:
    def each(value: Any) -> Any:
        return guarded(value) if isinstance(value, Tensor) else [guarded(t) for t in value]

    return replace(inputs, **{f.name: each(getattr(inputs, f.name)) for f in fields(inputs)[:6]})


_empty_like = torch.empty_like


def empty_like(t: Tensor, **options: Any) -> Tensor:
    """In place of torch.empty_like: the gradient buffers are guarded, too."""
    like = _empty_like(t, **options)
    return empty(like.shape, like.stride(), like.dtype) if like.device.type == "cpu" else like


def workspace(doubles: int, floats: int, device: torch.device) -> list[Tensor]:
    """In place of the workspace's allocation."""
    return [storage(doubles + floats // 2 + 16, torch.float64, 0xFF)]
