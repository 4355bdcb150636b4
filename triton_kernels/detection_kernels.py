"""The fused detection loss: its positives, and what is left after the pass over the logits. See detection.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._launch import level_of, number, pick, pointer, pointer_at
from ._math import (
    balance_share,
    delta_iou,
    encode_box,
    focal_positive,
    iou_power,
    is_degenerate,
    smooth_l1,
    weighted_loss,
)
from .coefficients import IMAGE, LEVEL, clear_tickets
from .focal_dense import GRADIENT
from .focal_finish import first_tile, own_value, scope_norm
from .positives import IGNORED, INVALID, PLAIN, collect, listed_at, load_marks, marks_at, store_marks, store_sums

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
        boxes = pointer_at(gt.boxes, image, BOX_T)
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
    start = pointer_at(lv.deltas, level, T)
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
    mark = marks_at(marks, anchor0, CLASSES)
    store_marks(mark, place, tl.where(value == -2, IGNORED, PLAIN), inside & (positive == 0))  # the others' below

    # The list lies where the slopes will: 2 bytes an entry against 4, so that its last entries can go first and what is
    # still listed lies before what is written.
    tile_list = (pointer(marks.slope, tl.float32) + (anchor0 + first)).to(tl.pointer_type(tl.int16))
    count = collect(tile_list, positive, TILE)
    boxes_here = pick(gt.counts, 0)
    labels = pointer_at(gt.labels, 0, LABEL_T)
    if PADDED:
        labels += tl.cast(image, tl.int64) * boxes_here
    else:
        boxes_here = pick(gt.counts, image)
        labels = pointer_at(gt.labels, image, LABEL_T)
    number_of = tl.zeros((LANES,), tl.float64)
    ious = tl.zeros((LANES,), tl.float64)
    bad = tl.zeros((LANES,), tl.float64)
    cls_plain = tl.zeros((LANES,), tl.float64)
    cls_weighted = tl.zeros((LANES,), tl.float64)
    cls_loss = tl.zeros((LANES,), tl.float64)
    loc_plain = tl.zeros((LANES,), tl.float64)
    loc_weighted = tl.zeros((LANES,), tl.float64)
    loc_loss = tl.zeros((LANES,), tl.float64)
    left = count
    while left > 0:
        left = (left - 1) // LANES * LANES
        listed, mask = listed_at(tile_list, left, count, LANES)
        tl.debug_barrier()  # read, before other threads write there
        row = first + listed
        anchor = anchor0 + row
        match = tl.load(matched_idxs + anchor, mask=mask, other=-1).to(tl.int64)
        known = mask & (match >= 0) & (match < boxes_here)
        label = tl.load(labels + match, mask=known, other=-1).to(tl.int64)
        good = known & (label >= 0) & (label < CLASSES)
        label = tl.where(good, label, INVALID).to(tl.int32)
        cell = row // per_location
        a = row - cell * per_location
        store_marks(mark, tl.where(planes != 0, a * locations + cell, row), label, mask)
        entry = tl.where(
            planes != 0,
            (a * CLASSES + label).to(tl.int64) * locations + cell,
            row.to(tl.int64) * CLASSES + label,
        )
        entry += tl.cast(image, tl.int64) * pick(lv.image_stride, level)
        logit = tl.load(pointer_at(lv.logits, level, T) + entry, mask=good, other=0.0)
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
        tl.store(pointer(marks.slope, tl.float32) + anchor, (balance * slope).to(tl.float32), mask=good)
    store_sums(
        sc, 0, 1, all_tiles, number_of, ious, bad, cls_plain, cls_weighted, cls_loss, loc_plain, loc_weighted, loc_loss
    )


class FinishNumbers(NamedTuple):
    """Tensors of one number, or anything."""

    cls_scale: Any  # the factor of the logits' gradient
    loc_scale: Any  # and of the deltas'
    expected: Any  # the factor that filled buffers have


@triton.jit(do_not_specialize=["anchors_per_image", "tiles"])
def detection_finish_kernel(
    lv,  # tile0 and tiles: of this launch
    out_logits,  # packed addresses of the logits' gradients
    out,  # and of the deltas'
    strides,  # packed: of the latter; per level image, anchor, row, column, coordinate
    gt,
    marks,
    sc,
    nu,
    matched_idxs,
    anchors,
    addresses,  # packed: of the dense pass's losses, and of the loss
    count,  # packed: how many losses of tiles
    anchors_per_image: tl.int64,
    tiles,
    scale: tl.float64,
    expected: tl.float64,
    lambda_: tl.float64,
    beta: tl.float64,
    w0: tl.float64,
    w1: tl.float64,
    w2: tl.float64,
    w3: tl.float64,
    T: tl.constexpr,
    DELTA_T: tl.constexpr,
    BOX_T: tl.constexpr,
    PADDED: tl.constexpr,
    OWN_ANCHORS: tl.constexpr,
    FOVEA: tl.constexpr,
    SCOPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    WANT_LOSS: tl.constexpr,
    LOGITS: tl.constexpr,  # which gradients are wanted
    DELTAS: tl.constexpr,
    MAY_SKIP: tl.constexpr,
    SCALE_GIVEN: tl.constexpr,
    EXPECTED_GIVEN: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of the tiles' losses, by the first program; by the others the positives' own entries of the logits'
    gradient, and the gradient of the deltas: zeros, but for the positives."""
    tile = first_tile(addresses, count, sc, tiles, WANT_LOSS)
    cls_wanted = number(nu.cls_scale, scale, SCALE_GIVEN)
    loc_wanted = number(nu.loc_scale, scale, SCALE_GIVEN)
    cls_due = True
    loc_due = True
    if MAY_SKIP:
        there = number(nu.expected, expected, EXPECTED_GIVEN)
        cls_due = cls_wanted != there
        loc_due = loc_wanted != there
        if ((cls_due & LOGITS) | (loc_due & DELTAS)) == 0:
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
        planes = pick(lv.planes, level)
        place = tl.where(planes != 0, a * locations + location, position)
        seen = load_marks(marks_at(marks, anchor0, CLASSES), place, inside)
        found = seen >= 0
        g0 = tl.zeros((BLOCK,), tl.float32)
        g1 = tl.zeros((BLOCK,), tl.float32)
        g2 = tl.zeros((BLOCK,), tl.float32)
        g3 = tl.zeros((BLOCK,), tl.float32)
        if tl.max(found.to(tl.int32), 0) > 0:
            anchor = anchor0 + position
            if LOGITS:
                if cls_due:
                    entry = tl.where(
                        planes != 0,
                        (a * CLASSES + seen).to(tl.int64) * locations + location,
                        position.to(tl.int64) * CLASSES + seen,
                    )
                    entry += tl.cast(image, tl.int64) * pick(lv.image_stride, level)
                    positive = tl.load(pointer(sc.positive, tl.float32) + image)
                    cls_norm = scope_norm(sc, matched_idxs, level, image, anchor, found, 0, SCOPE)
                    value = own_value(marks, positive, cls_norm, cls_wanted.to(tl.float32), anchor, found, GRADIENT)
                    tl.store(pointer_at(out_logits, level, T) + entry, value.to(T), mask=found)
            if DELTAS:
                matched = tl.load(matched_idxs + anchor, mask=found, other=0)
                t0, t1, t2, t3, degenerate = load_target(
                    lv, gt, anchors, level, image, position, matched, found, anchors_per_image, w0, w1, w2, w3, BOX_T,
                    PADDED, OWN_ANCHORS, FOVEA,
                )  # fmt: skip
                found = found & (degenerate == 0)
                p0, p1, p2, p3 = load_deltas(lv, level, image, position, found, DELTA_T)
                weight = iou_power(delta_iou(p0, p1, p2, p3, t0, t1, t2, t3, w0, w1, w2, w3, FOVEA), lambda_)
                found = found & (weight != 0.0)
                weight = weight.to(tl.float32)
                norm = pointer(sc.loc_norm, tl.float32) + (
                    image if SCOPE == IMAGE else (level if SCOPE == LEVEL else 0)
                )
                factor = tl.load(pointer(sc.location, tl.float32) + image) * tl.load(norm) * loc_wanted.to(tl.float32)
                l0, s0 = smooth_l1(p0 - t0, beta)
                l1, s1 = smooth_l1(p1 - t1, beta)
                l2, s2 = smooth_l1(p2 - t2, beta)
                l3, s3 = smooth_l1(p3 - t3, beta)
                g0 = tl.where(found, s0.to(tl.float32) * (weight * factor), 0.0)
                g1 = tl.where(found, s1.to(tl.float32) * (weight * factor), 0.0)
                g2 = tl.where(found, s2.to(tl.float32) * (weight * factor), 0.0)
                g3 = tl.where(found, s3.to(tl.float32) * (weight * factor), 0.0)
        if DELTAS:
            if loc_due:
                store_deltas(
                    lv, out, strides, level, image, position, location, a, inside, g0, g1, g2, g3, DELTA_T, LAYOUT,
                    ALIGNED, BLOCK,
                )  # fmt: skip
        tile += tl.num_programs(0)


@triton.jit
def store_deltas(
    lv, out, strides, level, image, position, location, a, inside, g0, g1, g2, g3,
    T: tl.constexpr, LAYOUT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = pointer_at(out, level, T) + tl.cast(image, tl.int64) * pick(strides[0], level)
    if LAYOUT == ROWS:  # four neighbours of each anchor: one access
        four = tl.join(tl.join(g0, g2), tl.join(g1, g3)).reshape((BLOCK, 4)).to(T)
        at = start + (4 * position)[:, None] + tl.arange(0, 4)[None, :]
        if ALIGNED:
            at = tl.multiple_of(at, (1, 4 * (T.primitive_bitwidth // 8)))
        tl.store(at, four, mask=inside[:, None])
    else:
        width = pick(lv.width, level)
        at = a.to(tl.int64) * pick(strides[1], level) + (location // width).to(tl.int64) * pick(strides[2], level)
        at += (location % width).to(tl.int64) * pick(strides[3], level)
        if LAYOUT == PLANES:
            at = tl.cast(a, tl.int64) * pick(strides[1], level) + location
        step = pick(strides[4], level)
        tl.store(start + at, g0.to(T), mask=inside)
        tl.store(start + at + step, g1.to(T), mask=inside)
        tl.store(start + at + 2 * step, g2.to(T), mask=inside)
        tl.store(start + at + 3 * step, g3.to(T), mask=inside)
