"""Matching of anchors with gt boxes, in at most three launches.

1. A program per image copies its boxes, without the padded places, as float32; others bound blocks of anchors.
2. A program per image and block of anchors computes the pairs that may overlap, and leaves every anchor's decision. The
   largest IoU of every box comes together by integer maxima of its bits, which do not depend on an order.
3. Where that is asked for, the same programs find the anchors that have the largest IoU of a box, and match them.

A box and a block whose bounds it does not touch have IoUs of exactly 0 (is_regular_anchor, is_regular_box), which is
also where every search starts: with the first box of an image, with the first anchor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._launch import EXACT, Workspace, cdiv, float32, ground_truth, on_device, pack, pointer
from ._math import (
    UNMATCHED,
    is_nan,
    is_regular_anchor,
    is_regular_box,
    matched_index,
    matching_area,
    matching_iou,
    takes_over,
)
from .matching_boxes import LANES, REGISTERS, bits_of, gt_of, load_corners, load_gt, lowest

BLOCK = 128  # anchors culled together; _MATCH_BLOCK of ops/workspace.py
# What is kept of a box's anchors: nothing, the largest IoU, or the first anchor that has it, too.
NOTHING, IOU, ANCHOR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_KEY_SIZES = {NOTHING.value: 0, IOU.value: 4, ANCHOR.value: 8}


class Scratch(NamedTuple):
    """Packed addresses of what the launches leave for each other."""

    bounds: int  # float32 (4, blocks of all anchors): x1 y1 x2 y2
    count: int  # int32 (images): boxes, without the padded places
    corners: int  # float32 (4, images, places)
    area: int  # float32 (images, places), as all that follows
    index: int  # int32: place among the image's gt boxes
    key: int  # int32 or int64: see key_of


@triton.jit
def ordered(iou):
    """An integer that is larger for a larger IoU; NaN is above all, -0 below 0, from which every search starts."""
    return tl.where(is_nan(iou), 0x7FC00000, iou.to(tl.int32, bitcast=True))


@triton.jit
def key_of(iou, anchor, KEPT: tl.constexpr):
    """What is kept of an ordered IoU: an integer that is larger for a larger one, of equal ones for the earlier
    anchor."""
    if KEPT == ANCHOR:
        return (iou.to(tl.int64) << 32) | (0xFFFFFFFF - anchor.to(tl.int64))
    else:
        return iou


@triton.jit
def iou_of(key, KEPT: tl.constexpr):
    if KEPT == ANCHOR:
        return (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        return key.to(tl.float32, bitcast=True)


@triton.jit
def anchor_of(key):
    return (0xFFFFFFFF - (key & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def key_pointer(sc, at, KEPT: tl.constexpr):
    if KEPT == ANCHOR:
        return pointer(sc.key, tl.int64) + at
    else:
        return pointer(sc.key, tl.int32) + at


# ---------------------------------------------------------------------------------------------- 1: boxes and bounds


@triton.jit
def collect_boxes(
    gt, sc, image, images, places, BOX_T: tl.constexpr, LABEL_T: tl.constexpr, PADDED: tl.constexpr,
    LABELED: tl.constexpr, KEPT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Copies the boxes of an image, in their order, and starts their searches."""
    boxes, labels, count = gt_of(gt, image, BOX_T, LABEL_T, PADDED)
    start = tl.cast(image, tl.int64) * places
    plane = tl.cast(images, tl.int64) * places
    corners = pointer(sc.corners, tl.float32) + start
    found = tl.zeros((), tl.int32)
    first = tl.zeros((), tl.int32)
    while first < count:
        at = first + tl.arange(0, LANES)
        b0, b1, b2, b3, valid = load_gt(boxes, labels, at, count, LABELED)
        order = found + tl.cumsum(valid.to(tl.int32), 0) - 1
        tl.store(corners + order, b0, mask=valid)
        tl.store(corners + plane + order, b1, mask=valid)
        tl.store(corners + 2 * plane + order, b2, mask=valid)
        tl.store(corners + 3 * plane + order, b3, mask=valid)
        tl.store(pointer(sc.area, tl.float32) + start + order, matching_area(b0, b1, b2, b3), mask=valid)
        tl.store(pointer(sc.index, tl.int32) + start + order, at, mask=valid)
        if KEPT != NOTHING:
            none = tl.zeros((LANES,), tl.int32)
            tl.store(key_pointer(sc, start + order, KEPT), key_of(none, none, KEPT), mask=valid)
        found += tl.sum(valid.to(tl.int32), 0)
        first += LANES
    tl.store(pointer(sc.count, tl.int32) + image, found)


@triton.jit
def bound_block(sc, anchors, block, rows, blocks, all_blocks, BLOCK: tl.constexpr):
    """Bounds of a block of anchors; those of one with an irregular anchor touch every box."""
    row = (block % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    a0, a1, a2, a3 = load_corners(anchors, tl.cast(block // blocks, tl.int64) * rows + row, inside)
    regular = is_regular_anchor(a0, a1, a2, a3) | (inside == 0)
    big: tl.constexpr = float("inf")
    whole = tl.min(regular.to(tl.int32), 0) != 0
    out = pointer(sc.bounds, tl.float32) + block
    tl.store(out, tl.where(whole, tl.min(tl.where(inside, a0, big), 0), -big))
    tl.store(out + all_blocks, tl.where(whole, tl.min(tl.where(inside, a1, big), 0), -big))
    tl.store(out + 2 * all_blocks, tl.where(whole, tl.max(tl.where(inside, a2, -big), 0), big))
    tl.store(out + 3 * all_blocks, tl.where(whole, tl.max(tl.where(inside, a3, -big), 0), big))


@triton.jit(do_not_specialize=["images", "places", "rows", "blocks", "all_blocks"])
def match_prepare_kernel(
    gt,
    sc,
    anchors,
    images,
    places,
    rows,
    blocks,
    all_blocks,
    BOX_T: tl.constexpr,
    LABEL_T: tl.constexpr,
    PADDED: tl.constexpr,
    LABELED: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    program = tl.program_id(0)
    if program < images:
        collect_boxes(gt, sc, program, images, places, BOX_T, LABEL_T, PADDED, LABELED, KEPT, LANES)
    else:
        bound_block(sc, anchors, program - images, rows, blocks, all_blocks, BLOCK)


# ---------------------------------------------------------------------------------------------- 2 and 3: the pairs


@triton.jit
def touching(sc, block, all_blocks, start, plane, at, valid):
    """Which boxes may have an IoU other than 0 with an anchor of the block."""
    bounds = pointer(sc.bounds, tl.float32) + block
    corners = pointer(sc.corners, tl.float32) + start + at
    # A regular box has no infinite coordinate: it touches the bounds of irregular blocks.
    apart = tl.load(corners, mask=valid, other=0.0) >= tl.load(bounds + 2 * all_blocks)
    apart |= tl.load(corners + plane, mask=valid, other=0.0) >= tl.load(bounds + 3 * all_blocks)
    apart |= tl.load(corners + 2 * plane, mask=valid, other=0.0) <= tl.load(bounds)
    apart |= tl.load(corners + 3 * plane, mask=valid, other=0.0) <= tl.load(bounds + all_blocks)
    area = tl.load(pointer(sc.area, tl.float32) + start + at, mask=valid, other=0.0)
    return valid & ((apart & is_regular_box(area)) == 0)


@triton.jit
def pair_iou(sc, box, plane, a0, a1, a2, a3, area):
    """IoU of a box with the anchors of a block."""
    corners = pointer(sc.corners, tl.float32) + box
    b0 = tl.load(corners)
    b1 = tl.load(corners + plane)
    b2 = tl.load(corners + 2 * plane)
    b3 = tl.load(corners + 3 * plane)
    return matching_iou(b0, b1, b2, b3, tl.load(pointer(sc.area, tl.float32) + box), a0, a1, a2, a3, area)


@triton.jit(do_not_specialize=["images", "places", "rows", "blocks", "all_blocks"])
def match_kernel(
    sc,
    anchors,
    out,
    images,
    places,
    rows,
    blocks,
    all_blocks,
    high: tl.float32,
    low: tl.float32,
    OWN_ANCHORS: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Every anchor's decision by the thresholds, and every box's largest IoU."""
    image = tl.program_id(0) // blocks
    local = tl.program_id(0) - image * blocks
    block = tl.program_id(0) if OWN_ANCHORS else local
    row = local * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    anchor = row.to(tl.int64) + (tl.cast(image, tl.int64) * rows if OWN_ANCHORS else 0)
    start = tl.cast(image, tl.int64) * places
    plane = tl.cast(images, tl.int64) * places
    count = tl.load(pointer(sc.count, tl.int32) + image)
    box_index = pointer(sc.index, tl.int32) + start
    best = tl.zeros((BLOCK,), tl.float32)
    index = tl.zeros((BLOCK,), tl.int32) + tl.load(box_index, mask=count > 0, other=UNMATCHED)
    first = tl.zeros((), tl.int32)
    while first < count:
        at = first + tl.arange(0, LANES)
        bits = bits_of(touching(sc, block, all_blocks, start, plane, at, at < count))
        if bits != 0:
            a0, a1, a2, a3 = load_corners(anchors, anchor, inside)
            area = matching_area(a0, a1, a2, a3)
            while bits != 0:
                g = first + lowest(bits)
                bits = bits & (bits - 1)
                iou = pair_iou(sc, start + g, plane, a0, a1, a2, a3, area)
                over = takes_over(iou, best)
                best = tl.where(over, iou, best)
                index = tl.where(over, tl.load(box_index + g), index)
                if KEPT != NOTHING:
                    order = tl.where(inside, ordered(iou), -1)
                    largest = tl.max(order, 0)
                    first_row = tl.min(tl.where(order == largest, row, 0x7FFFFFFF), 0)
                    key = key_of(largest, first_row, KEPT)
                    tl.atomic_max(key_pointer(sc, start + g, KEPT), key, sem="relaxed")
        first += LANES
    matched = tl.where(count > 0, matched_index(best, index, high, low), UNMATCHED)
    tl.store(out + tl.cast(image, tl.int64) * rows + row, matched, mask=inside)


@triton.jit(do_not_specialize=["images", "places", "rows", "blocks", "all_blocks"])
def match_best_kernel(
    sc,
    anchors,
    out,
    images,
    places,
    rows,
    blocks,
    all_blocks,
    OWN_ANCHORS: tl.constexpr,
    LOW_QUALITY: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Overwrites the decisions on anchors that have a box's largest IoU: LOW_QUALITY matches them to their own best
    box, ANCHOR the first one of each box to that box."""
    image = tl.program_id(0) // blocks
    local = tl.program_id(0) - image * blocks
    block = tl.program_id(0) if OWN_ANCHORS else local
    row = local * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    anchor = row.to(tl.int64) + (tl.cast(image, tl.int64) * rows if OWN_ANCHORS else 0)
    start = tl.cast(image, tl.int64) * places
    plane = tl.cast(images, tl.int64) * places
    count = tl.load(pointer(sc.count, tl.int32) + image)
    box_index = pointer(sc.index, tl.int32) + start
    best = tl.zeros((BLOCK,), tl.float32)
    index = tl.zeros((BLOCK,), tl.int32) + tl.load(box_index, mask=count > 0, other=UNMATCHED)
    forced = tl.full((BLOCK,), UNMATCHED, tl.int32)
    restored = tl.zeros((BLOCK,), tl.int32)
    first = tl.zeros((), tl.int32)
    while first < count:
        at = first + tl.arange(0, LANES)
        valid = at < count
        key = tl.load(key_pointer(sc, start + at, KEPT), mask=valid, other=0)
        wanted = valid & False
        if LOW_QUALITY:
            # Every anchor has the largest IoU of a box that none overlaps.
            nothing = valid & (iou_of(key, KEPT) == 0.0)
            restored |= tl.max(nothing.to(tl.int32), 0)
            wanted = touching(sc, block, all_blocks, start, plane, at, valid)
        if KEPT == ANCHOR:
            wanted |= valid & (anchor_of(key) // BLOCK == local)
        bits = bits_of(wanted)
        if bits != 0:
            a0, a1, a2, a3 = load_corners(anchors, anchor, inside & LOW_QUALITY)
            area = matching_area(a0, a1, a2, a3)
            while bits != 0:
                g = first + lowest(bits)
                bits = bits & (bits - 1)
                largest = tl.load(key_pointer(sc, start + g, KEPT))
                place = tl.load(box_index + g)
                if LOW_QUALITY:
                    iou = pair_iou(sc, start + g, plane, a0, a1, a2, a3, area)
                    over = takes_over(iou, best)
                    best = tl.where(over, iou, best)
                    index = tl.where(over, place, index)
                    restored |= (iou == iou_of(largest, KEPT)).to(tl.int32)
                if KEPT == ANCHOR:  # of several boxes the last
                    forced = tl.where(row == anchor_of(largest), place, forced)
        first += LANES
    index = tl.where(forced != UNMATCHED, forced, index)
    changed = inside & ((restored != 0) | (forced != UNMATCHED))
    tl.store(out + tl.cast(image, tl.int64) * rows + row, index, mask=changed)


def match_anchors(
    anchors: Tensor,
    gt_boxes: Sequence[Tensor],
    gt_labels: Sequence[Tensor],
    high: float,
    low: float,
    allow_low_quality: bool,
    force_best: bool,
    matched_idxs: Tensor,
    workspace: Sequence[Tensor],
) -> None:
    images, rows = matched_idxs.shape
    if images * rows == 0:
        return
    kept = (ANCHOR if force_best else IOU if allow_low_quality else NOTHING).value
    truth, gt_options = ground_truth(gt_boxes, gt_labels)
    places = gt_boxes[0].shape[1] if gt_options["PADDED"] else max(boxes.shape[0] for boxes in gt_boxes)
    own = anchors.ndim == 3
    blocks = cdiv(rows, BLOCK)
    all_blocks = blocks * (images if own else 1)
    memory, each = Workspace(workspace), images * places
    sizes = (4 * all_blocks, 4), (images, 4), (4 * each, 4), (each, 4), (each, 4), (each, _KEY_SIZES[kept])
    scratch = Scratch(*pack(*(memory.take(count, size) for count, size in sizes)))
    numbers = (images, places, rows, blocks, all_blocks)
    # One warp: a lane per box, no barrier in the maxima.
    options = {"KEPT": kept, "BLOCK": BLOCK, "LANES": LANES, "num_warps": 1, "maxnreg": REGISTERS, **EXACT}
    with on_device(anchors):
        match_prepare_kernel[(images + all_blocks,)](
            truth, scratch, anchors, *numbers, **gt_options, LABELED=bool(gt_labels), **options
        )
        options["OWN_ANCHORS"] = own
        grid = (images * blocks,)
        match_kernel[grid](scratch, anchors, matched_idxs, *numbers, float32(high), float32(low), **options)
        if allow_low_quality or force_best:
            match_best_kernel[grid](scratch, anchors, matched_idxs, *numbers, LOW_QUALITY=allow_low_quality, **options)
