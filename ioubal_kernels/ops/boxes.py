"""Box decode (differentiable in the deltas), encode and IoU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..boxes import result_dtype
from . import library
from .autograd import guard_double_backward, refuse_transforms
from .library import op

CODERS = {"delta": 0, "fovea": 1}


class _DecodeBoxes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, deltas: Tensor, anchors: Tensor, weights: list[float], coder: int) -> Tensor:
        out = torch.empty(deltas.shape, dtype=result_dtype(deltas, anchors), device=deltas.device)
        op("decode_boxes", backend)(deltas, anchors, weights, coder, out)
        ctx.backend, ctx.weights, ctx.coder = backend, weights, coder
        ctx.save_for_backward(deltas, anchors)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        deltas, anchors = ctx.saved_tensors
        grad = torch.empty_like(deltas)
        op("decode_boxes_backward", ctx.backend)(
            grad_output.detach().contiguous(), deltas, anchors, ctx.weights, ctx.coder, grad
        )
        (grad,) = guard_double_backward("decode_boxes", [grad], [deltas], [grad_output])
        return None, grad, None, None, None


def decode_boxes(
    deltas: Tensor,
    anchors: Tensor,
    *,
    weights: Sequence[float],
    box_coder: str = "delta",
    backend: str | None = None,
) -> Tensor:
    """Boxes (..., 4); see ``functional.decode_boxes``."""
    refuse_transforms("decode_boxes", deltas, constants=(anchors,))
    anchors = anchors.detach().contiguous()
    backend = backend or library.backend_of(deltas)
    return _DecodeBoxes.apply(backend, deltas.contiguous(), anchors, [float(w) for w in weights], CODERS[box_coder])


def _constant(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.detach().contiguous(), b.detach().contiguous()


def encode_boxes(
    boxes: Tensor,
    anchors: Tensor,
    *,
    weights: Sequence[float],
    box_coder: str = "delta",
    backend: str | None = None,
) -> Tensor:
    """Deltas (..., 4), without gradient; see ``functional.encode_boxes``."""
    refuse_transforms("encode_boxes", constants=(boxes, anchors))
    boxes, anchors = _constant(boxes, anchors)
    out = torch.empty(boxes.shape, dtype=result_dtype(boxes, anchors), device=boxes.device)
    backend = backend or library.backend_of(boxes)
    op("encode_boxes", backend)(boxes, anchors, [float(w) for w in weights], CODERS[box_coder], out)
    return out


def paired_box_iou(boxes1: Tensor, boxes2: Tensor, *, backend: str | None = None) -> Tensor:
    """IoU (...) of aligned boxes, without gradient."""
    refuse_transforms("paired_box_iou", constants=(boxes1, boxes2))
    boxes1, boxes2 = _constant(boxes1, boxes2)
    out = torch.empty(boxes1.shape[:-1], dtype=result_dtype(boxes1, boxes2), device=boxes1.device)
    op("paired_box_iou", backend or library.backend_of(boxes1))(boxes1, boxes2, out)
    return out


def delta_iou(
    pred_deltas: Tensor,
    target_deltas: Tensor,
    *,
    weights: Sequence[float],
    box_coder: str,
    backend: str | None = None,
) -> Tensor:
    """IoU (...) of the boxes that two sets of deltas stand for, without gradient."""
    refuse_transforms("delta_iou", constants=(pred_deltas, target_deltas))
    pred, target = _constant(pred_deltas, target_deltas)
    out = torch.empty(pred.shape[:-1], dtype=result_dtype(pred, target), device=pred.device)
    backend = backend or library.backend_of(pred)
    op("delta_iou", backend)(pred, target, [float(w) for w in weights], CODERS[box_coder], out)
    return out
