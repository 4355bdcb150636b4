"""The first kernel of every focal loss: finds the positives and computes, in float64, what all else is weighted by.

A program looks through a tile of anchors, collects its positives, which cluster, and works on them side by side. It
leaves, per anchor, a code (int8: what the dense pass must know) and, at positives only, the class and the slope of the
weighted loss, so that the dense pass needs neither boxes nor a second evaluation.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ._launch import Workspace, pack, pointer

TILE = 1024  # anchors of a program
LANES = 128  # positives computed at once
PLAIN, IGNORED, POSITIVE, INVALID = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # codes


class Marks(NamedTuple):
    """Packed addresses of what is kept per anchor, in the order of matched_idxs; `code` of NCHW levels by planes."""

    code: int  # int8
    label: int  # int32, at positives: class, or -1 where it is not one
    slope: int  # float32, at positives: derivative of the loss times its IoU weight
    loss: int  # float32, at positives: the weighted loss; flat losses only
    loc_weight: int  # float32, at positives: iou^lambda, 0 without localisation loss; detection only
    listed: int  # int16: positives of a tile, by their place in it


def take_marks(memory: Workspace, anchors: int, tiles: int, *, loss: bool, location: bool) -> Marks:
    sizes = (anchors, 1), (anchors, 4), (anchors, 4), (anchors * loss, 4), (anchors * location, 4), (tiles * TILE, 2)
    return Marks(*pack(*(memory.take(count, size) for count, size in sizes)))


@triton.jit
def collect(marks, positive, TILE: tl.constexpr):
    """Lists the positives of this program's tile, in their order; returns how many there are."""
    listed = pointer(marks.listed, tl.int16) + tl.program_id(0).to(tl.int64) * TILE
    order = tl.cumsum(positive.to(tl.int32), 0) - 1
    tl.store(listed + order, tl.arange(0, TILE).to(tl.int16), mask=positive)
    tl.debug_barrier()  # read by other threads
    return tl.sum(positive.to(tl.int32), 0)


@triton.jit
def listed_at(marks, first, count, TILE: tl.constexpr, LANES: tl.constexpr):
    """Places in the tile of the positives from `first` on, and which of the lanes hold one."""
    item = first + tl.arange(0, LANES)
    mask = item < count
    listed = pointer(marks.listed, tl.int16) + tl.program_id(0).to(tl.int64) * TILE
    return tl.load(listed + item, mask=mask, other=0).to(tl.int32), mask


@triton.jit
def store_sums(sc, slot, slots, all_tiles, s0, s1, s2, s3, s4, s5, s6, s7, s8):
    """A tile's nine sums (columns as in coefficients.py), each summed over the lanes."""
    at = pointer(sc.partial, tl.float64) + tl.cast(slot, tl.int64) * all_tiles + tl.program_id(0)
    step = tl.cast(slots, tl.int64) * all_tiles
    tl.store(at, tl.sum(s0, 0))
    tl.store(at + step, tl.sum(s1, 0))
    tl.store(at + 2 * step, tl.sum(s2, 0))
    tl.store(at + 3 * step, tl.sum(s3, 0))
    tl.store(at + 4 * step, tl.sum(s4, 0))
    tl.store(at + 5 * step, tl.sum(s5, 0))
    tl.store(at + 6 * step, tl.sum(s6, 0))
    tl.store(at + 7 * step, tl.sum(s7, 0))
    tl.store(at + 8 * step, tl.sum(s8, 0))
