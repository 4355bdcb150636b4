"""Flat losses: sigmoid focal (and BCE), softmax cross entropy and smooth L1 through one autograd Function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import distributed
from ..boxes import result_dtype
from . import library
from .autograd import (
    apply,
    check_inplace,
    expected_grad_output,
    fills_checked,
    gradient_buffers,
    guard_double_backward,
    is_expected,
    laid_out,
    layouts_of,
    raise_for,
    refuse_transforms,
    rescale_inplace,
    scalars,
    sums_buffer,
    take_buffers,
    tensor_or_number,
)
from .library import op
from .workspace import rows_workspace

_CHECKED_FILL = ("focal", "cross_entropy")  # losses with an op that checks the values and fills


class _Spec(NamedTuple):
    """A call but for its tensors: one argument of the Functions, since autograd takes time for each."""

    name: str
    called: str  # the public function, for messages
    backend: str
    num_scopes: int
    sum_parameters: tuple[Any, ...]  # the op's own numbers, for the sums
    loss_parameters: tuple[Any, ...]  # and for the loss
    process_group: Any
    divisor: float = 1.0  # 0: the default
    grad_scale: float = 1.0
    inplace: bool = False
    grad_enabled: bool = True
    packed: bool = False  # one op checks the values and fills
    check: Callable[[], None] | None = None  # with packed: raises for a value out of range


def _in_phase(spec: _Spec) -> bool:
    """See gradient_buffers: x are logits for a GPU's kernels."""
    return spec.backend != "cpu" and spec.name != "smooth_l1"


def _inputs(x: Tensor, constants: Sequence[Tensor | None], spec: _Spec) -> tuple[Any, ...]:
    """What all ops of a loss begin with. ``constants``: second and third tensor, weight, scope_ids, others."""
    return (x, *constants[:4], spec.num_scopes, *spec.sum_parameters)


def _global_sums(inputs: tuple[Any, ...], sums: Tensor, workspace: list[Tensor], spec: _Spec) -> float:
    """Fills the sums with those of all processes, if there is a process group; returns how many there are."""
    if spec.process_group is None:
        return 1.0
    op(f"{spec.name}_sums", spec.backend)(*inputs, sums, workspace)
    torch.distributed.all_reduce(sums, group=spec.process_group)
    return float(distributed.world_size(spec.process_group))


def _checked_fill(x: Tensor, constants: tuple[Tensor | None, ...], spec: _Spec, written: list[Tensor]) -> None:
    """The CPU's check of values and fill in one op; raises for a value out of range, before anything is computed."""
    present = [t is not None for t in constants[2:]]
    integers = [spec.num_scopes, spec.check is not None, *present]
    numbers = [*spec.sum_parameters, *spec.loss_parameters, spec.divisor, spec.grad_scale]
    read = [x, *(t for t in constants if t is not None)]
    if op(f"{spec.name}_checked_fill", "cpu")(read, written, integers, numbers) >= 0:
        raise_for(spec.check)


def _workspace(x: Tensor, spec: _Spec) -> list[Tensor]:
    return rows_workspace(spec.backend, spec.name, x.shape[0], x.shape[1], spec.num_scopes, x.device)


class _FlatLoss(torch.autograd.Function):
    """A loss over rows x. The last two ``constants``: avg_factor and grad_scale, if they are tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, constants: tuple[Tensor | None, ...], spec: _Spec) -> Tensor:
        # needs_input_grad is also true under no_grad, and grad mode is off in here: the caller says which mode it was.
        wanted = spec.grad_enabled and ctx.needs_input_grad[0]
        eager = not torch.compiler.is_compiling()
        ctx.inplace = spec.inplace and eager and wanted
        buffers = gradient_buffers([x], wanted and eager, ctx.inplace, _in_phase(spec))
        (loss,) = scalars((result_dtype(x),), x.device)
        sums = sums_buffer(spec.num_scopes, x.device)
        workspace, world_size = [], 1.0
        if spec.packed:
            _checked_fill(x, constants, spec, [sums, loss, *buffers])
        else:
            inputs, workspace = _inputs(x, constants, spec), _workspace(x, spec)
            world_size = _global_sums(inputs, sums, workspace, spec)
            scaling = (constants[4], spec.divisor, world_size, constants[5], spec.grad_scale)
            op(f"{spec.name}_fill", spec.backend)(
                *inputs, *spec.loss_parameters, *scaling, spec.process_group is None, sums, loss, buffers, workspace
            )
        if wanted:
            ctx.spec, ctx.world_size, ctx.buffers, ctx.layouts = spec, world_size, buffers, layouts_of([x])
            if ctx.inplace:
                ctx.save_for_backward(x, constants[5])  # x: its buffer must not be written before the backward
            else:
                ctx.save_for_backward(x, *constants, sums, *workspace)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        spec, name = ctx.spec, ctx.spec.called
        if ctx.inplace:
            _, scale_tensor = ctx.saved_tensors
            (grad,) = rescale_inplace(name, ctx, spec.backend, grad_output, scale_tensor, spec.grad_scale)
            return grad, None, None
        x, second, third, weight, scope_ids, avg_factor, scale_tensor, sums, *workspace = ctx.saved_tensors
        (x,) = laid_out([x], ctx.layouts)
        (grad,), filled = take_buffers(ctx, [x], in_phase=_in_phase(spec))
        if not (filled and is_expected(spec.backend, grad_output, scale_tensor, spec.grad_scale)):
            inputs = _inputs(x, (second, third, weight, scope_ids), spec)
            scaling = (avg_factor, spec.divisor, ctx.world_size, scale_tensor, spec.grad_scale)
            op(f"{spec.name}_backward", spec.backend)(
                *inputs, *spec.loss_parameters, *scaling, filled, sums, grad_output.detach(), grad, workspace
            )
        (grad,) = guard_double_backward(name, [grad], [x], [grad_output])
        return grad, None, None


class _ElementwiseLoss(torch.autograd.Function):
    """reduction="none" of the same losses: entries (R, K) for the focal loss, rows (R,) for the others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, constants: tuple[Tensor | None, ...], spec: _Spec) -> Tensor:
        inputs, workspace = _inputs(x, constants, spec), _workspace(x, spec)
        sums = sums_buffer(spec.num_scopes, x.device)
        _global_sums(inputs, sums, workspace, spec)
        by_entry = spec.name == "focal"
        loss = torch.empty_like(x) if by_entry else torch.empty(x.shape[0], dtype=result_dtype(x), device=x.device)
        request = False if by_entry else None
        op(f"{spec.name}_elementwise", spec.backend)(
            *inputs, *spec.loss_parameters, request, spec.process_group is None, sums, loss, workspace
        )
        ctx.spec, ctx.layouts = spec, layouts_of([x])
        ctx.save_for_backward(x, *constants[:4], sums, *workspace)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        x, second, third, weight, scope_ids, sums, *workspace = ctx.saved_tensors
        spec = ctx.spec
        (x,) = laid_out([x], ctx.layouts)
        by_entry = spec.name == "focal"
        grad = torch.empty_like(x)
        request = True if by_entry else grad_output.detach().contiguous()
        inputs = _inputs(x, (second, third, weight, scope_ids), spec)
        op(f"{spec.name}_elementwise", spec.backend)(
            *inputs, *spec.loss_parameters, request, False, sums, grad, workspace
        )
        if by_entry:
            # An ignored row has no gradient whatever grad_output is: 0, not 0 * inf.
            grad = torch.where(grad == 0, grad, grad * grad_output.detach())
        (grad,) = guard_double_backward(spec.called, [grad], [x], [grad_output])
        return grad, None, None


def _apply(
    name: str,
    called: str,
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
    check: Callable[[], None] | None = None,
    backend: str | None = None,
) -> Tensor:
    refuse_transforms(called, x, constants=(second, third, weight, scope_ids))
    backend = backend or library.backend_of(x)
    common = (name, called, backend, num_scopes or 1, sum_parameters, loss_parameters, process_group)
    packed = name in _CHECKED_FILL and reduction != "none" and fills_checked(backend, process_group, x)
    if check is not None and (inplace or not packed):  # in place, autograd is told of the write before the op runs
        check()
    if reduction == "none":
        return apply(_ElementwiseLoss, x, (second, third, weight, scope_ids), _Spec(*common))
    avg_tensor, divisor = (None, 1.0) if reduction == "sum" else tensor_or_number(avg_factor)
    scale_tensor, scale = expected_grad_output(grad_scale, result_dtype(x))
    return apply(
        _FlatLoss,
        x,
        (second, third, weight, scope_ids, avg_tensor, scale_tensor),
        _Spec(*common, divisor, scale, inplace, torch.is_grad_enabled(), packed, check),
    )


def _rows(t: Tensor | None) -> Tensor | None:
    """A constant input with one element for each row, contiguous."""
    if t is None or (t.ndim == 1 and t.is_contiguous() and not t.requires_grad):
        return t  # as it is: each view would take as long as the checks of all arguments
    return t.detach().reshape(-1).contiguous()


def _matrix(t: Tensor) -> Tensor:
    """Logits as contiguous rows: the tensor itself where it is that, since a view costs a node of autograd's graph."""
    return t if t.ndim == 2 and t.is_contiguous() else t.reshape(-1, t.shape[-1]).contiguous()


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
    called: str,
    check: Callable[[], None] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Eq. 3 and 4 with the focal loss; see ``functional.iou_balanced_sigmoid_focal_loss``. called: the public function,
    that one or ``iou_balanced_binary_cross_entropy``.
    """
    if inplace:
        if reduction == "none":
            raise ValueError(f"{called}: inplace=True goes with reduction 'mean' or 'sum', got 'none'")
        check_inplace(called, [logits], grad_scale)
    if reduction == "none":
        logits = logits.to(result_dtype(logits))  # the losses themselves are float32: nothing is rounded to 16 bits
    alpha = -1.0 if alpha is None else float(alpha)
    loss = _apply(
        "focal",
        called,
        _matrix(logits),
        _rows(labels),
        _rows(iou),
        _rows(weight),
        _rows(scope_ids),
        num_scopes,
        (float(eta), alpha, float(gamma)),
        (float(eps),),
        reduction=reduction,
        avg_factor=avg_factor,
        process_group=process_group,
        grad_scale=grad_scale,
        inplace=inplace,
        check=check,
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
    check: Callable[[], None] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Eq. 3 and 4 with softmax cross entropy; see ``functional.iou_balanced_cross_entropy``."""
    loss = _apply(
        "cross_entropy",
        "iou_balanced_cross_entropy",
        _matrix(logits),
        _rows(labels),
        _rows(iou),
        _rows(weight),
        _rows(scope_ids),
        num_scopes,
        (int(background_index), float(eta)),
        (float(eps),),
        reduction=reduction,
        avg_factor=avg_factor,
        process_group=process_group,
        grad_scale=grad_scale,
        check=check,
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
        "iou_balanced_smooth_l1_loss",
        pred_deltas.contiguous(),
        target_deltas.detach().contiguous(),
        _rows(iou),
        None if weight is None else weight.detach().contiguous(),
        _rows(scope_ids),
        num_scopes,
        (float(lambda_), float(beta), [float(w) for w in box_weights], bool(normalize)),
        (float(w_loc), float(eps)),
        reduction=reduction,
        avg_factor=avg_factor,
        process_group=process_group,
        grad_scale=grad_scale,
        backend=backend,
    )
