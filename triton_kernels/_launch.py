"""What the launchers share: numbers as kernels take them, scratch memory, tables of levels, the device.

Level tables are tuples of integers, one per level, so that one launch serves all levels. Triton compiles a kernel anew
for an integer argument of 1 and for one divisible by 16, in tuples always: ``pack`` hides both, so that sizes that
change from step to step compile nothing by themselves. How wide maps are read may depend on them, and how many go
together; each such plan is compiled once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}
# Without a limit of its own ptxas aims at more programs per multiprocessor than are of use, and spills.
MAX_REGISTERS = 128
# Options of kernels whose results are compared for equality: no product is contracted into a multiply-add.
EXACT = {"enable_fp_fusion": False}
NOWHERE = 1 << 40  # in place of an empty tensor's address, which no kernel reads; 64 bits as all others have
PARTS = tl.constexpr(9)  # the sums of a tile of positives, see positives_kernel


def pack(*values: int) -> tuple[int, ...]:
    """Integers as an argument tuple; kernels read them with ``pick`` or ``unpack``."""
    return tuple(value << 4 | 3 for value in values)


@triton.jit
def entry_of(values, i):
    """Entry i (a scalar of the program) of a packed tuple, still packed."""
    out = values[0]
    for k in tl.static_range(1, len(values)):
        out = tl.where(i >= k, values[k], out)
    return out


@triton.jit
def pick(values, i):
    """Entry i of a packed tuple."""
    return entry_of(values, i) >> 4


@triton.jit
def level_of(tile0, tile):
    """The level of a tile, by the levels' first tiles."""
    level = tl.zeros((), tl.int32)
    for k in tl.static_range(1, len(tile0)):
        level += (tile >= (tile0[k] >> 4)).to(tl.int32)
    return level


@triton.jit
def int64(value):
    """The sum changes nothing, and no compiled kernel has it. It is for Triton's interpreter: an integer argument from
    2^31 to 2^32 claims to have 64 bits there and has 32, and a shift to the right makes it negative for good."""
    return tl.cast(value, tl.int64) + tl.zeros((), tl.int64)


@triton.jit
def unpack(address):
    """A packed address as a number."""
    return int64(address) >> 4


@triton.jit
def pointer(address, T: tl.constexpr):
    """A packed address as a pointer to T."""
    return unpack(address).to(tl.pointer_type(T))


@triton.jit
def pointer_at(addresses, i, T: tl.constexpr):
    """Entry i of packed addresses as a pointer to T; that of an empty tensor may be 0, a 32-bit integer."""
    return pointer(entry_of(addresses, i), T)


@triton.jit
def number(tensor, value, GIVEN: tl.constexpr):
    """A number that is still in a tensor on the device (GIVEN), or a float64 that the host knows."""
    if GIVEN:
        return tl.load(tensor).to(tl.float64)
    return value


class Workspace:
    """Scratch memory that Python has allocated (ops/workspace.py), handed out piece by piece as packed addresses."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        if len(tensors) != 1:
            raise RuntimeError("ioubal_kernels: the Triton kernels need a workspace")
        self._at = tensors[0].data_ptr()
        self._end = self._at + tensors[0].numel() * tensors[0].element_size()

    def take(self, count: int, size: int) -> int:
        """Address of `count` elements of `size` bytes."""
        start = self._at + -self._at % 8
        self._at = start + count * size
        if self._at > self._end:
            raise RuntimeError(f"ioubal_kernels: the workspace is too small by {self._at - self._end} bytes")
        return start


class GroundTruth(NamedTuple):
    """Boxes and labels of the images, packed: one address each, or a single one of padded tensors."""

    boxes: tuple[int, ...]
    labels: tuple[int, ...]
    counts: tuple[int, ...]


def ground_truth(gt_boxes: Sequence[Tensor], gt_labels: Sequence[Tensor]) -> tuple[GroundTruth, dict[str, Any]]:
    """The table of N tensors (G_i, 4) or of one (N, G, 4), and what a kernel must know of it at compile time."""
    padded = len(gt_boxes) == 1 and gt_boxes[0].ndim == 3
    entries = power_of_two(len(gt_boxes))  # few variants to compile

    def filled(values: list[int]) -> tuple[int, ...]:
        return pack(*values, *[values[-1] if values else 0] * (entries - len(values)))

    # That of an empty tensor is 0, a 32-bit integer: each set of images without boxes would compile the kernels anew.
    truth = GroundTruth(
        filled([t.data_ptr() or NOWHERE for t in gt_boxes]),
        filled([t.data_ptr() or NOWHERE for t in gt_labels]),
        filled([t.shape[1 if padded else 0] for t in gt_boxes]),
    )
    return truth, {
        "BOX_T": TYPES[gt_boxes[0].dtype] if gt_boxes else tl.float32,
        "LABEL_T": TYPES[gt_labels[0].dtype] if gt_labels else tl.int64,
        "PADDED": padded,
    }


def cdiv(n: int, by: int) -> int:
    return -(-n // by)


def float32(x: float) -> float:
    """Rounded as a cast does, to infinity too."""
    return ctypes.c_float(x).value


def power_of_two(n: int) -> int:
    """The smallest power of two >= n, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def programs_of(tiles: int, may_skip: bool, x: Tensor, resident: int = 4) -> int:
    """Programs of a pass. One that may find that there is nothing to do is small: `resident` programs a multiprocessor,
    which loop over the tiles."""
    if not may_skip:
        return tiles
    return min(tiles, resident * _multiprocessors(x.device.index) if x.is_cuda else 2)


def on_device(x: Tensor) -> Any:
    """Makes x's device current: Triton launches there, on torch's current stream."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def gamma_case(gamma: float) -> int:
    """The constant GAMMA of ``focal_negative``."""
    return int(gamma) if gamma in (0.0, 1.0, 2.0) else -1


def widest(size: int, *numbers: int) -> int:
    """Elements of `size` bytes per access: the largest power of two, at most 16 bytes, that divides all numbers, which
    are byte addresses and distances."""
    width = 16
    for value in numbers:
        while value % width:
            width //= 2
    return max(width // size, 1)
