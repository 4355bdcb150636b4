"""The fused detection loss: its positives, and what is left after the pass over the logits. See detection.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._launch import level_of, number, pick, pointer, pointer_at
from ._math import (
    anew,
    balance_share,
    delta_iou,
    encode_box,
    focal_positive,
    iou_power,
    is_degenerate,
    smooth_l1,
    weighted_loss,
)
from .coefficients import BAD, COUNT, IMAGE, LEVEL, clear_tickets
from .focal_finish import first_tile, scope_norm
from .positives import IGNORED, INVALID, PLAIN, load_marks, marks_at, store_marks, store_sums


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


@triton.jit
def place_of(lv, tile, anchors_per_image, TILE: tl.constexpr):
    """A tile of positions: its level and image, its first position and how many it has, and the first anchor, in the
    whole batch, of the level."""
    level = level_of(lv.tile0, tile)
    local = tile - pick(lv.tile0, level)
    per_image = pick(lv.tiles, level)
    image = local // per_image
    first = (local - image * per_image) * TILE
    here = tl.minimum(pick(lv.positions, level) - first, TILE)
    return level, image, first, here, tl.cast(image, tl.int64) * anchors_per_image + pick(lv.first_anchor, level)


# A tile's slopes are kept in the order of its positives, so that the last kernel works on these side by side without
# looking for them; their places in the tile, int16, come from the end of the same memory, 4 bytes an anchor, to its
# start. With more positives than there is room for (two of three anchors) every slope lies at its anchor instead, and
# there is no list: then all anchors are gone through.


@triton.jit
def is_listed(positives, anchors):
    return 3 * positives <= 2 * anchors


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
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
):
    clear_tickets(sc)
    tile = tl.program_id(0)
    level, image, first, here, anchor0 = place_of(lv, tile, anchors_per_image, TILE)
    per_location = pick(lv.anchors, level)
    locations = pick(lv.positions, level) // per_location
    planes = pick(lv.planes, level)

    mark = marks_at(marks, anchor0, CLASSES)
    list_end = (pointer(marks.slope, tl.float32) + (anchor0 + first + here)).to(tl.pointer_type(tl.int16)) - 1
    count = tl.zeros((), tl.int32)
    done = tl.zeros((), tl.int32)
    while done < here:
        values = ()  # both under way before the first is looked at
        for u in tl.static_range(2):
            at = done + u * CHUNK + tl.arange(0, CHUNK)
            values += (tl.load(matched_idxs + (anchor0 + first) + at, mask=at < here, other=-1),)
        for u in tl.static_range(2):
            at = done + u * CHUNK + tl.arange(0, CHUNK)
            value = values[u]
            positive = (value != -1) & (value != -2)
            position = first + at
            location = position // per_location
            place = tl.where(planes != 0, (position - location * per_location) * locations + location, position)
            # The positives' marks follow below.
            store_marks(mark, place, tl.where(value == -2, IGNORED, PLAIN), (at < here) & (positive == 0))
            order = count + tl.cumsum(positive.to(tl.int32), 0) - 1
            tl.store(list_end - order, at.to(tl.int16), mask=positive)
            count += tl.sum(positive.to(tl.int32), 0)
        done += 2 * CHUNK
    tl.debug_barrier()  # the list is read by other threads
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
    listed = is_listed(count, here)
    end = tl.where(listed, count, here)
    done = tl.zeros((), tl.int32)
    own_level = level
    while done < end:
        level = anew(own_level)
        item = done + tl.arange(0, LANES)
        mask = item < end
        row = first + tl.where(listed, tl.load(list_end - item, mask=mask & listed, other=0).to(tl.int32), item)
        anchor = anchor0 + row
        match = tl.load(matched_idxs + anchor, mask=mask, other=-1).to(tl.int64)
        mask = mask & (match != -1) & (match != -2)
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
        slot = tl.where(listed, anchor0 + first + item, anchor)
        tl.store(pointer(marks.slope, tl.float32) + slot, (balance * slope).to(tl.float32), mask=good)
        done += LANES
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
    lv,
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
    WANT_LOSS: tl.constexpr,
    LOGITS: tl.constexpr,  # which gradients are wanted
    DELTAS: tl.constexpr,
    MAY_SKIP: tl.constexpr,
    SCALE_GIVEN: tl.constexpr,
    EXPECTED_GIVEN: tl.constexpr,
    CLASSES: tl.constexpr,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
):
    """The sum of the dense pass's losses, by the first program; by the others what the positives get of both gradients,
    tile by tile of the positives' kernel. The zeros around them are there."""
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
        finish_positives(
            lv, out_logits, out, strides, gt, marks, sc, matched_idxs, anchors, anchors_per_image, tiles, tile, cls_due,
            cls_wanted, loc_due, loc_wanted, lambda_, beta, w0, w1, w2, w3,
            T, DELTA_T, BOX_T, PADDED, OWN_ANCHORS, FOVEA, SCOPE, LOGITS, DELTAS, CLASSES, TILE, LANES,
        )  # fmt: skip
        tile += tl.num_programs(0)


@triton.jit
def finish_positives(
    lv, out_logits, out, strides, gt, marks, sc, matched_idxs, anchors, anchors_per_image, all_tiles, tile, cls_due,
    cls_wanted, loc_due, loc_wanted, lambda_, beta, w0, w1, w2, w3,
    T: tl.constexpr, DELTA_T: tl.constexpr, BOX_T: tl.constexpr, PADDED: tl.constexpr, OWN_ANCHORS: tl.constexpr,
    FOVEA: tl.constexpr, SCOPE: tl.constexpr, LOGITS: tl.constexpr, DELTAS: tl.constexpr, CLASSES: tl.constexpr,
    TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """What the positives of a tile of their kernel get."""
    partial = pointer(sc.partial, tl.float64) + tile
    known = tl.load(partial + COUNT * all_tiles) + tl.load(partial + BAD * all_tiles)
    level, image, first, here, anchor0 = place_of(lv, tile, anchors_per_image, TILE)
    per_location = pick(lv.anchors, level)
    locations = pick(lv.positions, level) // per_location
    planes = pick(lv.planes, level)
    slopes = pointer(marks.slope, tl.float32) + (anchor0 + first)
    list_end = (slopes + here).to(tl.pointer_type(tl.int16)) - 1
    found_here = known.to(tl.int32)
    listed = is_listed(found_here, here)
    end = tl.where(listed, found_here, tl.where(found_here > 0, here, 0))
    done = tl.zeros((), tl.int32)
    own_level = level
    while done < end:
        level = anew(own_level)  # its table is read where it is needed: kept, it would fill the registers
        item = done + tl.arange(0, LANES)
        mask = item < end
        at = tl.where(listed, tl.load(list_end - item, mask=mask & listed, other=0).to(tl.int32), item)
        position = first + at
        anchor = anchor0 + position
        location = position // per_location
        a = position - location * per_location
        place = tl.where(planes != 0, a * locations + location, position)
        seen = load_marks(marks_at(marks, anchor0, CLASSES), place, mask)
        found = seen >= 0
        if LOGITS:
            if cls_due:
                entry = tl.where(
                    planes != 0,
                    (a * CLASSES + seen).to(tl.int64) * locations + location,
                    position.to(tl.int64) * CLASSES + seen,
                )
                entry += tl.cast(image, tl.int64) * pick(lv.image_stride, level)
                factor = tl.load(pointer(sc.positive, tl.float32) + image)
                factor *= cls_wanted.to(tl.float32)
                factor *= scope_norm(sc, matched_idxs, level, image, anchor, found, 0, SCOPE)
                slope = tl.load(slopes + tl.where(listed, item, at), mask=found, other=0.0)
                tl.store(pointer_at(out_logits, level, T) + entry, (slope * factor).to(T), mask=found)
        if DELTAS:
            if loc_due:
                matched = tl.load(matched_idxs + anchor, mask=found, other=0)
                t0, t1, t2, t3, degenerate = load_target(
                    lv, gt, anchors, level, image, position, matched, found, anchors_per_image, w0, w1, w2, w3, BOX_T,
                    PADDED, OWN_ANCHORS, FOVEA,
                )  # fmt: skip
                some = found & (degenerate == 0)
                p0, p1, p2, p3 = load_deltas(lv, level, image, position, some, DELTA_T)
                weight = iou_power(delta_iou(p0, p1, p2, p3, t0, t1, t2, t3, w0, w1, w2, w3, FOVEA), lambda_)
                some = some & (weight != 0.0)
                norm = pointer(sc.loc_norm, tl.float32) + (
                    image if SCOPE == IMAGE else (level if SCOPE == LEVEL else 0)
                )
                factor = tl.load(pointer(sc.location, tl.float32) + image) * tl.load(norm) * loc_wanted.to(tl.float32)
                weight = weight.to(tl.float32) * factor
                start = pointer_at(out, level, DELTA_T) + delta_places(lv, strides, level, image, location, a)
                step = pick(strides[4], level)
                l0, s0 = smooth_l1(p0 - t0, beta)
                l1, s1 = smooth_l1(p1 - t1, beta)
                l2, s2 = smooth_l1(p2 - t2, beta)
                l3, s3 = smooth_l1(p3 - t3, beta)
                tl.store(start, tl.where(some, s0.to(tl.float32) * weight, 0.0).to(DELTA_T), mask=found)
                tl.store(start + step, tl.where(some, s1.to(tl.float32) * weight, 0.0).to(DELTA_T), mask=found)
                tl.store(start + 2 * step, tl.where(some, s2.to(tl.float32) * weight, 0.0).to(DELTA_T), mask=found)
                tl.store(start + 3 * step, tl.where(some, s3.to(tl.float32) * weight, 0.0).to(DELTA_T), mask=found)
        done += LANES


@triton.jit
def delta_places(lv, strides, level, image, location, a):
    """Where the first of the four numbers of an anchor's gradient lies, in elements, whatever the layout."""
    width = pick(lv.width, level)
    at = tl.cast(image, tl.int64) * pick(strides[0], level) + a.to(tl.int64) * pick(strides[1], level)
    at += (location // width).to(tl.int64) * pick(strides[2], level)
    return at + (location % width).to(tl.int64) * pick(strides[3], level)
