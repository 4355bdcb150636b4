"""The first kernel of every focal loss: finds the positives and computes, in float64, what all else is weighted by.

A program looks through a tile of anchors, collects its positives, which cluster, and works on them side by side. It
leaves, per anchor, a mark (a positive's class, or that it is none) and, at positives only, the slope of the weighted
loss, so that the kernels which follow need neither the logit nor a second evaluation.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ._launch import Workspace, pack, pointer

TILE = 8192  # anchors of a program of the detection loss: all of a large batch's programs are there at once
CHUNK = 512  # of them, looked at at once; two are read together
FLAT_TILE = 2048  # rows of a program of a flat loss
LANES = 128  # positives computed at once
MOST_8, MOST_16 = tl.constexpr(128), tl.constexpr(32768)  # classes that marks of as many bits can tell apart
PLAIN, IGNORED, INVALID = tl.constexpr(-1), tl.constexpr(-2), tl.constexpr(-3)  # marks of what has no class


class Marks(NamedTuple):
    """Packed addresses of what is kept per anchor, in the order of matched_idxs; `mark` of NCHW levels by planes."""

    mark: int  # a positive's class, or one of the marks above
    slope: int  # float32, at positives: derivative of the loss times its IoU weight
    loss: int  # float32, at positives: the weighted loss; flat losses only
    listed: int  # int16: positives of a tile, by their place in it; flat losses only


def mark_size(classes: int) -> int:
    """Bytes of a mark."""
    return 1 if classes <= MOST_8.value else 2 if classes <= MOST_16.value else 4


def take_marks(memory: Workspace, anchors: int, classes: int, tiles: int, *, flat: bool) -> Marks:
    """tiles: of a flat loss, which passes through its lists more than once."""
    sizes = (anchors, mark_size(classes)), (anchors, 4), (anchors * flat, 4), (tiles * FLAT_TILE * flat, 2)
    return Marks(*pack(*(memory.take(count, size) for count, size in sizes)))


@triton.jit
def marks_at(marks, anchor, CLASSES: tl.constexpr):
    """Pointer to the marks from an anchor on."""
    if CLASSES <= MOST_8:
        return pointer(marks.mark, tl.int8) + anchor
    elif CLASSES <= MOST_16:
        return pointer(marks.mark, tl.int16) + anchor
    else:
        return pointer(marks.mark, tl.int32) + anchor


@triton.jit
def load_marks(start, at, mask):
    return tl.load(start + at, mask=mask, other=PLAIN).to(tl.int32)


@triton.jit
def store_marks(start, at, value, mask):
    tl.store(start + at, value.to(start.dtype.element_ty), mask=mask)


@triton.jit
def collect(listed, positive, TILE: tl.constexpr):
    """Lists the positives of this program's tile, in their order; returns how many there are. listed: the tile's."""
    order = tl.cumsum(positive.to(tl.int32), 0) - 1
    tl.store(listed + order, tl.arange(0, TILE).to(tl.int16), mask=positive)
    tl.debug_barrier()  # read by other threads
    return tl.sum(positive.to(tl.int32), 0)


@triton.jit
def listed_at(listed, first, count, LANES: tl.constexpr):
    """Places in the tile of the positives from `first` on, and which of the lanes hold one."""
    item = first + tl.arange(0, LANES)
    mask = item < count
    return tl.load(listed + item, mask=mask, other=0).to(tl.int32), mask


@triton.jit
def store_sums(sc, slot, slots, all_tiles, s0, s1, s2, s3, s4, s5, s6, s7, s8):
    """A tile's nine sums (columns as in coefficients.py), each summed over the lanes."""
    store_totals(
        sc, slot, slots, all_tiles, tl.sum(s0, 0), tl.sum(s1, 0), tl.sum(s2, 0), tl.sum(s3, 0), tl.sum(s4, 0),
        tl.sum(s5, 0), tl.sum(s6, 0), tl.sum(s7, 0), tl.sum(s8, 0),
    )  # fmt: skip


@triton.jit
def store_totals(sc, slot, slots, all_tiles, s0, s1, s2, s3, s4, s5, s6, s7, s8):
    """The same of sums that are scalars of the program."""
    at = pointer(sc.partial, tl.float64) + tl.cast(slot, tl.int64) * all_tiles + tl.program_id(0)
    step = tl.cast(slots, tl.int64) * all_tiles
    tl.store(at, s0)
    tl.store(at + step, s1)
    tl.store(at + 2 * step, s2)
    tl.store(at + 3 * step, s3)
    tl.store(at + 4 * step, s4)
    tl.store(at + 5 * step, s5)
    tl.store(at + 6 * step, s6)
    tl.store(at + 7 * step, s7)
    tl.store(at + 8 * step, s8)
