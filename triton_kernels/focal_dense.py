"""The pass over all logits of a sigmoid focal loss: one read of the logits, one write of their gradient.

The logits are streams of aligned vectors, whatever the layout. A program takes groups of them, each thread several
vectors, all read before the first is computed: so much is under way that memory does not wait. Every entry is computed
as a negative. Where the positives' kernel has marked something in a program's tile, a vector of rows is not whole, or
rows have weights, it goes a longer way, on which ignored and positive entries are computed with a logit that gives
exactly 0, and leave 0. Nothing is left out: memory written with holes costs more. The positives' own entries are put
there afterwards (focal_finish.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._launch import entry_of, level_of, number, pick, pointer, unpack
from ._math import OFF, focal_negative
from .positives import IGNORED, INVALID, PLAIN, load_marks, marks_at

NOTHING, GRADIENT, LOSS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what the pass writes per entry
WARPS = 4
THREADS = tl.constexpr(32 * WARPS)


class DenseLevels(NamedTuple):
    """Packed tables of the levels of a launch: runs of rows (flat, channels_last), or of planes (NCHW).

    The planes of the classes of one anchor lie one behind the other, and a vector may reach from one into the next. So
    many of them that together they are whole vectors are a period, in which every slot keeps its location, and its
    class modulo the period's, from one period to the next.
    """

    x: tuple[int, ...]  # addresses of the logits
    out: tuple[int, ...]  # and of what is written
    image_stride: tuple[int, ...]  # elements
    locations: tuple[int, ...]  # of a map; rows: 0
    anchors: tuple[int, ...]  # per location; rows: rows of an image
    first_anchor: tuple[int, ...]  # of an image
    classes: tuple[int, ...]  # of a period; rows: 0
    tile0: tuple[int, ...]
    tiles: tuple[int, ...]  # rows: per image; planes: the windows of a period, a group each


class DenseNumbers(NamedTuple):
    """Numbers that may be in tensors."""

    row_weight: Any  # per row, or anything
    scale: Any  # tensor of one number, or anything: the gradient's factor
    expected: Any  # likewise: the factor that filled buffers have


# ---------------------------------------------------------------------------------------------- vectors


@triton.jit
def vectors_at(start, VECTOR: tl.constexpr):
    """Pointers to the elements of neighbouring vectors, (THREADS, VECTOR)."""
    at = start + (tl.arange(0, THREADS) * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
    if VECTOR > 1:
        at = tl.multiple_of(at, (1, VECTOR * (start.dtype.element_ty.primitive_bitwidth // 8)))
    return at


@triton.jit
def plain_group(
    x, out, left, acc, gamma, factor, T: tl.constexpr, GAMMA: tl.constexpr, OUTPUT: tl.constexpr,
    WANT_LOSS: tl.constexpr, MASKED: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """A group of vectors without a mark, from x and out on; returns acc and their losses. MASKED: only the first `left`
    vectors are to be touched."""
    lane = tl.arange(0, THREADS)[:, None]
    logits = ()
    for u in tl.static_range(UNROLL):
        if MASKED:
            logits += (
                tl.load(vectors_at(x + u * (THREADS * VECTOR), VECTOR), mask=lane < left - u * THREADS, other=OFF),
            )
        else:
            logits += (tl.load(vectors_at(x + u * (THREADS * VECTOR), VECTOR)),)
    for u in tl.static_range(UNROLL):
        if left > u * THREADS:
            loss, slope = focal_negative(logits[u].to(tl.float32), gamma, GAMMA)
            if WANT_LOSS:
                acc += tl.sum(loss, 1)  # along registers: no exchange between threads
            if OUTPUT != NOTHING:
                value = ((loss if OUTPUT == LOSS else slope) * factor).to(T)
                if MASKED:
                    tl.store(vectors_at(out + u * (THREADS * VECTOR), VECTOR), value, mask=lane < left - u * THREADS)
                else:
                    tl.store(vectors_at(out + u * (THREADS * VECTOR), VECTOR), value)
    return acc


@triton.jit
def any_marked(mark, first, count, wrap, SPAN: tl.constexpr):
    """Whether one of `count` <= SPAN marks from `first` on, which go on at 0 behind wrap - 1, is not of plain
    background."""
    i = tl.arange(0, SPAN)
    at = first + i
    at = tl.where(at >= wrap, at - wrap, at)
    return tl.max((load_marks(mark, at, i < count) != PLAIN).to(tl.int32), 0) > 0


# ---------------------------------------------------------------------------------------------- tiles


@triton.jit
def rows_tile(
    lv, marks, sc, nu, anchors_per_image, gamma, scale, tile,
    T: tl.constexpr, K: tl.constexpr, GAMMA: tl.constexpr, OUTPUT: tl.constexpr, WEIGHTED: tl.constexpr,
    WANT_LOSS: tl.constexpr, VECTOR: tl.constexpr, ONE_ROW: tl.constexpr, UNROLL: tl.constexpr, LOOP: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """LOOP groups of the rows of one image and level. ONE_ROW: no vector lies in two of them."""
    BYTES: tl.constexpr = T.primitive_bitwidth // 8
    VECTORS: tl.constexpr = UNROLL * THREADS * LOOP
    level = level_of(lv.tile0, tile)
    local = tile - pick(lv.tile0, level)
    per_image = pick(lv.tiles, level)
    image = local // per_image
    rows = pick(lv.anchors, level)
    size = rows * K
    offset = tl.cast(image, tl.int64) * pick(lv.image_stride, level) * BYTES
    x_address = unpack(entry_of(lv.x, level)) + offset
    out_address = unpack(entry_of(lv.out, level)) + offset
    missing = tl.zeros((), tl.int32)  # elements of the first vector that lie before the run
    if VECTOR > 1 and not ONE_ROW:
        missing = (x_address & 15).to(tl.int32) // BYTES
    anchor0 = tl.cast(image, tl.int64) * anchors_per_image + pick(lv.first_anchor, level)
    mark = marks_at(marks, anchor0, K)
    negative = tl.load(pointer(sc.negative, tl.float32) + image)
    factor = negative * scale

    first = (local - image * per_image) * VECTORS
    entry = first * VECTOR - missing
    x = x_address.to(tl.pointer_type(T)) + entry
    out = out_address.to(tl.pointer_type(T)) + entry
    first_row = tl.maximum(entry, 0) // K
    last_row = (tl.minimum(entry + VECTORS * VECTOR, size) - 1) // K
    acc = tl.zeros((THREADS,), tl.float32)
    special = True
    if not WEIGHTED:
        # Vectors that are not whole go the long way too: then no mask stands in the short one.
        special = (entry < 0) | (entry + VECTORS * VECTOR > size)
        special = special | any_marked(mark, first_row, last_row + 1 - first_row, rows, SPAN)
    if special:
        lane = tl.arange(0, THREADS)
        for i in range(UNROLL * LOOP):
            by = i * (THREADS * VECTOR)
            e = (entry + by + lane * VECTOR)[:, None]
            if not ONE_ROW:
                e += tl.arange(0, VECTOR)[None, :]
            inside = (e >= 0) & (e < size)
            z = tl.load(vectors_at(x + by, VECTOR), mask=inside, other=OFF).to(tl.float32)
            row = e // K
            column = e - row * K
            if ONE_ROW:
                column += tl.arange(0, VECTOR)[None, :]
            seen = load_marks(mark, row, inside)
            off = (seen == column) | (seen == IGNORED)
            loss, slope = focal_negative(tl.where(off, OFF, z), gamma, GAMMA)
            if WEIGHTED:
                counts = inside & (seen != IGNORED)  # the others' may be NaN
                weight = tl.load(nu.row_weight + anchor0 + row, mask=counts, other=0.0).to(tl.float32)
                loss *= weight
                slope *= weight
            if WANT_LOSS:
                acc += tl.sum(loss, 1)  # 0 where nothing is
            if OUTPUT != NOTHING:
                value = tl.where(off, 0.0, (loss if OUTPUT == LOSS else slope) * factor)  # also for a factor of inf
                if OUTPUT == LOSS:
                    value = tl.where(seen == INVALID, float("nan"), value)
                tl.store(vectors_at(out + by, VECTOR), value.to(T), mask=inside)
    else:
        left = (size - entry) // VECTOR
        i = tl.zeros((), tl.int32)
        while i < LOOP:
            acc = plain_group(x, out, left, acc, gamma, factor, T, GAMMA, OUTPUT, WANT_LOSS, False, VECTOR, UNROLL)
            x += UNROLL * THREADS * VECTOR
            out += UNROLL * THREADS * VECTOR
            left -= UNROLL * THREADS
            i += 1
    return tl.sum(acc, 0) * negative


@triton.jit
def planes_tile(
    lv, marks, sc, anchors_per_image, gamma, scale, tile,
    T: tl.constexpr, K: tl.constexpr, GAMMA: tl.constexpr, OUTPUT: tl.constexpr, WANT_LOSS: tl.constexpr,
    VECTOR: tl.constexpr, UNROLL: tl.constexpr, LOOP: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """A window of one (image, anchor) of a map (N, A * K, H, W): the same group of LOOP periods."""
    VECTORS: tl.constexpr = UNROLL * THREADS
    level = level_of(lv.tile0, tile)
    local = tile - pick(lv.tile0, level)
    windows = pick(lv.tiles, level)
    rest = local // windows
    window = local - rest * windows  # fastest: neighbouring programs have neighbouring memory
    classes = pick(lv.classes, level)
    chunks = (K // classes + LOOP - 1) // LOOP
    plane = rest // chunks
    period = (rest - plane * chunks) * LOOP
    periods = tl.minimum(K // classes - period, LOOP)
    anchors = pick(lv.anchors, level)
    image = plane // anchors
    a = plane - image * anchors
    locations = pick(lv.locations, level)
    step = classes * locations
    end = step // VECTOR  # vectors of a period
    start = tl.cast(image, tl.int64) * pick(lv.image_stride, level) + tl.cast(a, tl.int64) * K * locations
    start += tl.cast(period, tl.int64) * step
    x = unpack(entry_of(lv.x, level)).to(tl.pointer_type(T)) + start
    out = unpack(entry_of(lv.out, level)).to(tl.pointer_type(T)) + start
    mark = marks_at(
        marks, tl.cast(image, tl.int64) * anchors_per_image + pick(lv.first_anchor, level) + a * locations, K
    )
    negative = tl.load(pointer(sc.negative, tl.float32) + image)
    factor = negative * scale

    first = window * VECTORS
    slots = tl.minimum(VECTORS, end - first) * VECTOR
    acc = tl.zeros((THREADS,), tl.float32)
    if any_marked(mark, first * VECTOR % locations, tl.minimum(slots, locations), locations, SPAN):
        for u in range(UNROLL):
            vector = first + u * THREADS + tl.arange(0, THREADS)
            inside = (vector < end)[:, None]
            number_of = vector * VECTOR // locations  # of the vector's first plane
            location = (vector * VECTOR - number_of * locations)[:, None] + tl.arange(0, VECTOR)[None, :]
            next_plane = location >= locations
            location = tl.where(next_plane, location - locations, location)
            seen = load_marks(mark, location, inside)
            # A positive's entry is in the period whose first class is this; no other mark is that of a class.
            own = seen - number_of[:, None] - next_plane.to(tl.int32)
            i = tl.zeros((), tl.int32)
            while i < periods:
                off = (own == (period + i) * classes) | (seen == IGNORED)
                by = (first + u * THREADS) * VECTOR + i * step
                at = vectors_at(x + by, VECTOR)
                z = tl.load(at, mask=inside, other=OFF).to(tl.float32)
                loss, slope = focal_negative(tl.where(off, OFF, z), gamma, GAMMA)
                if WANT_LOSS:
                    acc += tl.sum(loss, 1)
                if OUTPUT != NOTHING:
                    value = tl.where(off, 0.0, slope * factor)  # also for a factor of inf
                    at = vectors_at(out + by, VECTOR)
                    tl.store(at, value.to(T), mask=inside)
                i += 1
    else:
        x += first * VECTOR
        out += first * VECTOR
        i = tl.zeros((), tl.int32)
        while i < periods:
            acc = plain_group(
                x, out, end - first, acc, gamma, factor, T, GAMMA, OUTPUT, WANT_LOSS, True, VECTOR, UNROLL
            )
            x += step
            out += step
            i += 1
    return tl.sum(acc, 0) * negative


@triton.jit(do_not_specialize=["anchors_per_image", "tiles"])
def dense_kernel(
    lv,
    marks,
    sc,
    nu,
    partial,  # packed: address of this launch's sums
    anchors_per_image: tl.int64,
    tiles,
    gamma: tl.float32,
    scale: tl.float64,
    expected: tl.float64,
    T: tl.constexpr,
    K: tl.constexpr,
    GAMMA: tl.constexpr,
    OUTPUT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WANT_LOSS: tl.constexpr,
    MAY_SKIP: tl.constexpr,
    SCALE_GIVEN: tl.constexpr,
    EXPECTED_GIVEN: tl.constexpr,
    PLANES: tl.constexpr,
    VECTOR: tl.constexpr,  # elements of a vector
    ONE_ROW: tl.constexpr,  # see rows_tile
    UNROLL: tl.constexpr,  # vectors of a thread in a group
    LOOP: tl.constexpr,  # groups of a program
    SPAN: tl.constexpr,  # a power of two >= the marks of a tile
):
    tile = tl.program_id(0)
    wanted = number(nu.scale, scale, SCALE_GIVEN)
    if MAY_SKIP:
        if wanted == number(nu.expected, expected, EXPECTED_GIVEN):  # the buffers hold what is asked for already
            tile = tiles
    factor = wanted.to(tl.float32)
    if MAY_SKIP:
        while tile < tiles:
            dense_tile(
                lv, marks, sc, nu, partial, anchors_per_image, gamma, factor, tile, T, K, GAMMA, OUTPUT, WEIGHTED,
                WANT_LOSS, PLANES, VECTOR, ONE_ROW, UNROLL, LOOP, SPAN,
            )  # fmt: skip
            tile += tl.num_programs(0)
    else:
        dense_tile(
            lv, marks, sc, nu, partial, anchors_per_image, gamma, factor, tile, T, K, GAMMA, OUTPUT, WEIGHTED,
            WANT_LOSS, PLANES, VECTOR, ONE_ROW, UNROLL, LOOP, SPAN,
        )  # fmt: skip


@triton.jit
def dense_tile(
    lv, marks, sc, nu, partial, anchors_per_image, gamma, factor, tile,
    T: tl.constexpr, K: tl.constexpr, GAMMA: tl.constexpr, OUTPUT: tl.constexpr, WEIGHTED: tl.constexpr,
    WANT_LOSS: tl.constexpr, PLANES: tl.constexpr, VECTOR: tl.constexpr, ONE_ROW: tl.constexpr, UNROLL: tl.constexpr,
    LOOP: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    if PLANES:
        loss = planes_tile(
            lv, marks, sc, anchors_per_image, gamma, factor, tile, T, K, GAMMA, OUTPUT, WANT_LOSS, VECTOR, UNROLL,
            LOOP, SPAN,
        )  # fmt: skip
    else:
        loss = rows_tile(
            lv, marks, sc, nu, anchors_per_image, gamma, factor, tile, T, K, GAMMA, OUTPUT, WEIGHTED, WANT_LOSS,
            VECTOR, ONE_ROW, UNROLL, LOOP, SPAN,
        )  # fmt: skip
    if WANT_LOSS:
        tl.store(pointer(partial[0], tl.float32) + tile, loss)
