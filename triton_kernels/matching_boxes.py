"""What matching of anchors and of cells share: gt boxes of an image, and sets of them as bits."""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import pick, pointer_at
from ._math import NO_LABEL, is_padding

LANES = 32  # boxes tested at once: bits of an int32
REGISTERS = 72  # what the pairs need without spilling: 28 programs of one warp per multiprocessor


@triton.jit
def load_corners(start, row, mask):
    """x1 y1 x2 y2 of boxes in float32, one access each."""
    at = (4 * row)[:, None] + tl.arange(0, 4)[None, :]
    four = tl.load(start + at, mask=mask[:, None], other=0.0).to(tl.float32)
    first, second = tl.split(four.reshape((row.shape[0], 2, 2)))
    b0, b2 = tl.split(first)
    b1, b3 = tl.split(second)
    return b0, b1, b2, b3


@triton.jit
def gt_of(gt, image, BOX_T: tl.constexpr, LABEL_T: tl.constexpr, PADDED: tl.constexpr):
    """An image's boxes and labels, and how many places it has."""
    if PADDED:
        count = tl.cast(pick(gt.counts, 0), tl.int32)
        first = tl.cast(image, tl.int64) * count
        return pointer_at(gt.boxes, 0, BOX_T) + 4 * first, pointer_at(gt.labels, 0, LABEL_T) + first, count
    else:
        count = tl.cast(pick(gt.counts, image), tl.int32)
        return pointer_at(gt.boxes, image, BOX_T), pointer_at(gt.labels, image, LABEL_T), count


@triton.jit
def load_gt(boxes, labels, at, count, LABELED: tl.constexpr):
    """Boxes, and which of the places hold one."""
    inside = at < count
    b0, b1, b2, b3 = load_corners(boxes, at, inside)
    valid = inside & (is_padding(b0, b1, b2, b3) == 0)
    if LABELED:
        valid = valid & (tl.load(labels + at, mask=inside, other=NO_LABEL) != NO_LABEL)
    return b0, b1, b2, b3, valid


@triton.jit
def bits_of(mask):
    """The lanes of a mask of 32 as bits of an integer."""
    return tl.xor_sum(tl.where(mask, 1 << tl.arange(0, mask.shape[0]), 0), 0)


@triton.jit
def lowest(bits):
    """Number of the lowest bit that is set: the exponent of that bit alone, as a float32."""
    return ((bits & -bits).to(tl.float32).to(tl.int32, bitcast=True) >> 23 & 0xFF) - 127
