"""The fused detection loss: classification and localisation over all levels, forward and gradient in one pass."""

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
    is_dense,
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
from .boxes import CODERS
from .library import op
from .workspace import detection_workspace, groups_of

_NAME = "iou_balanced_detection_loss"
_FIRST_MAP = 2  # position of the first map among the Function's arguments
_MAX_LEVELS = 16  # kMaxLevels of csrc/cuda
_MAX_LISTED = 64  # images whose boxes come as a list; kMaxImages of csrc/cuda
_SCOPES = {"batch": 0, "level": 1, "image": 2}


class _Spec(NamedTuple):
    """A call but for its tensors: one argument of the Function, since autograd takes time for each."""

    backend: str
    levels: int
    num_gt: int
    num_scopes: int
    parameters: tuple[Any, ...]
    loss_parameters: tuple[float, float, bool, float]
    divisors: tuple[float, float]  # 0: the default
    grad_scale: float
    process_group: Any
    inplace: bool
    grad_enabled: bool
    packed: bool  # one op checks the values and fills
    check: Callable[[], None] | None  # with packed: raises for a value out of range


def _inputs(heads: Sequence[Tensor], constants: Sequence[Tensor | None], spec: _Spec) -> tuple[Any, ...]:
    """What all three ops begin with. ``heads``: the levels' logits, then their deltas."""
    gt = (list(constants[2 : 2 + spec.num_gt]), list(constants[2 + spec.num_gt : -3]))
    return (list(heads[: spec.levels]), list(heads[spec.levels :]), *constants[:2], *gt, *spec.parameters)


def _scaling(constants: Sequence[Tensor | None], world_size: float, spec: _Spec) -> tuple[Any, ...]:
    cls_avg_factor, loc_avg_factor, grad_scale_tensor = constants[-3:]
    divisors = (cls_avg_factor, spec.divisors[0], loc_avg_factor, spec.divisors[1])
    return (*spec.loss_parameters, *divisors, world_size, grad_scale_tensor, spec.grad_scale)


def _checked_fill(
    heads: Sequence[Tensor],
    constants: Sequence[Tensor | None],
    spec: _Spec,
    written: list[Tensor],
    grads: tuple[int, int],
) -> None:
    """The CPU's check of values and fill in one op; raises for a value out of range, before anything is computed."""
    level_sizes, scope, eta, alpha, gamma, lambda_, beta, coder, box_weights = spec.parameters
    eps, w_loc, normalize_loc, cls_weight = spec.loss_parameters
    cls_avg, loc_avg, scale = constants[-3:]
    integers = [
        *(spec.levels, spec.num_gt, scope, coder, normalize_loc, spec.check is not None),
        *(cls_avg is not None, loc_avg is not None, scale is not None, *grads, *level_sizes),
    ]
    numbers = [
        *(eta, alpha, gamma, lambda_, beta, *box_weights, eps, w_loc, cls_weight),
        *(*spec.divisors, spec.grad_scale),
    ]
    read = [*heads, *[t for t in constants if t is not None]]
    if op("detection_checked_fill", "cpu")(read, written, integers, numbers) >= 0:
        raise_for(spec.check)


class _DetectionLoss(torch.autograd.Function):
    """``constants``: anchors, matched_idxs, gt boxes and labels; avg_factors and grad_scale if they are tensors."""

    @staticmethod
    def forward(
        ctx: Any, spec: _Spec, constants: tuple[Tensor | None, ...], first: Tensor, *others: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # `first` by itself, so that no call has as many arguments as this has parameters: where no gradient is wanted
        # torch.compile then takes the context for one of them that is not needed, and leaves it out.
        heads = (first, *others)
        levels, device = spec.levels, first.device
        logits, deltas = heads[:levels], heads[levels:]
        sums = sums_buffer(spec.num_scopes, device)
        dtype = result_dtype(first, heads[levels])  # all levels have one
        outputs = scalars((dtype, dtype, torch.int64, torch.float32), device)
        eager = not torch.compiler.is_compiling()
        # needs_input_grad is also true under no_grad, and grad mode is off in here: the caller says which mode it was.
        needed = ctx.needs_input_grad
        want_logits = spec.grad_enabled and True in needed[_FIRST_MAP : _FIRST_MAP + levels]
        want_deltas = spec.grad_enabled and True in needed[_FIRST_MAP + levels :]
        ctx.inplace = spec.inplace and eager and want_logits
        logit_buffers = gradient_buffers(logits, want_logits and eager, ctx.inplace, in_phase=spec.backend != "cpu")
        delta_buffers = gradient_buffers(deltas, want_deltas and eager)
        workspace, world_size = [], 1.0
        if spec.packed:
            written = [sums, *outputs, *logit_buffers, *delta_buffers]
            _checked_fill(heads, constants, spec, written, (len(logit_buffers), len(delta_buffers)))
        else:
            inputs = _inputs(heads, constants, spec)
            workspace = _workspace(logits, deltas, constants[1], spec)
            if spec.process_group is not None:
                world_size = _global_sums(inputs, sums, workspace, spec)
            op("detection_fill", spec.backend)(
                *inputs,
                *_scaling(constants, world_size, spec),
                spec.process_group is None,
                sums,
                outputs,
                logit_buffers,
                delta_buffers,
                workspace,
            )
        constant = outputs[2:]
        if not want_deltas:
            constant = (outputs[1], *constant)
        if not want_logits:
            constant = (outputs[0], *constant)
        ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)
        if want_logits or want_deltas:
            ctx.spec, ctx.world_size, ctx.wants = spec, world_size, (want_logits, want_deltas)
            ctx.buffers, ctx.delta_buffers = logit_buffers, delta_buffers
            ctx.layouts = layouts_of(logits)
            ctx.save_for_backward(*heads, *constants, sums, *workspace)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_cls: Tensor | None, grad_loc: Tensor | None, *unused: Any) -> Any:
        spec, saved = ctx.spec, ctx.saved_tensors
        levels, backend, expected = spec.levels, spec.backend, spec.grad_scale
        last = 2 * levels + 2 + 2 * spec.num_gt + 3  # of the constants; the sums and the workspace follow
        heads = (*laid_out(saved[:levels], ctx.layouts), *saved[levels : 2 * levels])
        constants = saved[2 * levels : last]
        scale_tensor = constants[-1]
        # Each loss has its own gradients: none of the classification loss reaches the deltas, nor the other way round.
        # A loss that took no part in this backward keeps its buffers for a later one.
        grad_logits: list[Tensor | None] = [None] * levels
        grad_deltas: list[Tensor | None] = [None] * levels
        want_logits, want_deltas = grad_cls is not None and ctx.wants[0], grad_loc is not None and ctx.wants[1]
        cls_filled = loc_filled = compared = None  # compared: a grad_output found to be the expected one
        if want_logits and ctx.inplace:
            grad_logits = rescale_inplace(_NAME, ctx, backend, grad_cls, scale_tensor, expected)
        elif want_logits:
            grad_logits, cls_filled = take_buffers(ctx, heads[:levels], in_phase=backend != "cpu")
            if cls_filled and is_expected(backend, grad_cls, scale_tensor, expected):
                cls_filled, compared = None, grad_cls  # nothing left to do
        if want_deltas:
            grad_deltas, loc_filled = take_buffers(ctx, heads[levels:], "delta_buffers")
            if loc_filled and (grad_loc is compared or is_expected(backend, grad_loc, scale_tensor, expected)):
                loc_filled = None
        for filled in (True, False):  # one call for both heads, unless only one of them was filled in the forward
            cls_buffers = grad_logits if cls_filled is filled else []
            loc_buffers = grad_deltas if loc_filled is filled else []
            if cls_buffers or loc_buffers:
                op("detection_backward", backend)(
                    *_inputs(heads, constants, spec),
                    *_scaling(constants, ctx.world_size, spec),
                    filled,
                    saved[last],
                    grad_cls.detach() if cls_buffers else None,
                    grad_loc.detach() if loc_buffers else None,
                    cls_buffers,
                    loc_buffers,
                    list(saved[last + 1 :]),
                )
        grad_outputs = [grad_cls] * levels + [grad_loc] * levels
        grads = guard_double_backward(_NAME, [*grad_logits, *grad_deltas], heads, grad_outputs)
        return (None, None, *grads)


def _global_sums(inputs: tuple[Any, ...], sums: Tensor, workspace: list[Tensor], spec: _Spec) -> float:
    """Fills the sums with those of all processes; returns how many there are."""
    op("detection_sums", spec.backend)(*inputs, sums, workspace)
    # An image's sums are complete on its own process: only the counts of row 0 are shared.
    by_image = spec.parameters[1] == _SCOPES["image"]
    torch.distributed.all_reduce(sums[0] if by_image else sums, group=spec.process_group)
    return float(distributed.world_size(spec.process_group))


def _workspace(logits: Sequence[Tensor], deltas: Sequence[Tensor], matched_idxs: Tensor, spec: _Spec) -> list[Tensor]:
    images, anchors = matched_idxs.shape
    level_sizes, _, eta, _, _, lambda_ = spec.parameters[:6]
    classes = 0
    for x, d in zip(logits, deltas, strict=True):
        classes = max(classes, x.shape[1] * 4 // d.shape[1] if x.ndim == 4 else x.shape[2])
    levels = max(len(logits), len(level_sizes))
    groups = max(groups_of(deltas), levels)
    # iou^lambda is iou^eta where they are the same, but for degenerate boxes: there 0^0 must not count.
    weights = 1 if eta == lambda_ != 0 else 2
    return detection_workspace(
        spec.backend, images, anchors, classes, groups, levels, spec.num_scopes, weights, matched_idxs.device
    )


def _few_tensors(boxes: list[Tensor], labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Ground truth as the GPU kernels take it in their parameters: of one dtype, padded where there are many images."""
    if len(boxes) <= 1:
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
    if levels > _MAX_LEVELS:
        raise ValueError(
            f"{_NAME}: the {backend} kernels take at most {_MAX_LEVELS} levels, got {levels}; use backend='reference'"
        )


def _constant(x: Tensor) -> Tensor:
    return x.detach().contiguous() if x.requires_grad else x.contiguous()


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
    check: Callable[[], None] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both losses, num_positives and mean_iou; see ``functional.iou_balanced_detection_loss``."""
    if inplace:
        check_inplace(_NAME, list(cls_logits), grad_scale)
    boxes = [gt_boxes] if isinstance(gt_boxes, Tensor) else list(gt_boxes)
    labels = [gt_labels] if isinstance(gt_labels, Tensor) else list(gt_labels)
    refuse_transforms(_NAME, *cls_logits, *bbox_deltas, constants=(anchors, matched_idxs, *boxes, *labels))
    backend = backend or library.backend_of(matched_idxs)
    packed = fills_checked(backend, process_group, cls_logits[0])
    if check is not None and (inplace or not packed):  # in place, autograd is told of the write before the op runs
        check()
    if backend != "cpu":
        _check_levels(backend, max(len(cls_logits), len(level_sizes)))
        boxes, labels = _few_tensors(boxes, labels)
    images = matched_idxs.shape[0]
    num_scopes = {"batch": 1, "level": len(level_sizes), "image": images}[normalizer_scope]
    cut = normalizer_scope == "level" and cls_logits[0].ndim == 3
    parameters = (
        [int(n) for n in level_sizes] if cut else [],  # maps tell theirs, and torch.compile compiles for each number
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
    scale_tensor, scale = expected_grad_output(grad_scale, result_dtype(cls_logits[0], bbox_deltas[0]))
    spec = _Spec(
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
        packed,
        check,
    )
    constants = (
        *(_constant(anchors), matched_idxs.contiguous()),
        *[_constant(b) for b in boxes],
        *[t.contiguous() for t in labels],
        *(cls_avg, loc_avg, scale_tensor),
    )
    return apply(_DetectionLoss, spec, constants, *[_dense(x) for x in cls_logits], *bbox_deltas)
