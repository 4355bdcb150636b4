"""The fused detection loss: its positives, the pass over the logits (focal_dense.py), the gradient of the deltas.

Launches: positives, coefficients, logits, deltas; logits of mixed layouts or widths take another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import positives
from ._launch import (
    MAX_REGISTERS,
    TYPES,
    Workspace,
    cdiv,
    level_of,
    number,
    on_device,
    pack,
    pick,
    pointer,
    power_of_two,
    programs_of,
    widest,
)
from ._math import balance_share, delta_iou, encode_box, focal_positive, iou_power, is_degenerate, smooth_l1, weighted_loss
from .coefficients import BATCH, IMAGE, LEVEL, Coefficients, clear_tickets, take_scratch
from .focal_dense import GRADIENT, NOTHING, DenseLevel, DensePass
from .positives import IGNORED, PLAIN, POSITIVE, collect, listed_at, store_sums

LOC_BLOCK = 256  # anchors of a program of the deltas' gradient
ROWS, PLANES, STRIDED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # how a gradient of deltas lies


class Levels(NamedTuple):
    """Packed tables of all levels. A level's positions are its anchors in the order h, w, a."""

    logits: tuple[int, ...]  # addresses
    image_stride: tuple[int, ...]  # of the logits, elements
    planes: tuple[int, ...]  # whether the logits lie by planes (NCHW), else by rows
    deltas: tuple[int, ...]  # addresses; then their strides, in elements
    d_image: tuple[int, ...]
    d_anchor: tuple[int, ...]
    d_row: tuple[int, ...]
    d_column: tuple[int, ...]
    d_coordinate: tuple[int, ...]
    positions: tuple[int, ...]
    width: tuple[int, ...]
    anchors: tuple[int, ...]  # per location
    first_anchor: tuple[int, ...]
    tile0: tuple[int, ...]
    tiles: tuple[int, ...]  # per image


class GroundTruth(NamedTuple):
    """Boxes and labels of the images: one address each, or a single one of padded tensors."""

    boxes: tuple[int, ...]
    labels: tuple[int, ...]
    counts: tuple[int, ...]


class Numbers(NamedTuple):
    """The losses' numbers, float64."""

    eta: float
    positive_factor: float
    gamma: float
    lambda_: float
    beta: float
    w0: float
    w1: float
    w2: float
    w3: float


@triton.jit
def load_box(start, at, mask):
    """x1 y1 x2 y2 in float64."""
    b0 = tl.load(start + at, mask=mask, other=0.0).to(tl.float64)
    b1 = tl.load(start + at + 1, mask=mask, other=0.0).to(tl.float64)
    b2 = tl.load(start + at + 2, mask=mask, other=1.0).to(tl.float64)
    b3 = tl.load(start + at + 3, mask=mask, other=1.0).to(tl.float64)
    return b0, b1, b2, b3


@triton.jit
def load_target(
    lv, gt, anchors, level, image, position, matched, mask, anchors_per_image,
    w0, w1, w2, w3, BOX_T: tl.constexpr, PADDED: tl.constexpr, OWN_ANCHORS: tl.constexpr, FOVEA: tl.constexpr,
):  # fmt: skip
    """Target deltas of positives, and whether an anchor or a box is degenerate."""
    anchor = tl.cast(pick(lv.first_anchor, level) + position, tl.int64)
    if OWN_ANCHORS:
        anchor += tl.cast(image, tl.int64) * anchors_per_image
    a0, a1, a2, a3 = load_box(anchors, 4 * anchor, mask)
    if PADDED:
        boxes = pointer(gt.boxes[0], BOX_T) + 4 * tl.cast(image, tl.int64) * pick(gt.counts, 0)
    else:
        boxes = pick(gt.boxes, image).to(tl.pointer_type(BOX_T))
    b0, b1, b2, b3 = load_box(boxes, 4 * matched.to(tl.int64), mask)
    degenerate = is_degenerate(a0, a1, a2, a3) | is_degenerate(b0, b1, b2, b3)
    # A side of 1 in place of those that are not positive: what comes of it is not used.
    a2 = tl.where(degenerate, a0 + 1.0, a2)
    a3 = tl.where(degenerate, a1 + 1.0, a3)
    b2 = tl.where(degenerate, b0 + 1.0, b2)
    b3 = tl.where(degenerate, b1 + 1.0, b3)
    t0, t1, t2, t3 = encode_box(b0, b1, b2, b3, a0, a1, a2, a3, w0, w1, w2, w3, FOVEA)
    return t0, t1, t2, t3, degenerate


@triton.jit
def load_deltas(lv, level, image, position, mask, T: tl.constexpr):
    """Predicted deltas in float64, whatever their strides."""
    anchors = pick(lv.anchors, level)
    width = pick(lv.width, level)
    location = position // anchors
    at = tl.cast(image, tl.int64) * pick(lv.d_image, level)
    at += (position - location * anchors).to(tl.int64) * pick(lv.d_anchor, level)
    at += (location // width).to(tl.int64) * pick(lv.d_row, level)
    at += (location % width).to(tl.int64) * pick(lv.d_column, level)
    step = pick(lv.d_coordinate, level)
    start = pick(lv.deltas, level).to(tl.pointer_type(T))
    p0 = tl.load(start + at, mask=mask, other=0.0).to(tl.float64)
    p1 = tl.load(start + at + step, mask=mask, other=0.0).to(tl.float64)
    p2 = tl.load(start + at + 2 * step, mask=mask, other=0.0).to(tl.float64)
    p3 = tl.load(start + at + 3 * step, mask=mask, other=0.0).to(tl.float64)
    return p0, p1, p2, p3


@triton.jit(do_not_specialize=["anchors_per_image", "all_tiles"])
def detection_positives_kernel(
    lv,
    gt,
    marks,
    sc,
    matched_idxs,
    anchors,
    anchors_per_image: tl.int64,
    all_tiles,
    eta: tl.float64,
    positive_factor: tl.float64,
    gamma: tl.float64,
    lambda_: tl.float64,
    beta: tl.float64,
    w0: tl.float64,
    w1: tl.float64,
    w2: tl.float64,
    w3: tl.float64,
    T: tl.constexpr,
    DELTA_T: tl.constexpr,
    BOX_T: tl.constexpr,
    LABEL_T: tl.constexpr,
    CLASSES: tl.constexpr,
    PADDED: tl.constexpr,
    OWN_ANCHORS: tl.constexpr,
    FOVEA: tl.constexpr,
    SAME_POWER: tl.constexpr,  # lambda = eta
    TILE: tl.constexpr,
    LANES: tl.constexpr,
):
    clear_tickets(sc)
    tile = tl.program_id(0)
    level = level_of(lv.tile0, tile)
    local = tile - pick(lv.tile0, level)
    per_image = pick(lv.tiles, level)
    image = local // per_image
    first = (local - image * per_image) * TILE
    anchor0 = tl.cast(image, tl.int64) * anchors_per_image + pick(lv.first_anchor, level)
    per_location = pick(lv.anchors, level)
    locations = pick(lv.positions, level) // per_location
    planes = pick(lv.planes, level)

    position = first + tl.arange(0, TILE)
    inside = position < pick(lv.positions, level)
    value = tl.load(matched_idxs + anchor0 + position, mask=inside, other=-1).to(tl.int64)
    positive = inside & (value != -1) & (value != -2)
    location = position // per_location
    place = tl.where(planes != 0, (position - location * per_location) * locations + location, position)
    code = tl.where(positive, POSITIVE, tl.where(value == -2, IGNORED, PLAIN))
    tl.store(pointer(marks.code, tl.int8) + anchor0 + place, code.to(tl.int8), mask=inside)

    count = collect(marks, positive, TILE)
    boxes_here = pick(gt.counts, 0)
    labels = pick(gt.labels, 0).to(tl.pointer_type(LABEL_T))
    if PADDED:
        labels += tl.cast(image, tl.int64) * boxes_here
    else:
        boxes_here = pick(gt.counts, image)
        labels = pick(gt.labels, image).to(tl.pointer_type(LABEL_T))
    number_of = tl.zeros((LANES,), tl.float64)
    ious = tl.zeros((LANES,), tl.float64)
    bad = tl.zeros((LANES,), tl.float64)
    cls_plain = tl.zeros((LANES,), tl.float64)
    cls_weighted = tl.zeros((LANES,), tl.float64)
    cls_loss = tl.zeros((LANES,), tl.float64)
    loc_plain = tl.zeros((LANES,), tl.float64)
    loc_weighted = tl.zeros((LANES,), tl.float64)
    loc_loss = tl.zeros((LANES,), tl.float64)
    done = tl.zeros((), tl.int32)
    while done < count:
        listed, mask = listed_at(marks, done, count, TILE, LANES)
        row = first + listed
        anchor = anchor0 + row
        match = tl.load(matched_idxs + anchor, mask=mask, other=-1).to(tl.int64)
        known = mask & (match >= 0) & (match < boxes_here)
        label = tl.load(labels + match, mask=known, other=-1).to(tl.int64)
        good = known & (label >= 0) & (label < CLASSES)
        label = tl.where(good, label, -1).to(tl.int32)
        cell = row // per_location
        a = row - cell * per_location
        entry = tl.where(
            planes != 0,
            (a * CLASSES + label).to(tl.int64) * locations + cell,
            row.to(tl.int64) * CLASSES + label,
        )
        entry += tl.cast(image, tl.int64) * pick(lv.image_stride, level)
        logit = tl.load(pick(lv.logits, level).to(tl.pointer_type(T)) + entry, mask=good, other=0.0)
        t0, t1, t2, t3, degenerate = load_target(
            lv, gt, anchors, level, image, row, match, good, anchors_per_image, w0, w1, w2, w3, BOX_T, PADDED,
            OWN_ANCHORS, FOVEA,
        )  # fmt: skip
        p0, p1, p2, p3 = load_deltas(lv, level, image, row, good & (degenerate == 0), DELTA_T)
        iou = delta_iou(p0, p1, p2, p3, t0, t1, t2, t3, w0, w1, w2, w3, FOVEA)
        l0, g0 = smooth_l1(p0 - t0, beta)
        l1, g1 = smooth_l1(p1 - t1, beta)
        l2, g2 = smooth_l1(p2 - t2, beta)
        l3, g3 = smooth_l1(p3 - t3, beta)
        iou = tl.where(degenerate, 0.0, iou)
        localisation = tl.where(degenerate, 0.0, l0 + l1 + l2 + l3)
        balance = iou_power(iou, eta)
        loc_balance = balance
        if not SAME_POWER:
            loc_balance = iou_power(iou, lambda_)
        loss, slope = focal_positive(logit.to(tl.float64), gamma)
        plain, weighted = balance_share(positive_factor * loss, balance)
        loc, loc_share = balance_share(localisation, loc_balance)
        number_of += tl.where(good, 1.0, 0.0)
        ious += tl.where(good, iou, 0.0)
        bad += tl.where(mask & (good == 0), 1.0, 0.0)
        cls_plain += tl.where(good, plain, 0.0)
        cls_weighted += tl.where(good, weighted, 0.0)
        cls_loss += tl.where(good, weighted_loss(balance, positive_factor * loss), 0.0)
        loc_plain += tl.where(good, loc, 0.0)
        loc_weighted += tl.where(good, loc_share, 0.0)
        loc_loss += tl.where(good, weighted_loss(loc_balance, localisation), 0.0)
        loc_weight = tl.where(good & (degenerate == 0), loc_balance, 0.0)
        tl.store(pointer(marks.label, tl.int32) + anchor, label, mask=mask)
        tl.store(pointer(marks.slope, tl.float32) + anchor, (balance * slope).to(tl.float32), mask=good)
        tl.store(pointer(marks.loc_weight, tl.float32) + anchor, loc_weight.to(tl.float32), mask=mask)
        done += LANES
    store_sums(
        sc, 0, 1, all_tiles, number_of, ious, bad, cls_plain, cls_weighted, cls_loss, loc_plain, loc_weighted, loc_loss
    )


@triton.jit(do_not_specialize=["anchors_per_image", "tiles"])
def deltas_kernel(
    lv,  # tile0 and tiles: of this launch
    out,  # packed addresses of the gradients
    strides,  # packed: of the gradients; per level image, anchor, row, column, coordinate
    gt,
    marks,
    sc,
    matched_idxs,
    anchors,
    scale_tensor,
    expected_tensor,
    anchors_per_image: tl.int64,
    tiles,
    scale: tl.float64,
    expected: tl.float64,
    beta: tl.float64,
    w0: tl.float64,
    w1: tl.float64,
    w2: tl.float64,
    w3: tl.float64,
    DELTA_T: tl.constexpr,
    BOX_T: tl.constexpr,
    PADDED: tl.constexpr,
    OWN_ANCHORS: tl.constexpr,
    FOVEA: tl.constexpr,
    SCOPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    MAY_SKIP: tl.constexpr,
    SCALE_GIVEN: tl.constexpr,
    EXPECTED_GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of the deltas: zeros, but for the positives."""
    tile = tl.program_id(0)
    wanted = number(scale_tensor, scale, SCALE_GIVEN)
    if MAY_SKIP:
        if wanted == number(expected_tensor, expected, EXPECTED_GIVEN):
            tile = tiles
    while tile < tiles:
        level = level_of(lv.tile0, tile)
        local = tile - pick(lv.tile0, level)
        per_image = pick(lv.tiles, level)
        image = local // per_image
        chunk = local - image * per_image
        per_location = pick(lv.anchors, level)
        positions = pick(lv.positions, level)
        locations = positions // per_location
        anchor0 = tl.cast(image, tl.int64) * anchors_per_image + pick(lv.first_anchor, level)
        if LAYOUT == PLANES:  # neighbouring threads at neighbouring locations
            strips = (locations + BLOCK - 1) // BLOCK
            a = chunk // strips
            location = (chunk - a * strips) * BLOCK + tl.arange(0, BLOCK)
            inside = location < locations
            position = location * per_location + a
        else:
            position = chunk * BLOCK + tl.arange(0, BLOCK)
            inside = position < positions
            location = position // per_location
            a = position - location * per_location
        place = tl.where(pick(lv.planes, level) != 0, a * locations + location, position)
        seen = tl.load(pointer(marks.code, tl.int8) + anchor0 + place, mask=inside, other=0).to(tl.int32)
        found = seen == POSITIVE
        g0 = tl.zeros((BLOCK,), tl.float32)
        g1 = tl.zeros((BLOCK,), tl.float32)
        g2 = tl.zeros((BLOCK,), tl.float32)
        g3 = tl.zeros((BLOCK,), tl.float32)
        if tl.max(found.to(tl.int32), 0) > 0:
            anchor = anchor0 + position
            weight = tl.load(pointer(marks.loc_weight, tl.float32) + anchor, mask=found, other=0.0)
            found = found & (weight != 0.0)
            value = tl.load(matched_idxs + anchor, mask=found, other=0)
            t0, t1, t2, t3, degenerate = load_target(
                lv, gt, anchors, level, image, position, value, found, anchors_per_image, w0, w1, w2, w3, BOX_T,
                PADDED, OWN_ANCHORS, FOVEA,
            )  # fmt: skip
            p0, p1, p2, p3 = load_deltas(lv, level, image, position, found, DELTA_T)
            norm = pointer(sc.loc_norm, tl.float32) + (
                image if SCOPE == IMAGE else (level if SCOPE == LEVEL else 0)
            )
            factor = tl.load(pointer(sc.location, tl.float32) + image) * tl.load(norm) * wanted.to(tl.float32)
            l0, s0 = smooth_l1(p0 - t0, beta)
            l1, s1 = smooth_l1(p1 - t1, beta)
            l2, s2 = smooth_l1(p2 - t2, beta)
            l3, s3 = smooth_l1(p3 - t3, beta)
            g0 = tl.where(found, s0.to(tl.float32) * (weight * factor), 0.0)
            g1 = tl.where(found, s1.to(tl.float32) * (weight * factor), 0.0)
            g2 = tl.where(found, s2.to(tl.float32) * (weight * factor), 0.0)
            g3 = tl.where(found, s3.to(tl.float32) * (weight * factor), 0.0)
        start = pick(out, level).to(tl.pointer_type(DELTA_T)) + tl.cast(image, tl.int64) * pick(strides[0], level)
        if LAYOUT == ROWS:  # four neighbours of each anchor: one access
            four = tl.join(tl.join(g0, g2), tl.join(g1, g3)).reshape((BLOCK, 4)).to(DELTA_T)
            at = start + (4 * position)[:, None] + tl.arange(0, 4)[None, :]
            if ALIGNED:
                at = tl.multiple_of(at, (1, 4 * (DELTA_T.primitive_bitwidth // 8)))
            tl.store(at, four, mask=inside[:, None])
        else:
            width = pick(lv.width, level)
            at = a.to(tl.int64) * pick(strides[1], level) + (location // width).to(tl.int64) * pick(strides[2], level)
            at += (location % width).to(tl.int64) * pick(strides[3], level)
            if LAYOUT == PLANES:
                at = tl.cast(a, tl.int64) * pick(strides[1], level) + location
            step = pick(strides[4], level)
            tl.store(start + at, g0.to(DELTA_T), mask=inside)
            tl.store(start + at + step, g1.to(DELTA_T), mask=inside)
            tl.store(start + at + 2 * step, g2.to(DELTA_T), mask=inside)
            tl.store(start + at + 3 * step, g3.to(DELTA_T), mask=inside)
        tile += tl.num_programs(0)


# ---------------------------------------------------------------------------------------------- launchers


def _delta_strides(t: Tensor) -> tuple[int, int, int, int, int]:
    """Of image, anchor of a location, row, column, coordinate. Flat: every row of the tensor is a row of the map."""
    if t.ndim == 3:
        return t.stride(0), 0, t.stride(1), 0, t.stride(2)
    return t.stride(0), 4 * t.stride(1), t.stride(2), t.stride(3), t.stride(1)


def _common_layout(grads: Sequence[Tensor]) -> int:
    """How one launch sees the gradients; a map of one location is rows and planes alike."""

    def allowed(grad: Tensor) -> set[int]:
        _, _, row, column, coordinate = _delta_strides(grad)
        if grad.ndim == 3:
            return {ROWS.value} if (row, coordinate) == (4, 1) else set()
        _, channels, height, width = grad.shape
        found = set()
        if coordinate == 1 and (column == channels or width == 1) and (row == width * channels or height == 1):
            found.add(ROWS.value)
        if (column == 1 or width == 1) and (row == width or height == 1):
            found.add(PLANES.value)
        return found

    common = set.intersection(*(allowed(grad) for grad in grads))
    return min(common, default=STRIDED.value)


class _Level(NamedTuple):
    """A level of the heads; flat tensors are cut into their levels where the sums are."""

    tensor: int  # number of its tensor in the lists
    first_row: int  # in a flat tensor
    positions: int
    width: int
    anchors: int
    first_anchor: int
    planes: bool


class _Detection:
    """The launches of one call, from the arguments that all three ops share."""

    def __init__(
        self,
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        anchors: Tensor,
        matched_idxs: Tensor,
        gt_boxes: Sequence[Tensor],
        gt_labels: Sequence[Tensor],
        level_sizes: Sequence[int],
        scope: int,
        eta: float,
        alpha: float,
        gamma: float,
        lambda_: float,
        beta: float,
        box_coder: int,
        box_weights: Sequence[float],
        workspace: Sequence[Tensor],
    ) -> None:
        self.logits, self.deltas, self.anchors, self.matched = logits, deltas, anchors, matched_idxs
        self.gt_boxes, self.scope, self.alpha, self.gamma, self.beta = gt_boxes, scope, alpha, gamma, beta
        self.eta, self.lambda_, self.fovea, self.weights = eta, lambda_, box_coder == 1, list(box_weights)
        self.images, self.per_image = matched_idxs.shape
        self.classes = 0
        self.levels = self._levels(level_sizes)
        self.scopes = {BATCH.value: 1, LEVEL.value: len(level_sizes), IMAGE.value: self.images}[scope]
        self.padded = len(gt_boxes) == 1 and gt_boxes[0].ndim == 3
        entries = max(power_of_two(len(gt_boxes)), 1)  # powers of two: few variants to compile

        def filled(values: list[int]) -> tuple[int, ...]:
            return pack(*values, *[values[-1] if values else 0] * (entries - len(values)))

        self.truth = GroundTruth(
            filled([t.data_ptr() for t in gt_boxes]),
            filled([t.data_ptr() for t in gt_labels]),
            filled([t.shape[1 if self.padded else 0] for t in gt_boxes]),
        )
        self.label_type = TYPES[gt_labels[0].dtype] if gt_labels else tl.int64
        self.box_type = TYPES[gt_boxes[0].dtype] if gt_boxes else tl.float32
        tiles = [cdiv(level.positions, positives.TILE) for level in self.levels]
        starts = [sum(tiles[:i]) * self.images for i in range(len(tiles))]
        self.tile0, self.tiles = pack(*starts), pack(*tiles)
        self.all_tiles = sum(tiles) * self.images
        self.memory = Workspace(workspace)
        segments = len(self.levels) * self.images
        self.scratch = take_scratch(self.memory, self.all_tiles, 1, segments, self.images, self.scopes)
        self.marks = positives.take_marks(
            self.memory, self.images * self.per_image, self.all_tiles, loss=False, location=True
        )
        self.table = self._table(self.tile0, self.tiles)

    @property
    def empty(self) -> bool:
        return self.all_tiles == 0

    def _levels(self, level_sizes: Sequence[int]) -> list[_Level]:
        levels, first = [], 0
        for i, (x, d) in enumerate(zip(self.logits, self.deltas, strict=True)):
            if x.ndim == 3:
                self.classes, row = x.shape[2], 0
                cut = self.scope == LEVEL.value and len(level_sizes) > 1
                for size in level_sizes if cut else [x.shape[1]]:
                    levels.append(_Level(i, row, size, 1, 1, row, False))
                    row += size
                continue
            per_location = d.shape[1] // 4
            self.classes = x.shape[1] // max(per_location, 1)
            positions = x.shape[2] * x.shape[3] * per_location
            planes = not (x.stride(1) == 1 and x.shape[1] > 1)
            levels.append(_Level(i, 0, positions, max(x.shape[3], 1), per_location, first, planes))
            first += positions
        # A map of one location is rows and planes alike: as the others are, so that one launch serves all.
        single = [self.logits[v.tensor].ndim == 4 and v.positions == v.anchors for v in levels]
        any_planes = any(v.planes and not one for v, one in zip(levels, single))
        return [v._replace(planes=any_planes) if one else v for v, one in zip(levels, single)]

    def _table(self, tile0: tuple[int, ...], tiles: tuple[int, ...]) -> Levels:
        columns: list[list[int]] = [[] for _ in range(13)]
        for level in self.levels:
            x, d = self.logits[level.tensor], self.deltas[level.tensor]
            strides = _delta_strides(d)
            row = level.first_row
            values = (
                x.data_ptr() + row * self.classes * x.element_size(),
                x.numel() // max(x.shape[0], 1),
                int(level.planes),
                d.data_ptr() + row * strides[2] * d.element_size(),
                *strides,
                level.positions,
                level.width,
                max(level.anchors, 1),
                level.first_anchor,
            )
            for column, value in zip(columns, values, strict=True):
                column.append(value)
        return Levels(*(pack(*column) for column in columns), tile0, tiles)

    def find_positives(self) -> None:
        detection_positives_kernel[(self.all_tiles,)](
            self.table,
            self.truth,
            self.marks,
            self.scratch,
            self.matched,
            self.anchors,
            self.per_image,
            self.all_tiles,
            self.eta,
            1.0 if self.alpha < 0 else self.alpha,
            self.gamma,
            self.lambda_,
            self.beta,
            *self.weights,
            T=TYPES[self.logits[0].dtype],
            DELTA_T=TYPES[self.deltas[0].dtype],
            BOX_T=self.box_type,
            LABEL_T=self.label_type,
            CLASSES=self.classes,
            PADDED=self.padded,
            OWN_ANCHORS=self.anchors.ndim == 3,
            FOVEA=self.fovea,
            SAME_POWER=self.lambda_ == self.eta,
            TILE=positives.TILE,
            LANES=positives.LANES,
            num_warps=4,
        )

    def coefficients(self, sums: Tensor, compute_sums: bool) -> Coefficients:
        return Coefficients(
            self.scratch,
            sums,
            self.all_tiles,
            self.scopes,
            self.scope,
            compute_sums,
            images=self.images,
            levels=len(self.levels),
            tile0=self.tile0,
            tiles=self.tiles,
            alpha=self.alpha,
        )

    def fill_logits(self, grads: Sequence[Tensor], **options: Any) -> None:
        """The pass over the logits; no gradients: only the loss."""
        levels = [
            DenseLevel(
                self.logits[level.tensor],
                grads[level.tensor] if grads else None,
                level.first_row * self.classes,
                self.logits[level.tensor].numel() // max(self.images, 1),
                level.positions,
                level.first_anchor,
                i,
                level.planes,
                level.positions // max(level.anchors, 1),
                level.anchors,
            )
            for i, level in enumerate(self.levels)
            if level.positions > 0
        ]
        DensePass(
            self.marks,
            self.scratch,
            levels,
            self.images,
            self.classes,
            self.per_image,
            self.gamma,
            self.scope,
            self.scopes,
            GRADIENT.value if grads else NOTHING.value,
            **options,
        ).launch(self.memory)

    def fill_deltas(self, grads: Sequence[Tensor], scale: Any, expected: Any, may_skip: bool) -> None:
        common = _common_layout(grads)
        counts = []
        for level in self.levels:
            if common == PLANES.value:
                counts.append(cdiv(level.positions // max(level.anchors, 1), LOC_BLOCK) * level.anchors)
            else:
                counts.append(cdiv(level.positions, LOC_BLOCK))
        starts = [sum(counts[:i]) * self.images for i in range(len(counts))]
        tiles = sum(counts) * self.images
        addresses, strides = [], []
        for level in self.levels:
            grad = grads[level.tensor]
            strides.append(_delta_strides(grad))
            addresses.append(grad.data_ptr() + level.first_row * strides[-1][2] * grad.element_size())
        size = grads[0].element_size()
        distances = [stride[0] * size for stride in strides]
        deltas_kernel[(programs_of(tiles, may_skip, grads[0]),)](
            self.table._replace(tile0=pack(*starts), tiles=pack(*counts)),
            pack(*addresses),
            tuple(pack(*column) for column in zip(*strides)),
            self.truth,
            self.marks,
            self.scratch,
            self.matched,
            self.anchors,
            grads[0] if scale[0] is None else scale[0],
            grads[0] if expected[0] is None else expected[0],
            self.per_image,
            tiles,
            scale[1],
            expected[1],
            self.beta,
            *self.weights,
            DELTA_T=TYPES[grads[0].dtype],
            BOX_T=self.box_type,
            PADDED=self.padded,
            OWN_ANCHORS=self.anchors.ndim == 3,
            FOVEA=self.fovea,
            SCOPE=self.scope,
            LAYOUT=common,
            ALIGNED=widest(size, *addresses, *distances) * size >= min(4 * size, 16),
            MAY_SKIP=may_skip,
            SCALE_GIVEN=scale[0] is not None,
            EXPECTED_GIVEN=expected[0] is not None,
            BLOCK=LOC_BLOCK,
            num_warps=4,
            maxnreg=MAX_REGISTERS,
        )


def _no_anchors(sums: Tensor, outputs: Sequence[Tensor], compute_sums: bool) -> None:
    """Losses of a batch without anchors or images; with a process group the sums are those of all ranks."""
    if compute_sums:
        sums.zero_()
    count, iou, bad = sums[0, 0], sums[0, 1], sums[0, 2]
    outputs[0].copy_((count * 0).masked_fill(bad != 0, float("nan")))
    outputs[1].copy_(outputs[0])
    outputs[2].copy_(count)
    outputs[3].copy_(iou / count.clamp(min=1))


def detection_sums(*arguments: Any) -> None:
    *inputs, sums, workspace = arguments
    with on_device(inputs[3]):
        op = _Detection(*inputs, workspace)
        if op.empty:
            sums.zero_()
            return
        op.find_positives()
        op.coefficients(sums, True).launch()


def detection_fill(*arguments: Any) -> None:
    """compute_sums false: `workspace` is as detection_sums left it, and `sums` holds those of all ranks."""
    inputs, rest = arguments[:15], arguments[15:]
    eps, w_loc, normalize_loc, cls_weight, cls_avg, cls_divisor, loc_avg, loc_divisor, world_size, *rest = rest
    scale_tensor, grad_scale, compute_sums, sums, outputs, grad_logits, grad_deltas, workspace = rest
    with on_device(inputs[3]):
        op = _Detection(*inputs, workspace)
        if op.empty:
            _no_anchors(sums, outputs, compute_sums)
            return
        if compute_sums:
            op.find_positives()
        coefficients = op.coefficients(sums, compute_sums)
        coefficients.eps, coefficients.w_loc, coefficients.normalize_loc = eps, w_loc, normalize_loc
        coefficients.cls_weight, coefficients.world_size = cls_weight, world_size
        coefficients.cls_avg, coefficients.cls_divisor = cls_avg, cls_divisor
        coefficients.loc_avg, coefficients.loc_divisor = loc_avg, loc_divisor
        coefficients.outputs = tuple(out.data_ptr() for out in outputs)
        coefficients.launch()
        scale = (scale_tensor, grad_scale)
        op.fill_logits(grad_logits, scale=scale, loss=outputs[0])
        if grad_deltas:
            op.fill_deltas(grad_deltas, scale, scale, False)


def detection_backward(*arguments: Any) -> None:
    """Leaves gradients filled for the expected grad_output as they are, computes the others anew. An empty list: not
    wanted. `workspace` is as detection_fill left it."""
    inputs, rest = arguments[:15], arguments[24:]
    scale_tensor, grad_scale, filled, _, grad_cls, grad_loc, grad_logits, grad_deltas, workspace = rest
    with on_device(inputs[3]):
        op = _Detection(*inputs, workspace)
        if op.empty:
            return
        expected = (scale_tensor, grad_scale)
        if grad_logits:
            op.fill_logits(grad_logits, scale=(grad_cls, 0.0), expected=expected, may_skip=filled)
        if grad_deltas:
            op.fill_deltas(grad_deltas, (grad_loc, 0.0), expected, filled)
