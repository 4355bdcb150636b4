"""The second kernel of every loss: from the positives' sums to the coefficients of the dense pass, and to what is known
of the losses by then. And the end of the softmax pass: the sum of its tiles.

Sums run in a fixed order, so that every run gives the same bits: the only atomic operation is the integer counter by
which the program that finishes last knows that it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._launch import PARTS, Workspace, cdiv, level_of, pack, pick, pointer, pointer_at, unpack
from ._math import normalizer, weighted_loss

# Columns of a tile's sums, and of row 0 and the scopes' rows of the tensor `sums` (csrc/common/sums.h).
COUNT, IOU, BAD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
CLS_PLAIN, CLS_WEIGHTED, CLS_LOSS = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
LOC_PLAIN, LOC_WEIGHTED, LOC_LOSS = tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)
BATCH, LEVEL, IMAGE, BY_ID = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # normalizer scopes
BLOCK = 128
ZERO_WORDS = tl.constexpr(4096)  # of a program


class Scratch(NamedTuple):
    """Packed addresses of what the kernels of a loss hand to each other."""

    partial: int  # float64 (PARTS, slots, tiles): sums of the positives, tile by tile
    segment: int  # float64 (PARTS, segments): summed over the tiles of a (level, image) or of a scope
    negative: int  # float32 per image: factor of the negatives' loss
    positive: int  # float32 per image: factor of the positives' loss
    location: int  # float32 per image: factor of the localisation loss
    cls_norm: int  # float32 per scope: normaliser of Eq. 4
    loc_norm: int  # float32 per scope: normaliser of Eq. 7, or 1
    positives_loss: int  # float32: what is added to the sum of the dense pass's tiles
    tickets: int  # int32: programs that have finished, of the coefficients' kernel and of the softmax pass


def take_scratch(memory: Workspace, tiles: int, slots: int, segments: int, images: int, scopes: int) -> Scratch:
    parts = PARTS.value
    sizes = ((parts * tiles * slots, 8), (parts * segments, 8), *[(images, 4)] * 3, *[(scopes, 4)] * 2, (1, 4), (2, 4))
    return Scratch(*pack(*(memory.take(count, size) for count, size in sizes)))


@triton.jit
def clear_tickets(sc):
    """By the positives' kernel: the passes that follow count from 0."""
    if tl.program_id(0) == 0:
        tl.store(pointer(sc.tickets, tl.int32) + tl.arange(0, 2), tl.zeros((2,), tl.int32))


@triton.jit
def is_last(ticket, programs):
    """Whether this is the last of so many programs to arrive here; all that the others wrote before is visible then."""
    tl.debug_barrier()  # every thread's stores come before the one that counts
    return tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1


@triton.jit
def divisor_of(tensor, value, image, mask, standard, GIVEN: tl.constexpr):
    """Divisor of an image's loss. GIVEN: 0 a number (0: the default), 1 a tensor of one number, 2 one per image."""
    if GIVEN == 2:
        return tl.load(tensor + image, mask=mask, other=1.0)
    elif GIVEN == 1:
        return tl.load(tensor) + tl.zeros_like(image).to(tl.float64)
    else:
        return tl.where(value > 0.0, value, standard) + tl.zeros_like(image).to(tl.float64)


@triton.jit(do_not_specialize=["all_tiles", "images", "levels", "scopes", "segments"])
def coefficients_kernel(
    tile0,  # tables of the levels, of a detection problem
    tiles,
    sc,
    sums,
    cls_avg,
    loc_avg,
    outputs,  # packed addresses: classification, localisation loss, count, mean IoU; 0: not wanted
    zeros,  # packed, of what is to be 0 after it: addresses, 4-byte words, first pieces
    all_tiles,
    images,
    levels,
    scopes,
    segments,
    cls_divisor: tl.float64,
    loc_divisor: tl.float64,
    world_size: tl.float64,
    negative_factor: tl.float64,
    positive_factor: tl.float64,
    cls_weight: tl.float64,
    w_loc: tl.float64,
    eps: tl.float64,
    SCOPE: tl.constexpr,
    COMPUTE_SUMS: tl.constexpr,
    NORMALIZE_LOC: tl.constexpr,
    CLS_GIVEN: tl.constexpr,
    LOC_GIVEN: tl.constexpr,
    ROWS_COUNT_ALL: tl.constexpr,  # the dense pass counts the positives too
    ZERO: tl.constexpr,  # what the addresses of `zeros` are multiples of; 0: there are none
    BLOCK: tl.constexpr,
):
    """A segment's sums by a program each; by the last of them the rest. By further ones zeros: meanwhile memory has
    nothing else to do."""
    s = tl.program_id(0)
    if s < segments:
        add_segment(tile0, tiles, sc, s, all_tiles, images, scopes, segments, SCOPE, BLOCK)
        if is_last(pointer(sc.tickets, tl.int32), segments):
            finish_coefficients(
                sc, sums, cls_avg, loc_avg, outputs, images, levels, scopes, segments, cls_divisor, loc_divisor,
                world_size, negative_factor, positive_factor, cls_weight, w_loc, eps,
                SCOPE, COMPUTE_SUMS, NORMALIZE_LOC, CLS_GIVEN, LOC_GIVEN, ROWS_COUNT_ALL, BLOCK,
            )  # fmt: skip
    elif ZERO > 0:
        write_zeros(zeros, s - segments, ZERO)


@triton.jit
def write_zeros(zeros, piece, ALIGNMENT: tl.constexpr):
    """A piece of one of the tensors that are to be 0, as memory."""
    which = level_of(zeros[2], piece)
    first = tl.cast(piece - pick(zeros[2], which), tl.int64) * ZERO_WORDS  # beyond 2^31 in large tensors
    left = tl.cast(tl.minimum(pick(zeros[1], which) - first, ZERO_WORDS), tl.int32)
    start = pointer_at(zeros[0], which, tl.int32)
    if ALIGNMENT == 16:
        start = tl.multiple_of(start, 16)
    at = tl.arange(0, ZERO_WORDS)
    tl.store(start + first + at, tl.zeros((ZERO_WORDS,), tl.int32), mask=at < left)


@triton.jit
def add_segment(
    tile0, tiles, sc, s, all_tiles, images, scopes, segments, SCOPE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The sums of a segment: of the tiles that share a scope and an image."""
    if SCOPE == BY_ID:
        first, count = s * all_tiles, all_tiles
        stride = tl.cast(scopes, tl.int64) * all_tiles
    else:
        level = s // images
        per_image = pick(tiles, level)
        first, count = pick(tile0, level) + (s - level * images) * per_image, per_image
        stride = tl.cast(all_tiles, tl.int64)
    partial = pointer(sc.partial, tl.float64)
    segment = pointer(sc.segment, tl.float64)
    q = tl.arange(0, 16)
    acc = tl.zeros((16, BLOCK), tl.float64)
    j0 = 0
    while j0 < count:
        j = j0 + tl.arange(0, BLOCK)
        mask = (q < PARTS)[:, None] & (j < count)[None, :]
        acc += tl.load(partial + q[:, None] * stride + (first + j)[None, :], mask=mask, other=0.0)
        j0 += BLOCK
    tl.store(segment + q * segments + s, tl.sum(acc, 1), mask=q < PARTS)


@triton.jit
def segments_of_scopes(segment, segments, images, levels, scope, mask, PART: tl.constexpr, SCOPE: tl.constexpr):
    """Sum of a part over the segments of each scope of a block (16,)."""
    if SCOPE == BY_ID:
        return tl.load(segment + PART * segments + scope, mask=mask, other=0.0)
    else:
        if SCOPE == BATCH:
            first, step, count = scope * 0, 1, segments
        elif SCOPE == LEVEL:
            first, step, count = scope * images, 1, images
        else:
            first, step, count = scope, images, levels
        acc = tl.zeros((16, 16), tl.float64)
        j0 = 0
        while j0 < count:
            j = j0 + tl.arange(0, 16)
            inside = mask[:, None] & (j < count)[None, :]
            at = first[:, None] + (j * step)[None, :]
            acc += tl.load(segment + PART * segments + at, mask=inside, other=0.0)
            j0 += 16
        return tl.sum(acc, 1)


@triton.jit
def finish_coefficients(
    sc, sums, cls_avg, loc_avg, outputs, images, levels, scopes, segments, cls_divisor, loc_divisor, world_size,
    negative_factor, positive_factor, cls_weight, w_loc, eps,
    SCOPE: tl.constexpr, COMPUTE_SUMS: tl.constexpr, NORMALIZE_LOC: tl.constexpr, CLS_GIVEN: tl.constexpr,
    LOC_GIVEN: tl.constexpr, ROWS_COUNT_ALL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """By the last program: sums (1 + scopes, 4), coefficients, losses."""
    segment = pointer(sc.segment, tl.float64)
    if COMPUTE_SUMS:
        # The shared sums, over all segments.
        q = tl.arange(0, 16)
        acc = tl.zeros((16, BLOCK), tl.float64)
        j0 = 0
        while j0 < segments:
            j = j0 + tl.arange(0, BLOCK)
            mask = (q <= BAD)[:, None] & (j < segments)[None, :]
            acc += tl.load(segment + q[:, None] * segments + j[None, :], mask=mask, other=0.0)
            j0 += BLOCK
        tl.store(sums + q, tl.sum(acc, 1), mask=q < 4)
        i0 = 0
        while i0 < scopes:
            i = i0 + tl.arange(0, 16)
            mask = i < scopes
            row = sums + 4 + 4 * i
            plain = segments_of_scopes(segment, segments, images, levels, i, mask, CLS_PLAIN, SCOPE)
            weighted = segments_of_scopes(segment, segments, images, levels, i, mask, CLS_WEIGHTED, SCOPE)
            tl.store(row, plain, mask=mask)
            tl.store(row + 1, weighted, mask=mask)
            plain = segments_of_scopes(segment, segments, images, levels, i, mask, LOC_PLAIN, SCOPE)
            weighted = segments_of_scopes(segment, segments, images, levels, i, mask, LOC_WEIGHTED, SCOPE)
            tl.store(row + 2, plain, mask=mask)
            tl.store(row + 3, weighted, mask=mask)
            i0 += 16
        tl.debug_barrier()  # read again below, by other threads

    count = tl.load(sums + COUNT)
    bad = tl.load(sums + BAD) != 0.0
    # Ranks average their losses, so each divides by its share of the global count.
    standard = tl.where(count > 1.0, count, 1.0) / world_size
    i0 = 0
    while i0 < images:
        i = i0 + tl.arange(0, BLOCK)
        mask = i < images
        cls = cls_weight / divisor_of(cls_avg, cls_divisor, i, mask, standard, CLS_GIVEN)
        loc = w_loc / divisor_of(loc_avg, loc_divisor, i, mask, standard, LOC_GIVEN)
        tl.store(pointer(sc.negative, tl.float32) + i, (negative_factor * cls).to(tl.float32), mask=mask)
        tl.store(pointer(sc.positive, tl.float32) + i, (positive_factor * cls).to(tl.float32), mask=mask)
        tl.store(pointer(sc.location, tl.float32) + i, loc.to(tl.float32), mask=mask)
        i0 += BLOCK
    i0 = 0
    while i0 < scopes:
        i = i0 + tl.arange(0, BLOCK)
        mask = i < scopes
        cls_norm, loc_norm = normalizers(sums, i, mask, eps, NORMALIZE_LOC)
        tl.store(pointer(sc.cls_norm, tl.float32) + i, cls_norm.to(tl.float32), mask=mask)
        tl.store(pointer(sc.loc_norm, tl.float32) + i, loc_norm.to(tl.float32), mask=mask)
        i0 += BLOCK

    cls_sum = tl.zeros((BLOCK,), tl.float64)
    loc_sum = tl.zeros((BLOCK,), tl.float64)
    i0 = 0
    while i0 < segments:
        i = i0 + tl.arange(0, BLOCK)
        mask = i < segments
        if SCOPE == BY_ID:
            image, scope = i * 0, i
        else:
            level = i // images
            image = i - level * images
            scope = image if SCOPE == IMAGE else (level if SCOPE == LEVEL else i * 0)
        cls_norm, loc_norm = normalizers(sums, scope, mask, eps, NORMALIZE_LOC)
        cls = cls_norm * cls_weight / divisor_of(cls_avg, cls_divisor, image, mask, standard, CLS_GIVEN)
        loc = loc_norm * w_loc / divisor_of(loc_avg, loc_divisor, image, mask, standard, LOC_GIVEN)
        cls_part = tl.load(segment + CLS_LOSS * segments + i, mask=mask, other=0.0)
        loc_part = tl.load(segment + LOC_LOSS * segments + i, mask=mask, other=0.0)
        cls_sum += tl.where(mask, weighted_loss(cls, cls_part), 0.0)
        loc_sum += tl.where(mask, weighted_loss(loc, loc_part), 0.0)
        i0 += BLOCK
    cls_loss = tl.where(bad, float("nan"), tl.sum(cls_sum, 0)).to(tl.float32)
    loc_loss = tl.where(bad, float("nan"), tl.sum(loc_sum, 0)).to(tl.float32)
    if ROWS_COUNT_ALL:
        cls_loss = tl.where(bad, float("nan"), 0.0)
    tl.store(pointer(sc.positives_loss, tl.float32), cls_loss)
    if unpack(outputs[0]) != 0:
        tl.store(pointer(outputs[0], tl.float32), cls_loss)
    if unpack(outputs[1]) != 0:
        tl.store(pointer(outputs[1], tl.float32), loc_loss)
    if unpack(outputs[2]) != 0:
        tl.store(pointer(outputs[2], tl.int64), count.to(tl.int64))
    if unpack(outputs[3]) != 0:
        mean = tl.where(count > 0.0, tl.load(sums + IOU) / tl.where(count > 0.0, count, 1.0), 0.0)
        tl.store(pointer(outputs[3], tl.float32), mean.to(tl.float32))
    tl.store(pointer(sc.tickets, tl.int32), 0)


@triton.jit
def normalizers(sums, scope, mask, eps, NORMALIZE_LOC: tl.constexpr):
    """Of Eq. 4 and Eq. 7 (else 1), per scope."""
    row = sums + 4 + 4 * scope
    cls = normalizer(tl.load(row, mask=mask, other=0.0), tl.load(row + 1, mask=mask, other=0.0), eps)
    loc = tl.full(cls.shape, 1.0, tl.float64)
    if NORMALIZE_LOC:
        loc = normalizer(tl.load(row + 2, mask=mask, other=0.0), tl.load(row + 3, mask=mask, other=0.0), eps)
    return cls, loc


@triton.jit
def finish_loss(partial, count, sc, loss, BLOCK: tl.constexpr):
    """Ends a pass that left a float32 loss per tile: the last program adds them up, in their order."""
    ticket = pointer(sc.tickets, tl.int32) + 1
    if is_last(ticket, tl.num_programs(0)):
        acc = tl.zeros((BLOCK,), tl.float64)
        i0 = 0
        while i0 < count:
            i = i0 + tl.arange(0, BLOCK)
            acc += tl.load(pointer(partial, tl.float32) + i, mask=i < count, other=0.0).to(tl.float64)
            i0 += BLOCK
        total = tl.sum(acc, 0) + tl.load(pointer(sc.positives_loss, tl.float32)).to(tl.float64)
        tl.store(pointer(loss, tl.float32), total.to(tl.float32))
        tl.store(ticket, 0)


# ---------------------------------------------------------------------------------------------- launcher


@dataclass
class Coefficients:
    """Arguments of the kernel; the defaults are those of a loss without them."""

    scratch: Scratch
    sums: Tensor
    all_tiles: int
    scopes: int
    scope: int
    compute_sums: bool
    images: int = 1
    levels: int = 1
    tile0: tuple[int, ...] = pack(0)
    tiles: tuple[int, ...] = pack(0)
    cls_avg: Tensor | None = None
    loc_avg: Tensor | None = None
    cls_divisor: float = 1.0
    loc_divisor: float = 1.0
    world_size: float = 1.0
    alpha: float = -1.0  # negative: none
    cls_weight: float = 1.0
    w_loc: float = 1.0
    eps: float = 0.0
    normalize_loc: bool = False
    rows_count_all: bool = False
    outputs: tuple[int, int, int, int] = (0, 0, 0, 0)
    zeros: Sequence[Tensor] = ()  # dense tensors of multiples of 4 bytes that are to be 0 afterwards

    @property
    def segments(self) -> int:
        return self.scopes if self.scope == BY_ID.value else self.levels * self.images

    def launch(self) -> None:
        def given(avg: Tensor | None) -> tuple[Any, int]:
            return (self.sums, 0) if avg is None else (avg, 1 + (avg.ndim == 1))

        cls_avg, cls_given = given(self.cls_avg)
        loc_avg, loc_given = given(self.loc_avg)
        words = [t.numel() * t.element_size() // 4 for t in self.zeros] or [0]
        addresses = [t.data_ptr() for t in self.zeros] or [0]
        pieces = [cdiv(count, ZERO_WORDS.value) for count in words]
        firsts = [sum(pieces[:i]) for i in range(len(pieces))]
        alignment = 16 if all(address % 16 == 0 for address in addresses) else 4
        coefficients_kernel[(self.segments + sum(pieces),)](
            self.tile0,
            self.tiles,
            self.scratch,
            self.sums,
            cls_avg,
            loc_avg,
            pack(*self.outputs),
            (pack(*addresses), pack(*words), pack(*firsts)),
            self.all_tiles,
            self.images,
            self.levels,
            self.scopes,
            self.segments,
            self.cls_divisor,
            self.loc_divisor,
            self.world_size,
            1.0 if self.alpha < 0 else 1.0 - self.alpha,
            1.0 if self.alpha < 0 else self.alpha,
            self.cls_weight,
            self.w_loc,
            self.eps,
            self.scope,
            self.compute_sums,
            self.normalize_loc,
            cls_given,
            loc_given,
            self.rows_count_all,
            alignment if self.zeros else 0,
            BLOCK,
            num_warps=4,
        )
