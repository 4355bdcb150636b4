"""Box decode, encode and IoU over contiguous (R, 4) tensors, a lane per box, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import _math
from ._launch import cdiv, on_device
from ._math import decode_axis_backward

DECODE, DECODE_BACKWARD, ENCODE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
IOU, DELTA_IOU = tl.constexpr(3), tl.constexpr(4)
BLOCK = 256


@triton.jit
def load_quads(x, row, mask):
    """Four float32 numbers per row."""
    x0 = tl.load(x + 4 * row, mask=mask, other=0.0).to(tl.float32)
    x1 = tl.load(x + 4 * row + 1, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x + 4 * row + 2, mask=mask, other=1.0).to(tl.float32)
    x3 = tl.load(x + 4 * row + 3, mask=mask, other=1.0).to(tl.float32)
    return x0, x1, x2, x3


@triton.jit
def store_quads(out, row, mask, x0, x1, x2, x3):
    tl.store(out + 4 * row, x0.to(out.dtype.element_ty), mask=mask)
    tl.store(out + 4 * row + 1, x1.to(out.dtype.element_ty), mask=mask)
    tl.store(out + 4 * row + 2, x2.to(out.dtype.element_ty), mask=mask)
    tl.store(out + 4 * row + 3, x3.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def boxes_kernel(
    first,
    second,
    third,
    out,
    rows: tl.int64,
    w0: tl.float32,
    w1: tl.float32,
    w2: tl.float32,
    w3: tl.float32,
    OP: tl.constexpr,
    FOVEA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    a0, a1, a2, a3 = load_quads(first, row, mask)
    b0, b1, b2, b3 = load_quads(second, row, mask)
    if OP == DECODE:
        x0, x1, x2, x3 = _math.decode_box(a0, a1, a2, a3, b0, b1, b2, b3, w0, w1, w2, w3, FOVEA)
        store_quads(out, row, mask, x0, x1, x2, x3)
    elif OP == DECODE_BACKWARD:  # gradient of the boxes, deltas, anchors
        c0, c1, c2, c3 = load_quads(third, row, mask)
        x0, x2 = decode_axis_backward(a0, a2, b0, b2, c2 - c0, w0, w2, FOVEA)
        x1, x3 = decode_axis_backward(a1, a3, b1, b3, c3 - c1, w1, w3, FOVEA)
        store_quads(out, row, mask, x0, x1, x2, x3)
    elif OP == ENCODE:
        x0, x1, x2, x3 = _math.encode_box(a0, a1, a2, a3, b0, b1, b2, b3, w0, w1, w2, w3, FOVEA)
        store_quads(out, row, mask, x0, x1, x2, x3)
    elif OP == IOU:
        tl.store(out + row, _math.box_iou(a0, a1, a2, a3, b0, b1, b2, b3), mask=mask)
    else:
        iou = _math.delta_iou(a0, a1, a2, a3, b0, b1, b2, b3, w0, w1, w2, w3, FOVEA)
        tl.store(out + row, iou, mask=mask)


def _run(
    op: tl.constexpr, first: Tensor, second: Tensor, third: Tensor, weights: Sequence[float], coder: int, out: Tensor
) -> None:
    rows = first.numel() // 4
    if rows == 0:
        return
    with on_device(first):
        boxes_kernel[(cdiv(rows, BLOCK),)](
            first, second, third, out, rows, *weights, OP=op.value, FOVEA=coder == 1, BLOCK=BLOCK, num_warps=4
        )


def decode_boxes(deltas: Tensor, anchors: Tensor, weights: Sequence[float], coder: int, out: Tensor) -> None:
    _run(DECODE, deltas, anchors, anchors, weights, coder, out)


def decode_boxes_backward(*arguments: Any) -> None:
    grad_output, deltas, anchors, weights, coder, grad = arguments
    _run(DECODE_BACKWARD, grad_output, deltas, anchors, weights, coder, grad)


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: Sequence[float], coder: int, out: Tensor) -> None:
    _run(ENCODE, boxes, anchors, anchors, weights, coder, out)


def paired_box_iou(boxes1: Tensor, boxes2: Tensor, out: Tensor) -> None:
    _run(IOU, boxes1, boxes2, boxes2, (1.0, 1.0, 1.0, 1.0), 0, out)


def delta_iou(pred: Tensor, target: Tensor, weights: Sequence[float], coder: int, out: Tensor) -> None:
    _run(DELTA_IOU, pred, target, target, weights, coder, out)
