"""The fused detection loss: classification and localisation over all levels, forward and gradient in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..boxes import result_dtype
from . import library
from .autograd import (
    check_inplace,
    gradient_buffers,
    guard_double_backward,
    is_dense,
    refuse_transforms,
    rescale_inplace,
    take_buffers,
    tensor_or_number,
)
from .boxes import CODERS
from .library import op
from .workspace import detection_workspace, groups_of

_NAME = "iou_balanced_detection_loss"
_FIRST_MAP = 16  # position of the first map among the Function's arguments
_MAX_LEVELS = 16  # kMaxLevels of csrc/cuda
_MAX_LISTED = 64  # images whose boxes come as a list; kMaxImages of csrc/cuda
_SCOPES = {"batch": 0, "level": 1, "image": 2}


class _DetectionLoss(torch.autograd.Function):
    """``levels`` maps of logits, then as many of deltas, then the constant tensors in ``split`` groups."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        levels: int,
        num_gt: int,
        num_scopes: int,
        parameters: tuple[Any, ...],
        loss_parameters: tuple[Any, ...],
        divisors: tuple[float, float],
        grad_scale: float,
        process_group: Any,
        inplace: bool,
        grad_enabled: bool,
        cls_avg_factor: Tensor | None,
        loc_avg_factor: Tensor | None,
        grad_scale_tensor: Tensor | None,
        anchors: Tensor,
        matched_idxs: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits, deltas = list(tensors[:levels]), list(tensors[levels : 2 * levels])
        gt_boxes, gt_labels = list(tensors[2 * levels : 2 * levels + num_gt]), list(tensors[2 * levels + num_gt :])
        device = anchors.device
        sums = torch.empty((1 + num_scopes, 4), dtype=torch.float64, device=device)
        inputs = (logits, deltas, anchors, matched_idxs, gt_boxes, gt_labels, *parameters)
        workspace = _workspace(backend, logits, deltas, matched_idxs, parameters, num_scopes)
        world_size = 1.0
        if process_group is not None:
            op("detection_sums", backend)(*inputs, sums, workspace)
            # An image's sums are complete on its own process: only the counts of row 0 are shared.
            torch.distributed.all_reduce(sums[0] if parameters[1] == _SCOPES["image"] else sums, group=process_group)
            world_size = float(distributed.world_size(process_group))
        dtype = result_dtype(*logits, *deltas)
        outputs = (
            torch.empty((), dtype=dtype, device=device),
            torch.empty((), dtype=dtype, device=device),
            torch.empty((), dtype=torch.int64, device=device),
            torch.empty((), dtype=torch.float32, device=device),
        )
        eager = not torch.compiler.is_compiling()
        # needs_input_grad is also true under no_grad, and grad mode is off in here: the caller says which mode it was.
        want_logits = grad_enabled and any(ctx.needs_input_grad[_FIRST_MAP : _FIRST_MAP + levels])
        want_deltas = grad_enabled and any(ctx.needs_input_grad[_FIRST_MAP + levels : _FIRST_MAP + 2 * levels])
        ctx.inplace = inplace and eager and want_logits
        logit_buffers = gradient_buffers(logits, want_logits and eager, ctx.inplace)
        delta_buffers = gradient_buffers(deltas, want_deltas and eager)
        scaling = (cls_avg_factor, divisors[0], loc_avg_factor, divisors[1], world_size, grad_scale_tensor, grad_scale)
        op("detection_fill", backend)(
            *inputs,
            *loss_parameters,
            *scaling,
            process_group is None,
            sums,
            outputs,
            logit_buffers,
            delta_buffers,
            workspace,
        )
        ctx.mark_non_differentiable(outputs[2], outputs[3])
        ctx.set_materialize_grads(False)
        if want_logits or want_deltas:
            ctx.backend, ctx.levels, ctx.num_gt, ctx.num_workspace = backend, levels, num_gt, len(workspace)
            ctx.parameters, ctx.loss_parameters, ctx.divisors = parameters, loss_parameters, divisors
            ctx.world_size, ctx.expected = world_size, grad_scale
            ctx.wants = (want_logits, want_deltas)
            ctx.buffers, ctx.delta_buffers = logit_buffers, delta_buffers
            constants = (cls_avg_factor, loc_avg_factor, grad_scale_tensor, anchors, matched_idxs, sums)
            ctx.save_for_backward(*constants, *workspace, *tensors)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_cls: Tensor | None, grad_loc: Tensor | None, *unused: Any) -> Any:
        cls_avg_factor, loc_avg_factor, grad_scale_tensor, anchors, matched_idxs, sums, *tensors = ctx.saved_tensors
        levels, num_gt = ctx.levels, ctx.num_gt
        workspace, tensors = tensors[: ctx.num_workspace], tensors[ctx.num_workspace :]
        logits, deltas = tensors[:levels], tensors[levels : 2 * levels]
        gt_boxes, gt_labels = tensors[2 * levels : 2 * levels + num_gt], tensors[2 * levels + num_gt :]
        scaling = (cls_avg_factor, ctx.divisors[0], loc_avg_factor, ctx.divisors[1], ctx.world_size, grad_scale_tensor)
        constants = (anchors, matched_idxs, gt_boxes, gt_labels, *ctx.parameters, *ctx.loss_parameters)

        # Each loss has its own gradients: none of the classification loss reaches the deltas, nor the other way round.
        # A loss that took no part in this backward keeps its buffers for a later one.
        grad_logits: list[Tensor | None] = [None] * levels
        grad_deltas: list[Tensor | None] = [None] * levels
        want_logits, want_deltas = grad_cls is not None and ctx.wants[0], grad_loc is not None and ctx.wants[1]
        cls_filled = loc_filled = None
        if want_logits and ctx.inplace:
            grad_logits = rescale_inplace(_NAME, ctx, grad_cls, grad_scale_tensor, ctx.expected)
        elif want_logits:
            grad_logits, cls_filled = take_buffers(ctx, logits)
        if want_deltas:
            grad_deltas, loc_filled = take_buffers(ctx, deltas, "delta_buffers")
        for filled in (True, False):  # one call for both heads, unless only one of them was filled in the forward
            cls_buffers = grad_logits if cls_filled is filled else []
            loc_buffers = grad_deltas if loc_filled is filled else []
            if cls_buffers or loc_buffers:
                op("detection_backward", ctx.backend)(
                    logits,
                    deltas,
                    *constants,
                    *scaling,
                    ctx.expected,
                    filled,
                    sums,
                    grad_cls.detach() if cls_buffers else None,
                    grad_loc.detach() if loc_buffers else None,
                    cls_buffers,
                    loc_buffers,
                    workspace,
                )
        grads = guard_double_backward(_NAME, [*grad_logits, *grad_deltas], [*logits, *deltas])
        return (*[None] * _FIRST_MAP, *grads, *[None] * (2 * num_gt))


def _workspace(
    backend: str,
    logits: list[Tensor],
    deltas: list[Tensor],
    matched_idxs: Tensor,
    parameters: tuple[Any, ...],
    num_scopes: int,
) -> list[Tensor]:
    images, anchors = matched_idxs.shape
    level_sizes, _, eta, _, _, lambda_ = parameters[:6]
    classes = 0
    for x, d in zip(logits, deltas, strict=True):
        classes = max(classes, x.shape[1] * 4 // d.shape[1] if x.ndim == 4 else x.shape[2])
    levels = max(len(logits), len(level_sizes))
    groups = max(groups_of(deltas), levels)
    # iou^lambda is iou^eta where they are the same, but for degenerate boxes: there 0^0 must not count.
    weights = 1 if eta == lambda_ != 0 else 2
    return detection_workspace(
        backend, images, anchors, classes, groups, levels, num_scopes, weights, matched_idxs.device
    )


def _few_tensors(boxes: list[Tensor], labels: list[Tensor], backend: str) -> tuple[list[Tensor], list[Tensor]]:
    """Ground truth as the GPU kernels take it in their parameters: of one dtype, padded where there are many images."""
    if backend == "cpu" or len(boxes) <= 1:
        return boxes, labels
    if len({b.dtype for b in boxes}) > 1:
        boxes = [b.to(torch.float64) for b in boxes]
    if len({t.dtype for t in labels}) > 1:
        labels = [t.to(torch.int64) for t in labels]
    if len(boxes) <= _MAX_LISTED:
        return boxes, labels
    pad = torch.nn.utils.rnn.pad_sequence
    return [pad(boxes, True)], [pad(labels, True, -1)]


def _check_levels(backend: str, levels: int) -> None:
    if backend != "cpu" and levels > _MAX_LEVELS:
        raise ValueError(
            f"{_NAME}: the {backend} kernels take at most {_MAX_LEVELS} levels, got {levels}; use backend='reference'"
        )


def _dense(x: Tensor) -> Tensor:
    return x if is_dense(x) else x.contiguous()


def detection_loss(
    cls_logits: Sequence[Tensor],
    bbox_deltas: Sequence[Tensor],
    anchors: Tensor,
    matched_idxs: Tensor,
    gt_boxes: Tensor | Sequence[Tensor],
    gt_labels: Tensor | Sequence[Tensor],
    *,
    eta: float,
    lambda_: float,
    w_loc: float,
    alpha: float | None,
    gamma: float,
    beta: float,
    box_coder: str,
    box_weights: Sequence[float],
    normalize_loc: bool,
    normalizer_scope: str,
    level_sizes: Sequence[int],
    eps: float,
    cls_weight: float,
    avg_factor: tuple[float | Tensor | None, float | Tensor | None],
    process_group: Any,
    grad_scale: float | Tensor,
    inplace: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both losses, num_positives and mean_iou; see ``functional.iou_balanced_detection_loss``."""
    if inplace:
        check_inplace(_NAME, list(cls_logits), grad_scale)
    refuse_transforms(_NAME, *cls_logits, *bbox_deltas)
    boxes = [gt_boxes] if isinstance(gt_boxes, Tensor) else list(gt_boxes)
    labels = [gt_labels] if isinstance(gt_labels, Tensor) else list(gt_labels)
    backend = backend or library.backend_of(matched_idxs)
    _check_levels(backend, max(len(cls_logits), len(level_sizes)))
    boxes, labels = _few_tensors([b.detach() for b in boxes], labels, backend)
    images = matched_idxs.shape[0]
    num_scopes = {"batch": 1, "level": len(level_sizes), "image": images}[normalizer_scope]
    parameters = (
        [int(n) for n in level_sizes],
        _SCOPES[normalizer_scope],
        float(eta),
        -1.0 if alpha is None else float(alpha),
        float(gamma),
        float(lambda_),
        float(beta),
        CODERS[box_coder],
        [float(w) for w in box_weights],
    )
    loss_parameters = (float(eps), float(w_loc), bool(normalize_loc), float(cls_weight))
    cls_avg, cls_divisor = tensor_or_number(avg_factor[0])
    loc_avg, loc_divisor = tensor_or_number(avg_factor[1])
    scale_tensor, scale = tensor_or_number(grad_scale, 1.0)
    return _DetectionLoss.apply(
        backend,
        len(cls_logits),
        len(boxes),
        num_scopes,
        parameters,
        loss_parameters,
        (cls_divisor, loc_divisor),
        scale,
        process_group,
        inplace,
        torch.is_grad_enabled(),
        cls_avg,
        loc_avg,
        scale_tensor,
        anchors.detach().contiguous(),
        matched_idxs.contiguous(),
        *[_dense(x) for x in cls_logits],
        *bbox_deltas,
        *[b.contiguous() for b in boxes],
        *[t.contiguous() for t in labels],
    )
