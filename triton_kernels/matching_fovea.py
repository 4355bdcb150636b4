"""Matching of FoveaBox's cells with gt boxes, in one launch: a program per image and tile of cells of a level."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._launch import EXACT, cdiv, float32, ground_truth, level_of, on_device, pack, pick
from ._math import UNMATCHED, fovea_cells, is_in_scale, matching_area, takes_cell
from .matching_boxes import LANES, REGISTERS, bits_of, gt_of, load_gt, lowest

CELLS = 128  # of a program


class FoveaLevels(NamedTuple):
    """Packed tables of all levels; float32 as its bits."""

    tile0: tuple[int, ...]
    tiles: tuple[int, ...]  # per image
    height: tuple[int, ...]
    width: tuple[int, ...]
    first: tuple[int, ...]  # first cell in the image
    stride: tuple[int, ...]  # float32, as those that follow
    smallest_squared: tuple[int, ...]
    largest_squared: tuple[int, ...]


@triton.jit
def pick_float(values, i):
    return tl.cast(pick(values, i), tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def shrunk(b0, b1, b2, b3, stride, from_, to, width, height):
    """First and last column and row of the cells that boxes have on a level."""
    left, right = fovea_cells(b0, b2, stride, from_, to, width)
    top, bottom = fovea_cells(b1, b3, stride, from_, to, height)
    return left, top, right, bottom


@triton.jit(do_not_specialize=["cells_per_image"])
def match_fovea_kernel(
    lv,
    gt,
    out,
    cells_per_image: tl.int64,
    from_: tl.float32,
    to: tl.float32,
    BOX_T: tl.constexpr,
    LABEL_T: tl.constexpr,
    PADDED: tl.constexpr,
    LABELED: tl.constexpr,
    CELLS: tl.constexpr,
    LANES: tl.constexpr,
):
    tile = tl.program_id(0)
    level = level_of(lv.tile0, tile)
    per_image = pick(lv.tiles, level)
    local = tile - pick(lv.tile0, level)
    image = local // per_image
    first_cell = (local - image * per_image) * CELLS
    width = tl.cast(pick(lv.width, level), tl.int32)
    height = tl.cast(pick(lv.height, level), tl.int32)
    cell = first_cell + tl.arange(0, CELLS)
    inside = cell < width * height
    row = (cell // width).to(tl.float32)
    column = (cell % width).to(tl.float32)
    first_row = (first_cell // width).to(tl.float32)
    last_row = ((first_cell + CELLS - 1) // width).to(tl.float32)
    stride = pick_float(lv.stride, level)
    smallest = pick_float(lv.smallest_squared, level)
    largest = pick_float(lv.largest_squared, level)
    columns = width.to(tl.float32)
    rows = height.to(tl.float32)
    boxes, labels, count = gt_of(gt, image, BOX_T, LABEL_T, PADDED)
    current = tl.full((CELLS,), float("inf"), tl.float32)
    index = tl.full((CELLS,), UNMATCHED, tl.int32)
    first = tl.zeros((), tl.int32)
    while first < count:
        at = first + tl.arange(0, LANES)
        b0, b1, b2, b3, valid = load_gt(boxes, labels, at, count, LABELED)
        left, top, right, bottom = shrunk(b0, b1, b2, b3, stride, from_, to, columns, rows)
        valid = valid & is_in_scale(matching_area(b0, b1, b2, b3), smallest, largest)
        bits = bits_of(valid & (left <= right) & (top <= last_row) & (bottom >= first_row))
        while bits != 0:
            g = first + lowest(bits)
            bits = bits & (bits - 1)
            box = boxes + 4 * g
            c0 = tl.load(box).to(tl.float32)
            c1 = tl.load(box + 1).to(tl.float32)
            c2 = tl.load(box + 2).to(tl.float32)
            c3 = tl.load(box + 3).to(tl.float32)
            left_, top_, right_, bottom_ = shrunk(c0, c1, c2, c3, stride, from_, to, columns, rows)
            area = matching_area(c0, c1, c2, c3)
            taken = (left_ <= column) & (column <= right_) & (top_ <= row) & (row <= bottom_)
            taken = taken & takes_cell(area, current)
            current = tl.where(taken, area, current)
            index = tl.where(taken, g, index)
        first += LANES
    at = tl.cast(image, tl.int64) * cells_per_image + pick(lv.first, level) + cell
    tl.store(out + at, index, mask=inside)


def _bits(values: Sequence[float]) -> tuple[int, ...]:
    return pack(*(struct.unpack("<i", struct.pack("<f", float32(value)))[0] for value in values))


def match_fovea(
    gt_boxes: Sequence[Tensor],
    gt_labels: Sequence[Tensor],
    heights: Sequence[int],
    widths: Sequence[int],
    strides: Sequence[int],
    min_sizes: Sequence[float],
    max_sizes: Sequence[float],
    sigma: float,
    matched_idxs: Tensor,
) -> None:
    images, per_image = matched_idxs.shape
    if images * per_image == 0:
        return
    cells = [height * width for height, width in zip(heights, widths)]
    levels = [i for i, count in enumerate(cells) if count > 0]
    tiles = [cdiv(cells[i], CELLS) for i in levels]
    table = FoveaLevels(
        pack(*(sum(tiles[:i]) * images for i in range(len(tiles)))),
        pack(*tiles),
        pack(*(heights[i] for i in levels)),
        pack(*(widths[i] for i in levels)),
        pack(*(sum(cells[:i]) for i in levels)),
        _bits([strides[i] for i in levels]),
        _bits([min_sizes[i] * min_sizes[i] for i in levels]),
        _bits([max_sizes[i] * max_sizes[i] for i in levels]),
    )
    truth, gt_options = ground_truth(gt_boxes, gt_labels)
    with on_device(matched_idxs):
        match_fovea_kernel[(sum(tiles) * images,)](
            table, truth, matched_idxs, per_image, float32(1 - sigma), float32(1 + sigma), **gt_options,
            LABELED=bool(gt_labels), CELLS=CELLS, LANES=LANES, num_warps=1, maxnreg=REGISTERS, **EXACT,
        )  # fmt: skip
