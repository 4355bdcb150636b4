"""The pass over all logits of a sigmoid focal loss: one read of the logits, one write of their gradient.

The logits are streams of aligned vectors, whatever the layout. A program, which is one warp, takes groups of them, each
thread several vectors, all read before the first is computed: so much is under way that memory does not wait. Every
entry is computed as a negative. In the words of memory as they were read, ignored entries and positives' own get a
logit that gives exactly 0 (OFF), where the positives' kernel has marked something in the group (rows) or the window
(planes); then all go the same way. Nothing is left out: memory written with holes costs more. The positives' own
entries are put there afterwards (focal_finish.py, detection_kernels.py). Groups of rows that are not whole, weights, a
factor that is huge or not finite and single 16-bit elements take a longer way, entry by entry.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._launch import entry_of, level_of, number, pick, pointer, unpack
from ._math import (
    OFF,
    all_negative,
    anew,
    any_bits,
    first_half,
    focal_below,
    focal_negative,
    is_usual,
    off_word,
    pack_halves,
    second_half,
)
from .positives import IGNORED, INVALID, PLAIN, load_marks, marks_at

NOTHING, GRADIENT, LOSS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what the pass writes per entry


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
def vectors_at(start, THREADS: tl.constexpr, LENGTH: tl.constexpr):
    """Pointers to the elements, or words, of neighbouring vectors, (THREADS, LENGTH)."""
    at = start + (tl.arange(0, THREADS) * LENGTH)[:, None] + tl.arange(0, LENGTH)[None, :]
    if LENGTH > 1:
        at = tl.multiple_of(at, (1, LENGTH * (start.dtype.element_ty.primitive_bitwidth // 8)))
    return at


@triton.jit
def load_words(x, left, T: tl.constexpr, THREADS: tl.constexpr, WORDS: tl.constexpr):
    """The words of a vector a thread, for the first `left` threads; the others' logits are OFF."""
    at = vectors_at(x.to(tl.pointer_type(tl.int32)), THREADS, WORDS)
    if left >= THREADS:
        words = tl.load(at)
    else:
        words = tl.load(at, mask=tl.arange(0, THREADS)[:, None] < left, other=off_word(T))
    return words


@triton.jit
def mask_of(first, second, T: tl.constexpr):
    """The bits of flagged elements: of a word its first and its second; of 32 bits there is no second."""
    if T.primitive_bitwidth == 32:
        return tl.where(first, -1, 0)
    else:
        return tl.where(first, 0xFFFF, 0) | tl.where(second, -0x10000, 0)


@triton.jit
def switch_off(words, mask, T: tl.constexpr):
    """The words with OFF for the elements whose bits are in the mask."""
    return (words & ~mask) | (off_word(T) & mask)


@triton.jit
def negative(x, gamma, factor, GAMMA: tl.constexpr, OUTPUT: tl.constexpr, BELOW: tl.constexpr):
    """The loss of negatives and what they get. BELOW: they are at most 0, and their loss is doubled."""
    if BELOW:
        loss, slope = focal_below(x, gamma, GAMMA)
        return loss, (0.5 * loss if OUTPUT == LOSS else slope) * factor
    else:
        loss, slope = focal_negative(x, gamma, GAMMA)
        return loss, (loss if OUTPUT == LOSS else slope) * factor


@triton.jit
def negatives(
    words, gamma, factor, T: tl.constexpr, GAMMA: tl.constexpr, OUTPUT: tl.constexpr, BELOW: tl.constexpr
):  # fmt: skip
    """The same of the elements of words: their losses together, and words."""
    if T.primitive_bitwidth == 32:
        loss, value = negative(words.to(tl.float32, bitcast=True), gamma, factor, GAMMA, OUTPUT, BELOW)
        return loss, value.to(tl.int32, bitcast=True)
    else:
        loss, value = negative(first_half(words, T), gamma, factor, GAMMA, OUTPUT, BELOW)
        second_loss, second = negative(second_half(words, T), gamma, factor, GAMMA, OUTPUT, BELOW)
        return loss + second_loss, pack_halves(value, second, T)


@triton.jit
def add_negatives(
    words, out, left, acc, twice, gamma, factor,
    T: tl.constexpr, GAMMA: tl.constexpr, OUTPUT: tl.constexpr, WANT_LOSS: tl.constexpr, THREADS: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """Computes the words of a vector a thread as negatives and writes what they get, for the first `left` threads.
    Returns acc, to which their losses are added, and `twice`, to which they are added doubled: one or the other."""
    # One way for all: a branch is a program's, not a thread's. Most of a detector's logits are below 0.
    if all_negative(words, T):
        loss, value = negatives(words, gamma, factor, T, GAMMA, OUTPUT, True)
        if WANT_LOSS:
            twice += tl.sum(loss, 1)  # along registers: no exchange between threads
    else:
        loss, value = negatives(words, gamma, factor, T, GAMMA, OUTPUT, False)
        if WANT_LOSS:
            acc += tl.sum(loss, 1)
    if OUTPUT != NOTHING:
        if left >= THREADS:
            tl.store(vectors_at(out, THREADS, WORDS), value)
        else:
            tl.store(vectors_at(out, THREADS, WORDS), value, mask=tl.arange(0, THREADS)[:, None] < left)
    return acc, twice


# ---------------------------------------------------------------------------------------------- rows


@triton.jit
def marks_of_rows(mark, entry, count, K: tl.constexpr, SPAN: tl.constexpr):
    """The marks of the rows, at most SPAN, that `count` entries from `entry` on lie in."""
    row = entry // K + tl.arange(0, SPAN)
    return load_marks(mark, row, row <= (entry + count - 1) // K)


@triton.jit
def is_any_marked(seen):
    return tl.max((seen != PLAIN).to(tl.int32), 0) > 0


@triton.jit
def off_in_row(mark, e, row, K: tl.constexpr):
    """Which entries e of rows are ignored, or a positive's own."""
    seen = tl.load(mark + row).to(tl.int32)
    return (seen == e - row * K) | (seen == IGNORED)


@triton.jit
def any_rows_vector(
    mark, x, out, e, size, acc, gamma, factor, row_weight,
    T: tl.constexpr, K: tl.constexpr, GAMMA: tl.constexpr, OUTPUT: tl.constexpr, WEIGHTED: tl.constexpr,
    WANT_LOSS: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A vector a thread, entry by entry, whatever is in it: from entry e on, which may lie outside. row_weight: from
    the run's first row on."""
    e += (tl.arange(0, THREADS) * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
    inside = (e >= 0) & (e < size)
    z = tl.load(vectors_at(x, THREADS, VECTOR), mask=inside, other=OFF).to(tl.float32)
    row = e // K
    seen = load_marks(mark, row, inside)
    off = (seen == e - row * K) | (seen == IGNORED)
    loss, slope = focal_negative(tl.where(off, OFF, z), gamma, GAMMA)
    if WEIGHTED:
        counts = inside & (seen != IGNORED)  # the others' may be NaN
        weight = tl.load(row_weight + row, mask=counts, other=0.0).to(tl.float32)
        loss *= weight
        slope *= weight
    if WANT_LOSS:
        acc += tl.sum(loss, 1)  # 0 where nothing is
    if OUTPUT != NOTHING:
        value = tl.where(off, 0.0, (loss if OUTPUT == LOSS else slope) * factor)  # also for a factor of inf
        if OUTPUT == LOSS:
            value = tl.where(seen == INVALID, float("nan"), value)
        tl.store(vectors_at(out, THREADS, VECTOR), value.to(T), mask=inside)
    return acc


@triton.jit
def rows_tile(
    lv, marks, sc, nu, anchors_per_image, gamma, scale, tile, loop,
    T: tl.constexpr, K: tl.constexpr, GAMMA: tl.constexpr, OUTPUT: tl.constexpr, WEIGHTED: tl.constexpr,
    WANT_LOSS: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr, ONE_ROW: tl.constexpr,
    UNROLL: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """`loop` groups of the rows of one image and level. ONE_ROW: no vector lies in two of them."""
    BYTES: tl.constexpr = T.primitive_bitwidth // 8
    STEP: tl.constexpr = THREADS * VECTOR
    REACH: tl.constexpr = UNROLL * STEP
    WORDS: tl.constexpr = max(VECTOR * BYTES // 4, 1)
    NARROW: tl.constexpr = VECTOR * BYTES < 4  # not even a word
    level = level_of(lv.tile0, tile)
    local = tile - pick(lv.tile0, level)
    per_image = pick(lv.tiles, level)
    image = local // per_image
    size = pick(lv.anchors, level) * K
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

    entry = (local - image * per_image) * (loop * REACH) - missing
    x = x_address.to(tl.pointer_type(T)) + entry
    out = out_address.to(tl.pointer_type(T)) + entry
    acc = tl.zeros((THREADS,), tl.float32)
    twice = tl.zeros((THREADS,), tl.float32)
    i = tl.zeros((), tl.int32)
    while (i < loop) & (entry < size):
        # What is not whole goes the long way: then no mask stands in the short one.
        short = is_usual(factor) & (entry >= 0) & (entry <= size - REACH)
        if WEIGHTED or NARROW:
            short = False
        elif OUTPUT == LOSS:  # a row without a valid label gets NaN
            if short:
                short = is_any_marked(marks_of_rows(mark, entry, REACH, K, SPAN)) == 0
        if short:
            seen = marks_of_rows(mark, entry, REACH, K, SPAN)
            group = ()  # all under way before the first is used
            for u in tl.static_range(UNROLL):
                group += (tl.load(vectors_at((x + u * STEP).to(tl.pointer_type(tl.int32)), THREADS, WORDS)),)
            marked = is_any_marked(seen)
            for u in tl.static_range(UNROLL):
                words = group[u]
                if marked:
                    start = (entry + u * STEP + tl.arange(0, THREADS) * VECTOR)[:, None]
                    e = start + tl.arange(0, WORDS)[None, :] * (4 // BYTES)
                    first = off_in_row(mark, e, (start if ONE_ROW else e) // K, K)
                    second = first
                    if BYTES == 2:
                        e += 1
                        second = off_in_row(mark, e, (start if ONE_ROW else e) // K, K)
                    words = switch_off(words, mask_of(first, second, T), T)
                acc, twice = add_negatives(
                    words, (out + u * STEP).to(tl.pointer_type(tl.int32)), THREADS, acc, twice, gamma, factor, T, GAMMA,
                    OUTPUT, WANT_LOSS, THREADS, WORDS,
                )  # fmt: skip
        else:
            for u in range(UNROLL):
                by = u * STEP
                acc = any_rows_vector(
                    mark, x + by, out + by, entry + by, size, acc, gamma, factor, nu.row_weight + anchor0, T, K, GAMMA,
                    OUTPUT, WEIGHTED, WANT_LOSS, THREADS, VECTOR,
                )  # fmt: skip
        x += REACH
        out += REACH
        entry += REACH
        i += 1
    return (tl.sum(acc, 0) + 0.5 * tl.sum(twice, 0)) * negative


# ---------------------------------------------------------------------------------------------- planes


@triton.jit
def slots_of(first, step: tl.constexpr, COUNT: tl.constexpr, locations):
    """Planes and locations of the elements first, first + step, ... of a period, (THREADS, COUNT): those of a vector
    from `first` (THREADS,) on, which reaches into the next plane at most."""
    plane = first // locations
    location = (first - plane * locations)[:, None] + (tl.arange(0, COUNT) * step)[None, :]
    over = location >= locations
    return plane[:, None] + over.to(tl.int32), tl.where(over, location - locations, location)


@triton.jit
def seen_in_period(mark, vector, half, lane, left, locations, PER_WORD: tl.constexpr, WORDS: tl.constexpr):
    """The marks of a vector a thread from `vector` of a period on, for the first `left` threads: of each word that of
    its first element or, half 1, of its second; and the planes these lie in. lane: the threads' numbers."""
    plane, location = slots_of((vector + lane) * (WORDS * PER_WORD) + half, PER_WORD, WORDS, locations)
    return load_marks(mark, location, (lane < left)[:, None]), plane


@triton.jit
def periods_with(seen, plane, period, classes, K: tl.constexpr):
    """A bit for each of the 32 periods from `period` on in which the slot of this plane is a positive's own entry."""
    first = seen - plane  # the class of the period's first plane
    if K < 1 << 20:
        number_of = ((first.to(tl.float32) + 0.5) * (1.0 / classes.to(tl.float32))).to(tl.int32)
    else:
        number_of = first // classes
    after = number_of - period
    found = (seen >= 0) & (first >= 0) & (number_of * classes == first) & (after >= 0) & (after < 32)
    return tl.where(found, 1 << (after & 31), 0)


@triton.jit
def planes_tile(
    lv, marks, sc, anchors_per_image, gamma, scale, tile, loop,
    T: tl.constexpr, K: tl.constexpr, GAMMA: tl.constexpr, OUTPUT: tl.constexpr, WANT_LOSS: tl.constexpr,
    THREADS: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """A window of one (image, anchor) of a map (N, A * K, H, W): the same group of `loop` periods, at most 32."""
    VECTORS: tl.constexpr = UNROLL * THREADS
    STEP: tl.constexpr = THREADS * VECTOR
    PER_WORD: tl.constexpr = 32 // T.primitive_bitwidth
    WORDS: tl.constexpr = max(VECTOR // PER_WORD, 1)
    NARROW: tl.constexpr = VECTOR < PER_WORD  # not even a word
    level = level_of(lv.tile0, tile)
    local = tile - pick(lv.tile0, level)
    windows = pick(lv.tiles, level)
    chunk = local // windows
    window = local - chunk * windows  # fastest: neighbouring programs have neighbouring memory
    classes = pick(lv.classes, level)
    chunks = (K // classes + loop - 1) // loop
    plane = chunk // chunks
    period = (chunk - plane * chunks) * loop
    periods = tl.minimum(K // classes - period, loop)
    anchors = pick(lv.anchors, level)
    image = plane // anchors
    a = plane - image * anchors
    locations = pick(lv.locations, level)
    step = classes * locations
    end = step // VECTOR  # vectors of a period
    start = tl.cast(image, tl.int64) * pick(lv.image_stride, level) + tl.cast(a, tl.int64) * K * locations
    first = window * VECTORS
    start += tl.cast(period, tl.int64) * step + first * VECTOR
    x = unpack(entry_of(lv.x, level)).to(tl.pointer_type(T)) + start
    out = unpack(entry_of(lv.out, level)).to(tl.pointer_type(T)) + start
    mark = marks_at(
        marks, tl.cast(image, tl.int64) * anchors_per_image + pick(lv.first_anchor, level) + a * locations, K
    )
    negative = tl.load(pointer(sc.negative, tl.float32) + image)
    factor = negative * scale

    left = end - first  # vectors
    acc = tl.zeros((THREADS,), tl.float32)
    twice = tl.zeros((THREADS,), tl.float32)
    i = tl.zeros((), tl.int32)
    short = is_usual(factor)
    if NARROW:
        short = False
    if short:
        ignored = ()
        own = tl.zeros((THREADS, WORDS), tl.int32)  # a bit for each period that has a positive's own entry here
        for u in tl.static_range(UNROLL):
            vector, rest = first + u * THREADS, left - u * THREADS
            lane = tl.arange(0, THREADS)
            mask = tl.zeros((THREADS, WORDS), tl.int32)
            seen, of = seen_in_period(mark, vector, 0, lane, rest, locations, PER_WORD, WORDS)
            second, second_of = seen, of
            if PER_WORD == 2:
                second, second_of = seen_in_period(mark, vector, 1, lane, rest, locations, PER_WORD, WORDS)
            if is_any_marked(tl.max(((seen != PLAIN) | (second != PLAIN)).to(tl.int32), 1) - 1):
                mask = mask_of(seen == IGNORED, second == IGNORED, T)
                own |= periods_with(seen, of, period, classes, K)
                if PER_WORD == 2:
                    own |= periods_with(second, second_of, period, classes, K)
            ignored += (mask,)
        special = any_bits(own)
        while i < periods:
            group = ()
            for u in tl.static_range(UNROLL):
                group += (load_words(x + u * STEP, left - u * THREADS, T, THREADS, WORDS),)
            for u in tl.static_range(UNROLL):
                words = switch_off(group[u], ignored[u], T)
                if (special >> i) & 1:
                    vector, rest = first + u * THREADS, left - u * THREADS
                    lane = anew(tl.arange(0, THREADS))  # not kept in registers all the time
                    seen, of = seen_in_period(mark, vector, 0, lane, rest, locations, PER_WORD, WORDS)
                    first_own = seen == of + (period + i) * classes
                    second_own = first_own
                    if PER_WORD == 2:
                        seen, of = seen_in_period(mark, vector, 1, lane, rest, locations, PER_WORD, WORDS)
                        second_own = seen == of + (period + i) * classes
                    words = switch_off(words, mask_of(first_own, second_own, T), T)
                acc, twice = add_negatives(
                    words, (out + u * STEP).to(tl.pointer_type(tl.int32)), left - u * THREADS, acc, twice, gamma,
                    factor, T, GAMMA, OUTPUT, WANT_LOSS, THREADS, WORDS,
                )  # fmt: skip
            x += step
            out += step
            i += 1
    else:
        for u in range(UNROLL):
            vector = first + u * THREADS + tl.arange(0, THREADS)
            inside = (vector < end)[:, None]
            of, location = slots_of(vector * VECTOR, 1, VECTOR, locations)
            seen = load_marks(mark, location, inside)
            # A positive's entry is in the period whose first class is this; no other mark is that of a class.
            own = seen - of
            i = tl.zeros((), tl.int32)
            while i < periods:
                off = (own == (period + i) * classes) | (seen == IGNORED)
                by = u * STEP + i * step
                z = tl.load(vectors_at(x + by, THREADS, VECTOR), mask=inside, other=OFF).to(tl.float32)
                loss, slope = focal_negative(tl.where(off, OFF, z), gamma, GAMMA)
                if WANT_LOSS:
                    acc += tl.sum(loss, 1)
                if OUTPUT != NOTHING:
                    value = tl.where(off, 0.0, slope * factor)  # also for a factor of inf
                    tl.store(vectors_at(out + by, THREADS, VECTOR), value.to(T), mask=inside)
                i += 1
    return (tl.sum(acc, 0) + 0.5 * tl.sum(twice, 0)) * negative


@triton.jit(do_not_specialize=["anchors_per_image", "tiles", "loop"])
def dense_kernel(
    lv,
    marks,
    sc,
    nu,
    partial,  # packed: address of this launch's sums
    anchors_per_image: tl.int64,
    tiles,
    loop,  # groups of a program; planes: at most 32
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
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,  # elements of a vector
    ONE_ROW: tl.constexpr,  # see rows_tile
    UNROLL: tl.constexpr,  # vectors of a thread in a group
    SPAN: tl.constexpr,  # rows: a power of two >= the marks of a group
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
                lv, marks, sc, nu, partial, anchors_per_image, gamma, factor, tile, loop, T, K, GAMMA, OUTPUT,
                WEIGHTED, WANT_LOSS, PLANES, THREADS, VECTOR, ONE_ROW, UNROLL, SPAN,
            )  # fmt: skip
            tile += tl.num_programs(0)
    else:
        dense_tile(
            lv, marks, sc, nu, partial, anchors_per_image, gamma, factor, tile, loop, T, K, GAMMA, OUTPUT, WEIGHTED,
            WANT_LOSS, PLANES, THREADS, VECTOR, ONE_ROW, UNROLL, SPAN,
        )  # fmt: skip


@triton.jit
def dense_tile(
    lv, marks, sc, nu, partial, anchors_per_image, gamma, factor, tile, loop,
    T: tl.constexpr, K: tl.constexpr, GAMMA: tl.constexpr, OUTPUT: tl.constexpr, WEIGHTED: tl.constexpr,
    WANT_LOSS: tl.constexpr, PLANES: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr,
    ONE_ROW: tl.constexpr, UNROLL: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    if PLANES:
        loss = planes_tile(
            lv, marks, sc, anchors_per_image, gamma, factor, tile, loop, T, K, GAMMA, OUTPUT, WANT_LOSS, THREADS,
            VECTOR, UNROLL,
        )  # fmt: skip
    else:
        loss = rows_tile(
            lv, marks, sc, nu, anchors_per_image, gamma, factor, tile, loop, T, K, GAMMA, OUTPUT, WEIGHTED, WANT_LOSS,
            THREADS, VECTOR, ONE_ROW, UNROLL, SPAN,
        )  # fmt: skip
    if WANT_LOSS:
        tl.store(pointer(partial[0], tl.float32) + tile, loss)
