"""The last kernel of a sigmoid focal loss: the sum over the tiles of the dense pass, and the positives' own entries."""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import number, pick, pointer
from ._math import weighted_loss
from .coefficients import BATCH, IMAGE, LEVEL
from .focal_dense import LOSS, NOTHING
from .positives import load_marks, marks_at

SUM_BLOCK = tl.constexpr(256)  # losses of tiles added side by side,
SUM_DEPTH = tl.constexpr(32)  # and how many of each are read at once


@triton.jit
def sum_tiles(partial, count, sc, loss):
    """By one program: the classification loss, from the dense pass's float32 losses tile by tile, in a fixed order."""
    acc = tl.zeros((SUM_BLOCK,), tl.float64)
    i0 = tl.zeros((), tl.int32)
    while i0 < count:
        i = i0 + (tl.arange(0, SUM_DEPTH) * SUM_BLOCK)[:, None] + tl.arange(0, SUM_BLOCK)[None, :]
        acc += tl.sum(tl.load(pointer(partial, tl.float32) + i, mask=i < count, other=0.0).to(tl.float64), 0)
        i0 += SUM_DEPTH * SUM_BLOCK
    total = tl.sum(acc, 0) + tl.load(pointer(sc.positives_loss, tl.float32)).to(tl.float64)
    tl.store(pointer(loss, tl.float32), total.to(tl.float32))


@triton.jit
def first_tile(addresses, count, sc, tiles, WANT_LOSS: tl.constexpr):
    """A program's first tile. WANT_LOSS: the first program adds up the losses and has none, the others' count on."""
    tile = tl.program_id(0)
    if WANT_LOSS:
        if tile == 0:
            sum_tiles(addresses[0], pick(count, 0), sc, addresses[1])
            tile = tiles
        else:
            tile -= 1
    return tile


@triton.jit
def scope_norm(sc, scope_ids, level, image, anchor, mask, scopes, SCOPE: tl.constexpr):
    """Eq. 4's normaliser of each anchor of a block, or of all of them."""
    norm = pointer(sc.cls_norm, tl.float32)
    if SCOPE == BATCH:
        return tl.load(norm)
    elif SCOPE == LEVEL:
        return tl.load(norm + level)
    elif SCOPE == IMAGE:
        return tl.load(norm + image)
    else:
        scope = tl.load(scope_ids + anchor, mask=mask, other=0)
        return tl.load(norm + scope, mask=mask & (scope >= 0) & (scope < scopes), other=0.0)


@triton.jit
def own_value(marks, positive, norm, scale, anchor, mask, OUTPUT: tl.constexpr):
    """What a positive's own entry gets: its gradient, or its loss."""
    if OUTPUT == LOSS:
        loss = tl.load(pointer(marks.loss, tl.float32) + anchor, mask=mask, other=0.0)
        return weighted_loss(tl.zeros_like(loss) + positive * norm * scale, loss)
    else:
        slope = tl.load(pointer(marks.slope, tl.float32) + anchor, mask=mask, other=0.0)
        return slope * (positive * norm * scale)


@triton.jit(do_not_specialize=["rows", "scopes", "tiles"])
def focal_finish_kernel(
    marks,
    sc,
    out,
    scope_ids,
    scale_tensor,
    expected_tensor,
    addresses,  # packed: of the dense pass's losses, and of the loss
    count,  # packed: how many losses of tiles
    rows: tl.int64,
    scopes,
    tiles,
    scale: tl.float64,
    expected: tl.float64,
    K: tl.constexpr,
    OUTPUT: tl.constexpr,
    SCOPE: tl.constexpr,
    WANT_LOSS: tl.constexpr,
    MAY_SKIP: tl.constexpr,
    SCALE_GIVEN: tl.constexpr,
    EXPECTED_GIVEN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Of flat rows. WANT_LOSS: the sum is the first program's, the rows are the others'."""
    tile = first_tile(addresses, count, sc, tiles, WANT_LOSS)
    wanted = number(scale_tensor, scale, SCALE_GIVEN)
    if MAY_SKIP:
        if wanted == number(expected_tensor, expected, EXPECTED_GIVEN):
            tile = tiles
    if OUTPUT != NOTHING:
        while tile < tiles:
            row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
            seen = load_marks(marks_at(marks, 0, K), row, row < rows)
            found = seen >= 0
            if tl.max(found.to(tl.int32), 0) > 0:
                positive = tl.load(pointer(sc.positive, tl.float32))
                norm = scope_norm(sc, scope_ids, 0, 0, row, found, scopes, SCOPE)
                value = own_value(marks, positive, norm, wanted.to(tl.float32), row, found, OUTPUT)
                tl.store(out + row * K + seen, value.to(out.dtype.element_ty), mask=found)
            tile += tl.num_programs(0)
