"""The public loss functions on flat tensors, and the box functions: validation, backend choice, one call.

Nothing is computed before every argument has been checked. A backend's module takes the validated arguments as they are
(see ``reference`` for the meaning of each). The fused loss is in ``functional_detection``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import backends, boxes, validation
from . import reference as _reference
from .boxes import BOX_CODERS, IGNORE, UNIT_WEIGHTS
from .distributed import resolve_process_group
from .validation import FLOAT_DTYPES, INDEX_DTYPES


def iou_balanced_sigmoid_focal_loss(
    logits: Tensor,
    labels: Tensor,
    iou: Tensor,
    *,
    eta: float = 1.5,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    eps: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    scope_ids: Tensor | None = None,
    num_scopes: int | None = None,
    process_group: Any = None,
    grad_scale: float | Tensor = 1.0,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """IoU-balanced focal loss on sigmoid logits (Eq. 3 and 4 of the paper with the focal loss as its CE).

    The loss of the positive entry (i, labels[i]) is multiplied by ``iou_i**eta * S / D``, where S is the sum of the
    positives' losses and D the sum of ``iou**eta`` times them. Weights and normaliser are constants: no gradient flows
    through them. Every other entry, the other classes of a positive included, is a negative of weight 1.

    Args:
        logits: (..., K), float32, float64, float16 or bfloat16; the only argument with a gradient.
        labels: (...), int32 or int64: class in [0, K), -1 background, -2 ignored (no loss, no gradient, whatever the
            logits).
        iou: (...), any float dtype; read at positives only, clamped to [0, 1]; iou**0 = 1.
        eta: exponent of the IoU, >= 0.
        alpha: focal loss's class balance in [0, 1]; None for none.
        gamma: focal loss's exponent, >= 0. gamma=0 with alpha=None is binary cross entropy.
        eps: added to D; a denominator of exactly 0 gives positives of weight 0.
        weight: (...), multiplies the plain loss before the sums; never changes counts.
        reduction: "mean" (sum over avg_factor), "sum", or "none" (the shape of the logits).
        avg_factor: divisor for "mean": positive number or 0-d tensor; default max(number of positives, 1).
        scope_ids: (...), int32 or int64 in [0, num_scopes): S and D are summed per scope. Default: one scope.
        num_scopes: number of scopes, required with scope_ids.
        process_group: None, a process group or "world": S, D and the default divisor's count are summed over it, so
            that the mean over its processes of losses and gradients is that of one process with all rows. Every process
            must use the same backend.
        grad_scale: the grad_output expected in backward; only speed depends on it.
        inplace: write the gradient over the logits, which are destroyed; one backward only. 16-bit logits then need the
            right ``grad_scale``: what underflowed cannot be scaled up again. The reference and torch.compile ignore it.
        backend: None for the automatic choice, or a name of ``available_backends()``.

    Returns:
        0-d loss, or (..., K) with reduction "none"; float32, float64 for float64 logits.

    Raises:
        TypeError, ValueError: for any argument that is not as above, before anything is computed.
        RuntimeError: for a named backend that is absent here.
    """
    op = "iou_balanced_sigmoid_focal_loss"
    return _sigmoid(
        op, logits, labels, iou, eta, alpha, gamma, eps, weight, reduction, avg_factor, scope_ids, num_scopes,
        process_group, grad_scale, inplace, backend,
    )  # fmt: skip


def iou_balanced_binary_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    iou: Tensor,
    *,
    eta: float = 1.5,
    eps: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    scope_ids: Tensor | None = None,
    num_scopes: int | None = None,
    process_group: Any = None,
    grad_scale: float | Tensor = 1.0,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """IoU-balanced binary cross entropy on sigmoid logits (Eq. 1, 3 and 4).

    ``iou_balanced_sigmoid_focal_loss`` with alpha=None and gamma=0; see there for arguments, result and errors.
    """
    op = "iou_balanced_binary_cross_entropy"
    return _sigmoid(
        op, logits, labels, iou, eta, None, 0.0, eps, weight, reduction, avg_factor, scope_ids, num_scopes,
        process_group, grad_scale, inplace, backend,
    )  # fmt: skip


def _sigmoid(
    op: str, logits: Tensor, labels: Tensor, iou: Tensor, eta: float, alpha: float | None, gamma: float, eps: float,
    weight: Tensor | None, reduction: str, avg_factor: float | Tensor | None, scope_ids: Tensor | None,
    num_scopes: int | None, process_group: Any, grad_scale: float | Tensor, inplace: bool, backend: str | None,
) -> Tensor:  # fmt: skip
    _classification(op, logits, labels, iou, eta, eps, weight, reduction, avg_factor, scope_ids, num_scopes, grad_scale)
    if alpha is not None:
        validation.number(op, "alpha", alpha, high=1.0)
    validation.number(op, "gamma", gamma)
    validation.inplace(op, inplace, "logits", logits)
    process_group = resolve_process_group(op, process_group)
    impl = backends.choose(op, backend, logits.device, logits.dtype is torch.float64)
    check = None
    if validation.values_checked(labels):
        check = partial(_check_values, op, impl, labels, IGNORE, logits.shape[-1], scope_ids, num_scopes)
    return impl.sigmoid_focal_loss(
        logits,
        labels,
        iou,
        eta=eta,
        alpha=alpha,
        gamma=gamma,
        eps=eps,
        weight=weight,
        reduction=reduction,
        avg_factor=avg_factor,
        scope_ids=scope_ids,
        num_scopes=num_scopes,
        process_group=process_group,
        grad_scale=grad_scale,
        inplace=inplace,
        called=op,
        check=check,
    )


def iou_balanced_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    iou: Tensor,
    *,
    eta: float = 1.5,
    background_index: int | None = 0,
    eps: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    scope_ids: Tensor | None = None,
    num_scopes: int | None = None,
    process_group: Any = None,
    grad_scale: float | Tensor = 1.0,
    backend: str | None = None,
) -> Tensor:
    """IoU-balanced softmax cross entropy (Eq. 3 and 4).

    Args:
        logits: (..., K), any float dtype; the only argument with a gradient.
        labels: (...), int32 or int64: column in [0, K); negative values are ignored.
        iou: (...), read at positives only: labels other than background_index.
        background_index: the background's column, or None if no column is background (every counted row is a positive).
        avg_factor: divisor for "mean"; default max(number of rows that are not ignored, 1).
        eta, eps, weight, reduction, scope_ids, num_scopes, process_group, grad_scale, backend: as in
            ``iou_balanced_sigmoid_focal_loss``.

    Returns:
        0-d loss, or (...) with reduction "none"; float32, float64 for float64 logits.

    Raises:
        TypeError, ValueError, RuntimeError: as in ``iou_balanced_sigmoid_focal_loss``.
    """
    op = "iou_balanced_cross_entropy"
    _classification(op, logits, labels, iou, eta, eps, weight, reduction, avg_factor, scope_ids, num_scopes, grad_scale)
    num_classes = logits.shape[-1]
    if background_index is not None:
        validation.integer(op, "background_index", background_index, 0)
        if background_index >= num_classes:
            validation.fail_value(
                op, "background_index", f"be below the {num_classes} columns of logits", background_index
            )
    process_group = resolve_process_group(op, process_group)
    impl = backends.choose(op, backend, logits.device, logits.dtype is torch.float64)
    check = None
    if validation.values_checked(labels):
        check = partial(_check_values, op, impl, labels, None, num_classes, scope_ids, num_scopes)
    return impl.cross_entropy(
        logits,
        labels,
        iou,
        eta=eta,
        background_index=-1 if background_index is None else background_index,
        eps=eps,
        weight=weight,
        reduction=reduction,
        avg_factor=avg_factor,
        scope_ids=scope_ids,
        num_scopes=num_scopes,
        process_group=process_group,
        grad_scale=grad_scale,
        check=check,
    )


def iou_balanced_smooth_l1_loss(
    pred_deltas: Tensor,
    target_deltas: Tensor,
    iou: Tensor | None = None,
    *,
    lambda_: float = 1.5,
    beta: float = 1 / 9,
    w_loc: float = 1.0,
    normalize: bool = False,
    eps: float = 0.0,
    box_weights: Sequence[float] = UNIT_WEIGHTS,
    weight: Tensor | None = None,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    scope_ids: Tensor | None = None,
    num_scopes: int | None = None,
    process_group: Any = None,
    grad_scale: float | Tensor = 1.0,
    backend: str | None = None,
) -> Tensor:
    """IoU-balanced smooth L1 loss of the positives' box deltas (Eq. 5 with Eq. 6, or Eq. 7).

    Each row's loss, summed over its 4 coordinates, is multiplied by ``w_loc * iou**lambda_``, a constant for autograd.

    Args:
        pred_deltas: (P, 4), any float dtype; the only argument with a gradient.
        target_deltas: (P, 4), any float dtype.
        iou: (P,), clamped to [0, 1]; default: ``delta_iou`` of the two with box_weights.
        lambda_: exponent of the IoU, >= 0.
        beta: smooth L1's threshold, in deltas; 0 is L1.
        w_loc: constant factor (per detector and dataset; see ``calibrate_w_loc``).
        normalize: True multiplies by S / D as well (Eq. 7), S and D as in Eq. 4 with the rows' smooth L1 losses.
        box_weights: the box coder's four weights, for iou=None only.
        weight: (P,) or (P, 4), multiplies the plain loss before the sums.
        reduction: "mean" (sum over avg_factor), "sum" or "none" (P,).
        avg_factor: divisor for "mean"; default max(P, 1). The sum over coordinates is not divided by 4.
        eps, scope_ids (P,), num_scopes, process_group, grad_scale, backend: as in ``iou_balanced_sigmoid_focal_loss``.

    Returns:
        0-d loss, or (P,) with reduction "none"; float32, float64 for float64 pred_deltas.

    Raises:
        TypeError, ValueError, RuntimeError: as in ``iou_balanced_sigmoid_focal_loss``.
    """
    op = "iou_balanced_smooth_l1_loss"
    validation.tensor(op, "pred_deltas", pred_deltas, FLOAT_DTYPES)
    shape, device = pred_deltas.shape, pred_deltas.device
    if len(shape) != 2 or shape[1] != 4:
        validation.fail_value(op, "pred_deltas", "have shape (P, 4)", pred_deltas)
    rows = shape[:1]
    validation.like(op, "target_deltas", target_deltas, FLOAT_DTYPES, shape, device, "pred_deltas")
    if iou is not None:
        validation.like(op, "iou", iou, FLOAT_DTYPES, rows, device, "pred_deltas")
    if weight is not None:
        validation.tensor(op, "weight", weight, FLOAT_DTYPES)
        if weight.shape != rows and weight.shape != shape:
            validation.fail_value(
                op, "weight", f"have shape {tuple(rows)} or {tuple(shape)} to match pred_deltas", weight
            )
        validation.like(op, "weight", weight, FLOAT_DTYPES, weight.shape, device, "pred_deltas")
    if not validation.are_plain(lambda_, beta, w_loc, eps):
        validation.number(op, "lambda_", lambda_)
        validation.number(op, "beta", beta)
        validation.number(op, "w_loc", w_loc)
        validation.number(op, "eps", eps)
    validation.flag(op, "normalize", normalize)
    validation.four_weights(op, "box_weights", box_weights)
    validation.reduction(op, reduction, avg_factor, device)
    validation.scopes(op, scope_ids, num_scopes, rows, device, "pred_deltas")
    validation.grad_scale(op, grad_scale, device)
    process_group = resolve_process_group(op, process_group)
    impl = backends.choose(op, backend, device, pred_deltas.dtype is torch.float64)
    if scope_ids is not None and validation.values_checked(scope_ids):
        _check_scope_values(op, impl, scope_ids, num_scopes)
    return impl.smooth_l1_loss(
        pred_deltas,
        target_deltas,
        iou,
        lambda_=lambda_,
        beta=beta,
        w_loc=w_loc,
        normalize=normalize,
        eps=eps,
        box_weights=box_weights,
        weight=weight,
        reduction=reduction,
        avg_factor=avg_factor,
        scope_ids=scope_ids,
        num_scopes=num_scopes,
        process_group=process_group,
        grad_scale=grad_scale,
    )


def _classification(
    op: str, logits: Tensor, labels: Tensor, iou: Tensor, eta: float, eps: float, weight: Tensor | None, reduction: str,
    avg_factor: float | Tensor | None, scope_ids: Tensor | None, num_scopes: int | None, grad_scale: float | Tensor,
) -> None:  # fmt: skip
    """The checks that the sigmoid and softmax losses share."""
    validation.tensor(op, "logits", logits, FLOAT_DTYPES)
    shape, device = logits.shape, logits.device
    if len(shape) == 0 or shape[-1] == 0:
        validation.fail_value(op, "logits", "have shape (..., K) with K >= 1", logits)
    rows = shape[:-1]
    validation.like(op, "labels", labels, INDEX_DTYPES, rows, device, "logits without their last dimension")
    validation.like(op, "iou", iou, FLOAT_DTYPES, rows, device, "logits without their last dimension")
    if weight is not None:
        validation.like(op, "weight", weight, FLOAT_DTYPES, rows, device, "labels")
    if not validation.are_plain(eta, eps):
        validation.number(op, "eta", eta)
        validation.number(op, "eps", eps)
    validation.reduction(op, reduction, avg_factor, device)
    validation.scopes(op, scope_ids, num_scopes, rows, device, "labels")
    validation.grad_scale(op, grad_scale, device)


def _check_values(
    op: str, impl: Any, labels: Tensor, low: int | None, num_classes: int, scope_ids: Tensor | None,
    num_scopes: int | None,
) -> None:  # fmt: skip
    """Labels from `low` on are classes or marks; None: columns of a softmax, where every negative one is ignored."""
    expected = f"classes from 0 to {num_classes - 1}, -1 (background) or -2 (ignored)"
    if low is None:
        expected = f"columns from 0 to {num_classes - 1}, or negative (ignored)"
    validation.check_labels(op, "labels", impl, labels, low, num_classes, expected)
    _check_scope_values(op, impl, scope_ids, num_scopes)


def _check_scope_values(op: str, impl: Any, scope_ids: Tensor | None, num_scopes: int | None) -> None:
    if scope_ids is not None:
        expected = f"scopes from 0 to num_scopes - 1 = {num_scopes - 1}"
        validation.check_labels(op, "scope_ids", impl, scope_ids, 0, num_scopes, expected)


# ---------------------------------------------------------------------------------------------- boxes


def decode_boxes(
    deltas: Tensor,
    anchors: Tensor,
    *,
    weights: Sequence[float] = UNIT_WEIGHTS,
    box_coder: str = "delta",
    backend: str | None = None,
) -> Tensor:
    """Boxes ``x1 y1 x2 y2`` (..., 4) of deltas (..., 4) relative to anchors (..., 4). Differentiable in both.

    delta coder: centre ``cxa + wa * dx / wx``, width ``wa * exp(dw / ww)``; fovea coder: the four log-distances. The
    log-sizes (dw, dh; all four of the fovea coder) are clamped to +-log(1000/16) before exp. No clipping to an image.
    Deltas and anchors have the same shape and device, any float dtypes. Returns float32, float64 if either is float64.

    Raises TypeError, ValueError or RuntimeError as the losses do.
    """
    op = "decode_boxes"
    _box_pair(op, "deltas", deltas, "anchors", anchors)
    validation.four_weights(op, "weights", weights)
    validation.choice(op, "box_coder", box_coder, BOX_CODERS)
    impl = _box_backend(op, backend, deltas, anchors, constants=(anchors,))
    return impl.decode_boxes(deltas, anchors, weights=weights, box_coder=box_coder)


def encode_boxes(
    boxes: Tensor,
    anchors: Tensor,
    *,
    weights: Sequence[float] = UNIT_WEIGHTS,
    box_coder: str = "delta",
    backend: str | None = None,
) -> Tensor:
    """Deltas (..., 4) of boxes (..., 4) relative to anchors (..., 4): what ``decode_boxes`` inverts. Differentiable in
    both.

    The fovea coder clamps each distance over the anchor's size to 1/16..16. A box or an anchor without area gives
    infinite or NaN deltas. Same shape and device, any float dtypes. Returns float32, float64 if either is float64.

    Raises TypeError, ValueError or RuntimeError as the losses do.
    """
    op = "encode_boxes"
    _box_pair(op, "boxes", boxes, "anchors", anchors)
    validation.four_weights(op, "weights", weights)
    validation.choice(op, "box_coder", box_coder, BOX_CODERS)
    impl = _box_backend(op, backend, boxes, anchors, constants=(boxes, anchors))
    return impl.encode_boxes(boxes, anchors, weights=weights, box_coder=box_coder)


def paired_box_iou(boxes1: Tensor, boxes2: Tensor, *, backend: str | None = None) -> Tensor:
    """IoU (...) of aligned boxes (..., 4) and (..., 4), ``x1 y1 x2 y2``, any float dtypes. No gradient.

    An inverted box has no area; two boxes without area have IoU 0. Returns float32, float64 if either is float64.

    Raises TypeError, ValueError or RuntimeError as the losses do.
    """
    op = "paired_box_iou"
    _box_pair(op, "boxes1", boxes1, "boxes2", boxes2)
    return _box_backend(op, backend, boxes1, boxes2).paired_box_iou(boxes1, boxes2)


def delta_iou(
    pred_deltas: Tensor,
    target_deltas: Tensor,
    *,
    weights: Sequence[float] = UNIT_WEIGHTS,
    box_coder: str = "delta",
    backend: str | None = None,
) -> Tensor:
    """IoU (...) of the boxes that two sets of deltas (..., 4) decode to on any common anchor. No gradient.

    The anchor cancels out: decoding shifts and scales each axis, and IoU is invariant to both. Returns float32,
    float64 if either is float64.

    Raises TypeError, ValueError or RuntimeError as the losses do.
    """
    op = "delta_iou"
    _box_pair(op, "pred_deltas", pred_deltas, "target_deltas", target_deltas)
    validation.four_weights(op, "weights", weights)
    validation.choice(op, "box_coder", box_coder, BOX_CODERS)
    impl = _box_backend(op, backend, pred_deltas, target_deltas)
    return impl.delta_iou(pred_deltas, target_deltas, weights=weights, box_coder=box_coder)


def _box_pair(op: str, name1: str, boxes1: Tensor, name2: str, boxes2: Tensor) -> None:
    validation.tensor(op, name1, boxes1, FLOAT_DTYPES)
    if boxes1.ndim == 0 or boxes1.shape[-1] != 4:
        validation.fail_value(op, name1, "have shape (..., 4)", boxes1)
    validation.like(op, name2, boxes2, FLOAT_DTYPES, boxes1.shape, boxes1.device, name1)


def _box_backend(op: str, backend: str | None, first: Tensor, second: Tensor, constants: Sequence[Tensor] = ()) -> Any:
    """The backend for a box function. A fast one knows no gradient in `constants`: those go through the plain
    formulas.
    """
    float64 = boxes.result_dtype(first, second) is torch.float64
    impl = backends.choose(op, backend, first.device, float64)
    if constants and torch.is_grad_enabled() and any(t.requires_grad for t in constants):
        return _reference
    if constants and torch.autograd.forward_ad._current_level >= 0:  # tangents may be on either
        return _reference
    return impl
