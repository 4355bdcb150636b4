"""The pass over all logits of a sigmoid focal loss: one read of the logits, one write of their gradient.

Every entry is computed as a negative. Where the positives' kernel has marked something in a program's tile, ignored and
positive entries are computed with a logit that gives exactly 0, and the positives' slopes are put in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    MAX_REGISTERS,
    TYPES,
    cdiv,
    gamma_case,
    level_of,
    number,
    pack,
    pick,
    pointer,
    pointer_at,
    power_of_two,
    programs_of,
    widest,
)
from ._math import OFF, focal_negative, weighted_loss
from .coefficients import BATCH, IMAGE, LEVEL, Scratch, finish_loss
from .positives import IGNORED, INVALID, PLAIN, Marks, load_marks, marks_at

NOTHING, GRADIENT, LOSS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what the pass writes per entry
SUM_BLOCK = 2048


class DenseLevels(NamedTuple):
    """Packed tables of the levels of a launch."""

    x: tuple[int, ...]  # addresses of the logits
    out: tuple[int, ...]  # and of what is written
    image_stride: tuple[int, ...]  # elements
    locations: tuple[int, ...]  # of a map; rows: 0
    anchors: tuple[int, ...]  # per location; rows: rows of an image
    first_anchor: tuple[int, ...]  # of an image
    scope_level: tuple[int, ...]  # number of the level among all of them
    tile0: tuple[int, ...]
    tiles: tuple[int, ...]  # per image (rows) or per image and anchor (planes), there without the classes' chunks


class DenseNumbers(NamedTuple):
    """What a positive's or a row's factor is made of, and the gradient's."""

    scope_ids: Any  # per row, or anything
    row_weight: Any  # per row, or anything
    scale: Any  # tensor of one number, or anything: the gradient's factor
    expected: Any  # likewise: the factor that filled buffers have


@triton.jit
def scope_norm(sc, nu, level, image, anchor, mask, scopes, SCOPE: tl.constexpr):
    """Eq. 4's normaliser of each anchor of a block, or of all of them."""
    norm = pointer(sc.cls_norm, tl.float32)
    if SCOPE == BATCH:
        return tl.load(norm)
    elif SCOPE == LEVEL:
        return tl.load(norm + level)
    elif SCOPE == IMAGE:
        return tl.load(norm + image)
    else:
        scope = tl.load(nu.scope_ids + anchor, mask=mask, other=0)
        return tl.load(norm + scope, mask=mask & (scope >= 0) & (scope < scopes), other=0.0)


@triton.jit
def positive_value(marks, positive, norm, scale, anchor, mask, OUTPUT: tl.constexpr):
    """What a positive's own entry gets: its gradient, or its loss."""
    if OUTPUT == LOSS:
        loss = tl.load(pointer(marks.loss, tl.float32) + anchor, mask=mask, other=0.0)
        return weighted_loss(tl.zeros_like(loss) + positive * norm * scale, loss)
    else:
        slope = tl.load(pointer(marks.slope, tl.float32) + anchor, mask=mask, other=0.0)
        return slope * (positive * norm * scale)


@triton.jit
def rows_tile(
    lv, marks, sc, nu, partial, anchors_per_image, scopes, gamma, scale, tile,
    T: tl.constexpr, K: tl.constexpr, GAMMA: tl.constexpr, OUTPUT: tl.constexpr, SCOPE: tl.constexpr,
    WEIGHTED: tl.constexpr, WANT_LOSS: tl.constexpr, VECTOR: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    LOOP: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """BLOCK * LOOP neighbouring entries of the rows of one image and level, seen in groups that lie in one row each."""
    level = level_of(lv.tile0, tile)
    local = tile - pick(lv.tile0, level)
    per_image = pick(lv.tiles, level)
    image = local // per_image
    size = pick(lv.anchors, level) * K
    first = (local - image * per_image) * (BLOCK * LOOP)
    left = tl.minimum(size - first, BLOCK * LOOP)
    if GROUP == 1:  # the mask runs along the vectors: it must be known to change between them only
        left = left // VECTOR * VECTOR
    row0 = first // K  # 32 bits from here on: 64-bit indices would cost a register each
    col0 = first - row0 * K
    offset = tl.cast(image, tl.int64) * pick(lv.image_stride, level) + first
    x_ptr = pointer_at(lv.x, level, T) + offset
    out_ptr = pointer_at(lv.out, level, T) + offset
    anchor0 = tl.cast(image, tl.int64) * anchors_per_image + pick(lv.first_anchor, level) + row0
    mark = marks_at(marks, anchor0, K)
    negative = tl.load(pointer(sc.negative, tl.float32) + image)
    positive = tl.load(pointer(sc.positive, tl.float32) + image)
    factor = negative * scale
    scope_level = pick(lv.scope_level, level)

    rows = tl.arange(0, SPAN)
    marked = load_marks(mark, rows, rows * K < col0 + left)
    # One branch per tile: comparisons of single entries live behind it.
    special = tl.max((marked != PLAIN).to(tl.int32), 0) > 0
    j = tl.arange(0, BLOCK // GROUP) * GROUP
    within = tl.arange(0, GROUP)
    acc = tl.zeros((BLOCK // GROUP,), tl.float32)
    for start in range(0, BLOCK * LOOP, BLOCK):
        at = start + j
        mask = at < left
        where = at[:, None] + within[None, :]
        x_at = x_ptr + where
        out_at = out_ptr + where
        if VECTOR > 1:
            if GROUP == 1:
                x_at = tl.multiple_of(x_at, (16, 1))
                out_at = tl.multiple_of(out_at, (16, 1))
            else:
                x_at = tl.multiple_of(x_at, (1, 16))
                out_at = tl.multiple_of(out_at, (1, 16))
        z = tl.load(x_at, mask=mask[:, None], other=OFF).to(tl.float32)
        row = (col0 + at) // K
        if special:
            seen = load_marks(mark, row, mask)
            column = (col0 + at - row * K)[:, None] + within[None, :]
            off = (seen[:, None] == column) | (seen == IGNORED)[:, None]
            z = tl.where(off, OFF, z)
        loss, slope = focal_negative(z, gamma, GAMMA)
        if WEIGHTED:
            counts = mask & (load_marks(mark, row, mask) != IGNORED)  # the others' may be NaN
            weight = tl.load(nu.row_weight + anchor0 + row, mask=counts, other=0.0).to(tl.float32)
            loss *= weight[:, None]
            slope *= weight[:, None]
        if WANT_LOSS:
            acc += tl.sum(loss, 1)  # 0 where masked
        if OUTPUT != NOTHING:
            value = (loss if OUTPUT == LOSS else slope) * factor
            if special:
                seen = load_marks(mark, row, mask)
                column = (col0 + at - row * K)[:, None] + within[None, :]
                norm = scope_norm(sc, nu, scope_level, image, anchor0 + row, seen >= 0, scopes, SCOPE)
                own = positive_value(marks, positive, norm, scale, anchor0 + row, seen >= 0, OUTPUT)
                value = tl.where(seen[:, None] == column, own[:, None], value)
                value = tl.where((seen == IGNORED)[:, None], 0.0, value)  # also for a factor of inf
                if OUTPUT == LOSS:
                    value = tl.where((seen == INVALID)[:, None], float("nan"), value)
            tl.store(out_at, value.to(T), mask=mask[:, None])
    if WANT_LOSS:
        tl.store(pointer(partial, tl.float32) + tile, tl.sum(acc, 0) * negative)


@triton.jit
def planes_tile(
    lv, marks, sc, nu, partial, anchors_per_image, scopes, gamma, scale, tile,
    T: tl.constexpr, K: tl.constexpr, GAMMA: tl.constexpr, OUTPUT: tl.constexpr, SCOPE: tl.constexpr,
    WANT_LOSS: tl.constexpr, VECTOR: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """BLOCK locations of one (image, anchor) of a map (N, A * K, H, W), walking CHUNK classes, CLASSES at a time."""
    chunks: tl.constexpr = (K + CHUNK - 1) // CHUNK
    level = level_of(lv.tile0, tile)
    local = tile - pick(lv.tile0, level)
    strip = local // chunks
    first_class = (local - strip * chunks) * CHUNK  # fastest: neighbouring programs share their marks
    per_plane = pick(lv.tiles, level)
    anchors = pick(lv.anchors, level)
    locations = pick(lv.locations, level)
    plane = strip // per_plane
    image = plane // anchors
    a = plane - image * anchors
    i = (strip - plane * per_plane) * BLOCK + tl.arange(0, BLOCK)
    inside = i < locations // VECTOR * VECTOR  # VECTOR divides it: as the mask's constancy
    anchor0 = tl.cast(image, tl.int64) * anchors_per_image + pick(lv.first_anchor, level)
    seen = load_marks(marks_at(marks, anchor0 + a * locations, K), i, inside)
    special = tl.max((seen != PLAIN).to(tl.int32), 0) > 0
    negative = tl.load(pointer(sc.negative, tl.float32) + image)
    positive = tl.load(pointer(sc.positive, tl.float32) + image)
    factor = negative * scale
    own = tl.zeros((BLOCK,), tl.float32)
    if special:
        anchor = anchor0 + i * anchors + a
        norm = scope_norm(sc, nu, pick(lv.scope_level, level), image, anchor, seen >= 0, scopes, SCOPE)
        own = positive_value(marks, positive, norm, scale, anchor, seen >= 0, OUTPUT)
    base = tl.cast(image, tl.int64) * pick(lv.image_stride, level)
    base += (tl.cast(a, tl.int64) * K + first_class) * locations
    x_ptr = pointer_at(lv.x, level, T) + base
    out_ptr = pointer_at(lv.out, level, T) + base
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, CHUNK, CLASSES):
        k = start + tl.arange(0, CLASSES)
        where = k[:, None] * locations + i[None, :]  # 32 bits: a chunk of one plane
        mask = (first_class + k < K)[:, None] & inside[None, :]
        x_at = x_ptr + where
        out_at = out_ptr + where
        if VECTOR > 1:
            x_at = tl.multiple_of(x_at, (1, VECTOR * (T.primitive_bitwidth // 8)))
            out_at = tl.multiple_of(out_at, (1, VECTOR * (T.primitive_bitwidth // 8)))
        z = tl.load(x_at, mask=mask, other=OFF).to(tl.float32)
        if special:
            hit = seen[None, :] == (first_class + k)[:, None]
            z = tl.where(hit | (seen == IGNORED)[None, :], OFF, z)
        loss, slope = focal_negative(z, gamma, GAMMA)
        if WANT_LOSS:
            acc += tl.sum(loss, 0)  # along registers: no exchange between threads
        if OUTPUT != NOTHING:
            value = slope * factor
            if special:
                value = tl.where(seen[None, :] == (first_class + k)[:, None], own[None, :], value)
                value = tl.where((seen == IGNORED)[None, :], 0.0, value)  # also for a factor of inf
            tl.store(out_at, value.to(T), mask=mask)
    if WANT_LOSS:
        tl.store(pointer(partial, tl.float32) + tile, tl.sum(acc, 0) * negative)


@triton.jit(do_not_specialize=["anchors_per_image", "scopes", "tiles"])
def dense_kernel(
    lv,
    marks,
    sc,
    nu,
    addresses,  # packed: of this launch's sums, of all launches', and of the loss
    all_partials,  # packed: how many sums there are with those of launches before; 0: another launch follows
    anchors_per_image: tl.int64,
    scopes,
    tiles,
    gamma: tl.float32,
    scale: tl.float64,
    expected: tl.float64,
    T: tl.constexpr,
    K: tl.constexpr,
    GAMMA: tl.constexpr,
    OUTPUT: tl.constexpr,
    SCOPE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WANT_LOSS: tl.constexpr,
    MAY_SKIP: tl.constexpr,
    SCALE_GIVEN: tl.constexpr,
    EXPECTED_GIVEN: tl.constexpr,
    PLANES: tl.constexpr,
    VECTOR: tl.constexpr,  # elements per access
    GROUP: tl.constexpr,  # rows: entries of one row side by side; planes: classes at a time
    BLOCK: tl.constexpr,
    LOOP: tl.constexpr,  # rows: blocks of a program; planes: classes of a program
    SPAN: tl.constexpr,  # rows: a power of two >= the rows that a program touches
    SUM_BLOCK: tl.constexpr,
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
                lv, marks, sc, nu, addresses[0], anchors_per_image, scopes, gamma, factor, tile, T, K, GAMMA, OUTPUT,
                SCOPE, WEIGHTED, WANT_LOSS, PLANES, VECTOR, GROUP, BLOCK, LOOP, SPAN,
            )  # fmt: skip
            tile += tl.num_programs(0)
    else:
        dense_tile(
            lv, marks, sc, nu, addresses[0], anchors_per_image, scopes, gamma, factor, tile, T, K, GAMMA, OUTPUT,
            SCOPE, WEIGHTED, WANT_LOSS, PLANES, VECTOR, GROUP, BLOCK, LOOP, SPAN,
        )  # fmt: skip
    if WANT_LOSS:
        count = pick(all_partials, 0)
        if count > 0:
            finish_loss(addresses[1], count, sc, addresses[2], SUM_BLOCK)


@triton.jit
def dense_tile(
    lv, marks, sc, nu, partial, anchors_per_image, scopes, gamma, factor, tile,
    T: tl.constexpr, K: tl.constexpr, GAMMA: tl.constexpr, OUTPUT: tl.constexpr, SCOPE: tl.constexpr,
    WEIGHTED: tl.constexpr, WANT_LOSS: tl.constexpr, PLANES: tl.constexpr, VECTOR: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, LOOP: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    if PLANES:
        planes_tile(
            lv, marks, sc, nu, partial, anchors_per_image, scopes, gamma, factor, tile, T, K, GAMMA, OUTPUT, SCOPE,
            WANT_LOSS, VECTOR, GROUP, BLOCK, LOOP,
        )  # fmt: skip
    else:
        rows_tile(
            lv, marks, sc, nu, partial, anchors_per_image, scopes, gamma, factor, tile, T, K, GAMMA, OUTPUT, SCOPE,
            WEIGHTED, WANT_LOSS, VECTOR, GROUP, BLOCK, LOOP, SPAN,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------- launcher


@dataclass
class DenseLevel:
    """A level as the launcher sees it."""

    x: Tensor
    out: Tensor | None
    x_offset: int  # elements from the tensor's start
    image_stride: int
    rows: int  # anchors of an image
    first_anchor: int
    scope_level: int
    planes: bool = False
    locations: int = 0
    anchors: int = 1  # per location

    def addresses(self) -> tuple[int, int]:
        start = self.x_offset * self.x.element_size()
        x = self.x.data_ptr() + start
        return x, x if self.out is None else self.out.data_ptr() + start


@dataclass
class DensePass:
    """All launches of the pass over the logits of one loss."""

    marks: Marks
    scratch: Scratch
    levels: Sequence[DenseLevel]
    images: int
    classes: int
    anchors_per_image: int
    gamma: float
    scope: int
    scopes: int
    output: int = NOTHING.value
    scope_ids: Tensor | None = None
    row_weight: Tensor | None = None
    scale: tuple[Tensor | None, float] = (None, 1.0)
    expected: tuple[Tensor | None, float] = (None, 1.0)
    may_skip: bool = False
    loss: Tensor | None = None

    def launch(self, memory: Any) -> None:
        plans = [plan for plan in (self.plan(group) for group in self.groups()) if plan["tiles"] > 0]
        total = sum(plan["tiles"] for plan in plans)
        partial = memory.take(total, 4) if self.loss is not None else 0
        done = 0
        for plan in plans:
            last = plan is plans[-1]
            self.run(plan, partial, partial + 4 * done, done + plan["tiles"] if last else 0)
            done += plan["tiles"]

    def groups(self) -> list[list[DenseLevel]]:
        """Levels of one launch: rows; planes whose locations the widest access divides, by the largest of them."""
        rows = [level for level in self.levels if not level.planes]
        planes = [level for level in self.levels if level.planes]
        if not planes:
            return [rows] if rows else []
        width = self.vector([max(planes, key=lambda level: level.locations)])
        wide = [level for level in planes if self.vector([level]) >= width]
        narrow = [level for level in planes if self.vector([level]) < width]
        return [group for group in (rows, wide, narrow) if group]

    def vector(self, group: Sequence[DenseLevel]) -> int:
        """Elements per access that addresses and sizes of these levels allow."""
        size = group[0].x.element_size()
        numbers = []
        for level in group:
            numbers += level.addresses()
            if self.images > 1:
                numbers.append(level.image_stride * size)
            numbers.append((level.locations if level.planes else level.rows * self.classes) * size)
        return widest(size, *numbers)

    def plan(self, group: Sequence[DenseLevel]) -> dict[str, Any]:
        """Tiles and constants of a launch. Four warps; every thread has 64 bytes of logits in flight or more."""
        size, vector = group[0].x.element_size(), self.vector(group)
        planes = group[0].planes
        if planes:
            full = 128 * 16 // size  # 16 bytes of each thread
            block = min(full, max(power_of_two(max(level.locations for level in group)), 32))
            classes = min(2 * full // block, 8, power_of_two(self.classes))
            chunk = min(16, cdiv(self.classes, classes) * classes)
            consts = {"VECTOR": vector, "GROUP": classes, "BLOCK": block, "LOOP": chunk, "SPAN": 1}
            tiles = [cdiv(level.locations, block) for level in group]
            counts = [self.images * level.anchors * tile for level, tile in zip(group, tiles)]
            counts = [count * cdiv(self.classes, chunk) for count in counts]
        else:
            aligned = vector == 16 // size
            per_group = next(width for width in (8, 4, 2, 1) if self.classes % width == 0)
            per_group = per_group if per_group * size >= 16 or not aligned else 1
            block, loop = (2048, 4) if per_group > 1 else (1024, 8)  # GROUP 1: a mark of its own per entry
            most = max(level.rows * self.classes for level in group)
            while block > 256 and block * loop >= 2 * most:  # small inputs: programs without much idle space
                block, loop = (block, loop // 2) if loop > 1 else (block // 2, loop)
            span = power_of_two((block * loop - 1) // self.classes + 2)
            consts = {
                "VECTOR": vector if aligned else 1,
                "GROUP": per_group,
                "BLOCK": block,
                "LOOP": loop,
                "SPAN": span,
            }
            tiles = [cdiv(level.rows * self.classes, block * loop) for level in group]
            counts = [self.images * tile for tile in tiles]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        addresses = [level.addresses() for level in group]
        table = DenseLevels(
            pack(*(x for x, _ in addresses)),
            pack(*(out for _, out in addresses)),
            pack(*(level.image_stride for level in group)),
            pack(*(level.locations for level in group)),
            pack(*(level.anchors if level.planes else level.rows for level in group)),
            pack(*(level.first_anchor for level in group)),
            pack(*(level.scope_level for level in group)),
            pack(*starts),
            pack(*tiles),
        )
        return {"tiles": sum(counts), "table": table, "planes": planes, "consts": consts, "x": group[0].x}

    def run(self, plan: dict[str, Any], partials: int, own: int, count: int) -> None:
        x = plan["x"]
        want_loss = self.loss is not None
        numbers = DenseNumbers(
            x if self.scope_ids is None else self.scope_ids,
            x if self.row_weight is None else self.row_weight,
            x if self.scale[0] is None else self.scale[0],
            x if self.expected[0] is None else self.expected[0],
        )
        dense_kernel[(programs_of(plan["tiles"], self.may_skip, x),)](
            plan["table"],
            self.marks,
            self.scratch,
            numbers,
            pack(own, partials, self.loss.data_ptr() if want_loss else 0),
            pack(count),
            self.anchors_per_image,
            self.scopes,
            plan["tiles"],
            self.gamma,
            self.scale[1],
            self.expected[1],
            T=TYPES[x.dtype],
            K=self.classes,
            GAMMA=gamma_case(self.gamma),
            OUTPUT=self.output,
            SCOPE=self.scope,
            WEIGHTED=self.row_weight is not None,
            WANT_LOSS=want_loss,
            MAY_SKIP=self.may_skip,
            SCALE_GIVEN=self.scale[0] is not None,
            EXPECTED_GIVEN=self.expected[0] is not None,
            PLANES=plan["planes"],
            SUM_BLOCK=SUM_BLOCK,
            num_warps=4,
            maxnreg=MAX_REGISTERS,
            **plan["consts"],
        )
