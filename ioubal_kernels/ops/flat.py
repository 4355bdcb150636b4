"""Flat losses: sigmoid focal (and BCE), softmax cross entropy and smooth L1 through one autograd Function."""

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
    refuse_transforms,
    rescale_inplace,
    take_buffers,
    tensor_or_number,
)
from .library import op
from .workspace import rows_workspace

# The function a user called, for messages.
_PUBLIC = {
    "focal": "iou_balanced_sigmoid_focal_loss",
    "cross_entropy": "iou_balanced_cross_entropy",
    "smooth_l1": "iou_balanced_smooth_l1_loss",
}


class _FlatLoss(torch.autograd.Function):
    """A loss over rows.

    ``inputs``: second and third tensor, weight, scope_ids, number of scopes; ``parameters``: the op's own numbers for
    the sums and for the loss; ``divisor``: avg_factor tensor, number (0: the default).
    """

    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        backend: str,
        x: Tensor,
        second: Tensor,
        third: Tensor | None,
        weight: Tensor | None,
        scope_ids: Tensor | None,
        num_scopes: int,
        sum_parameters: tuple[Any, ...],
        loss_parameters: tuple[Any, ...],
        avg_factor: Tensor | None,
        divisor: float,
        process_group: Any,
        grad_scale_tensor: Tensor | None,
        grad_scale: float,
        inplace: bool,
        grad_enabled: bool,
    ) -> Tensor:
        # needs_input_grad is also true under no_grad, and grad mode is off in here: the caller says which mode it was.
        wanted = grad_enabled and ctx.needs_input_grad[2]
        sums = torch.empty((1 + num_scopes, 4), dtype=torch.float64, device=x.device)
        inputs = (x, second, third, weight, scope_ids, num_scopes, *sum_parameters)
        workspace = rows_workspace(backend, name, x.shape[0], x.shape[1], num_scopes, x.device)
        world_size = 1.0
        if process_group is not None:
            op(f"{name}_sums", backend)(*inputs, sums, workspace)
            torch.distributed.all_reduce(sums, group=process_group)
            world_size = float(distributed.world_size(process_group))
        loss = torch.empty((), dtype=result_dtype(x), device=x.device)
        eager = not torch.compiler.is_compiling()
        ctx.inplace = inplace and eager and wanted
        buffers = gradient_buffers([x], wanted and eager, ctx.inplace)
        scaling = (avg_factor, divisor, world_size, grad_scale_tensor, grad_scale)
        op(f"{name}_fill", backend)(
            *inputs, *loss_parameters, *scaling, process_group is None, sums, loss, buffers, workspace
        )
        if wanted:
            ctx.name, ctx.backend, ctx.buffers = name, backend, buffers
            ctx.num_scopes, ctx.parameters = num_scopes, (*sum_parameters, *loss_parameters)
            ctx.divisor, ctx.world_size, ctx.expected = divisor, world_size, grad_scale
            if ctx.inplace:
                ctx.save_for_backward(grad_scale_tensor)
            else:
                ctx.save_for_backward(
                    x, second, third, weight, scope_ids, avg_factor, grad_scale_tensor, sums, *workspace
                )
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        if ctx.inplace:
            (grad_scale_tensor,) = ctx.saved_tensors
            (grad,) = rescale_inplace(_PUBLIC[ctx.name], ctx, grad_output, grad_scale_tensor, ctx.expected)
        else:
            x, second, third, weight, scope_ids, avg_factor, grad_scale_tensor, sums, *workspace = ctx.saved_tensors
            (grad,), filled = take_buffers(ctx, [x])
            scaling = (avg_factor, ctx.divisor, ctx.world_size, grad_scale_tensor, ctx.expected)
            inputs = (x, second, third, weight, scope_ids, ctx.num_scopes, *ctx.parameters)
            op(f"{ctx.name}_backward", ctx.backend)(
                *inputs, *scaling, filled, sums, grad_output.detach(), grad, workspace
            )
            (grad,) = guard_double_backward(_PUBLIC[ctx.name], [grad], [x])
        return (None, None, grad, *[None] * 14)


class _ElementwiseLoss(torch.autograd.Function):
    """reduction="none" of the same losses: entries (R, K) for the focal loss, rows (R,) for the others."""

    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        backend: str,
        x: Tensor,
        second: Tensor,
        third: Tensor | None,
        weight: Tensor | None,
        scope_ids: Tensor | None,
        num_scopes: int,
        sum_parameters: tuple[Any, ...],
        loss_parameters: tuple[Any, ...],
        process_group: Any,
    ) -> Tensor:
        sums = torch.empty((1 + num_scopes, 4), dtype=torch.float64, device=x.device)
        inputs = (x, second, third, weight, scope_ids, num_scopes, *sum_parameters)
        workspace = rows_workspace(backend, name, x.shape[0], x.shape[1], num_scopes, x.device)
        if process_group is not None:
            op(f"{name}_sums", backend)(*inputs, sums, workspace)
            torch.distributed.all_reduce(sums, group=process_group)
        by_entry = name == "focal"
        loss = torch.empty_like(x) if by_entry else torch.empty(x.shape[0], dtype=result_dtype(x), device=x.device)
        request = False if by_entry else None
        op(f"{name}_elementwise", backend)(
            *inputs, *loss_parameters, request, process_group is None, sums, loss, workspace
        )
        ctx.name, ctx.backend, ctx.num_scopes = name, backend, num_scopes
        ctx.parameters = (*sum_parameters, *loss_parameters)
        ctx.save_for_backward(x, second, third, weight, scope_ids, sums, *workspace)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        x, second, third, weight, scope_ids, sums, *workspace = ctx.saved_tensors
        by_entry = ctx.name == "focal"
        grad = torch.empty_like(x)
        request = True if by_entry else grad_output.detach().contiguous()
        inputs = (x, second, third, weight, scope_ids, ctx.num_scopes, *ctx.parameters)
        op(f"{ctx.name}_elementwise", ctx.backend)(*inputs, request, False, sums, grad, workspace)
        if by_entry:
            # An ignored row has no gradient whatever grad_output is: 0, not 0 * inf.
            grad = torch.where(grad == 0, grad, grad * grad_output.detach())
        (grad,) = guard_double_backward(_PUBLIC[ctx.name], [grad], [x])
        return (None, None, grad, *[None] * 9)


def _apply(
    name: str,
    x: Tensor,
    second: Tensor,
    third: Tensor | None,
    weight: Tensor | None,
    scope_ids: Tensor | None,
    num_scopes: int | None,
    sum_parameters: tuple[Any, ...],
    loss_parameters: tuple[Any, ...],
    *,
    reduction: str,
    avg_factor: Any,
    process_group: Any,
    grad_scale: Any,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    refuse_transforms(_PUBLIC[name], x)
    backend = backend or library.backend_of(x)
    common = (name, backend, x, second, third, weight, scope_ids, num_scopes or 1, sum_parameters, loss_parameters)
    if reduction == "none":
        return _ElementwiseLoss.apply(*common, process_group)
    avg_tensor, divisor = (None, 1.0) if reduction == "sum" else tensor_or_number(avg_factor)
    scale_tensor, scale = tensor_or_number(grad_scale, 1.0)
    return _FlatLoss.apply(
        *common, avg_tensor, divisor, process_group, scale_tensor, scale, inplace, torch.is_grad_enabled()
    )


def _rows(t: Tensor | None, *shape: int) -> Tensor | None:
    """A constant input as contiguous rows."""
    return None if t is None else t.detach().reshape(shape).contiguous()


def sigmoid_focal_loss(
    logits: Tensor,
    labels: Tensor,
    iou: Tensor,
    *,
    eta: float,
    alpha: float | None,
    gamma: float,
    eps: float,
    weight: Tensor | None,
    reduction: str,
    avg_factor: float | Tensor | None,
    scope_ids: Tensor | None,
    num_scopes: int | None,
    process_group: Any,
    grad_scale: float | Tensor,
    inplace: bool,
    backend: str | None = None,
) -> Tensor:
    """Eq. 3 and 4 with the focal loss; see ``functional.iou_balanced_sigmoid_focal_loss``."""
    columns = logits.shape[-1]
    if inplace:
        if reduction == "none":
            raise ValueError(f"{_PUBLIC['focal']}: inplace=True goes with reduction 'mean' or 'sum', got 'none'")
        check_inplace(_PUBLIC["focal"], [logits], grad_scale)
    if reduction == "none":
        logits = logits.to(result_dtype(logits))  # the losses themselves are float32: nothing is rounded to 16 bits
    x = logits.reshape(-1, columns).contiguous()
    alpha = -1.0 if alpha is None else float(alpha)
    loss = _apply(
        "focal",
        x,
        _rows(labels, -1),
        _rows(iou, -1),
        _rows(weight, -1),
        _rows(scope_ids, -1),
        num_scopes,
        (float(eta), alpha, float(gamma)),
        (float(eps),),
        reduction=reduction,
        avg_factor=avg_factor,
        process_group=process_group,
        grad_scale=grad_scale,
        inplace=inplace,
        backend=backend,
    )
    return loss.reshape(logits.shape) if reduction == "none" else loss


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    iou: Tensor,
    *,
    eta: float,
    background_index: int,
    eps: float,
    weight: Tensor | None,
    reduction: str,
    avg_factor: float | Tensor | None,
    scope_ids: Tensor | None,
    num_scopes: int | None,
    process_group: Any,
    grad_scale: float | Tensor,
    backend: str | None = None,
) -> Tensor:
    """Eq. 3 and 4 with softmax cross entropy; see ``functional.iou_balanced_cross_entropy``."""
    loss = _apply(
        "cross_entropy",
        logits.reshape(-1, logits.shape[-1]).contiguous(),
        _rows(labels, -1),
        _rows(iou, -1),
        _rows(weight, -1),
        _rows(scope_ids, -1),
        num_scopes,
        (int(background_index), float(eta)),
        (float(eps),),
        reduction=reduction,
        avg_factor=avg_factor,
        process_group=process_group,
        grad_scale=grad_scale,
        backend=backend,
    )
    return loss.reshape(labels.shape) if reduction == "none" else loss


def smooth_l1_loss(
    pred_deltas: Tensor,
    target_deltas: Tensor,
    iou: Tensor | None,
    *,
    lambda_: float,
    beta: float,
    w_loc: float,
    normalize: bool,
    eps: float,
    box_weights: Sequence[float],
    weight: Tensor | None,
    reduction: str,
    avg_factor: float | Tensor | None,
    scope_ids: Tensor | None,
    num_scopes: int | None,
    process_group: Any,
    grad_scale: float | Tensor,
    backend: str | None = None,
) -> Tensor:
    """Eq. 5 to 7; see ``functional.iou_balanced_smooth_l1_loss``."""
    return _apply(
        "smooth_l1",
        pred_deltas.contiguous(),
        _rows(target_deltas, -1, 4),
        _rows(iou, -1),
        None if weight is None else weight.detach().contiguous(),
        _rows(scope_ids, -1),
        num_scopes,
        (float(lambda_), float(beta), [float(w) for w in box_weights], bool(normalize)),
        (float(w_loc), float(eps)),
        reduction=reduction,
        avg_factor=avg_factor,
        process_group=process_group,
        grad_scale=grad_scale,
        backend=backend,
    )
