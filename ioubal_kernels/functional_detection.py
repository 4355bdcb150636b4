"""The public fused loss: checks of its many shapes, then one call to the backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, validation
from .boxes import BOX_CODERS, UNIT_WEIGHTS
from .distributed import resolve_process_group
from .validation import FLOAT_DTYPES, INDEX_DTYPES, fail_type, fail_value

NORMALIZER_SCOPES = ("batch", "level", "image")
_OP = "iou_balanced_detection_loss"


class DetectionLoss(NamedTuple):
    """Result of ``iou_balanced_detection_loss``; every field is 0-d."""

    classification: Tensor  # differentiable in the logits
    localization: Tensor  # differentiable in the deltas
    num_positives: Tensor  # int64, anchors with matched_idxs >= 0; over the process group if one is given
    mean_iou: Tensor  # float32, mean IoU of the positives' decoded boxes with their gt; 0 without positives


def iou_balanced_detection_loss(
    cls_logits: Tensor | Sequence[Tensor],
    bbox_deltas: Tensor | Sequence[Tensor],
    anchors: Tensor,
    matched_idxs: Tensor,
    gt_boxes: Tensor | Sequence[Tensor],
    gt_labels: Tensor | Sequence[Tensor],
    *,
    eta: float = 1.5,
    lambda_: float = 1.5,
    w_loc: float = 1.0,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    beta: float = 1 / 9,
    box_coder: str = "delta",
    box_weights: Sequence[float] = UNIT_WEIGHTS,
    normalize_loc: bool = False,
    normalizer_scope: str = "batch",
    anchors_per_level: Sequence[int] | None = None,
    eps: float = 0.0,
    cls_weight: float = 1.0,
    avg_factor: float | Tensor | tuple[Any, Any] | None = None,
    process_group: Any = None,
    grad_scale: float | Tensor = 1.0,
    inplace: bool = False,
    backend: str | None = None,
) -> DetectionLoss:
    """Both IoU-balanced losses of a dense detector's training step (Eq. 3 to 7) in one call, from the heads' raw
    outputs.

    N images, R anchors per image, K classes, L levels, A anchors per location, G gt boxes of an image.

    Args:
        cls_logits: (N, R, K), or a list over levels of (N, A*K, H, W), contiguous or channels_last; channel a*K + k.
            Any float dtype.
        bbox_deltas: (N, R, 4), or a list over levels of (N, A*4, H, W); channel a*4 + j. Flat if and only if
            cls_logits is.
        anchors: (R, 4) or (N, R, 4) ``x1 y1 x2 y2``, in the order level, h, w, a. Any float dtype. With box_coder
            "fovea" boxes of the cell's centre and the level's base size.
        matched_idxs: (N, R), int32 or int64: index of a gt box of that image, -1 background, -2 ignored.
        gt_boxes: list of N tensors (G_i, 4), G_i may be 0; or padded (N, G, 4).
        gt_labels: list of N tensors (G_i,), int32 or int64, classes in [0, K); or padded (N, G) with -1 where there is
            no box.
        eta, lambda_: exponents of the IoU in the classification and the localisation weight, >= 0.
        w_loc: constant factor of the localisation loss.
        alpha, gamma: the focal loss's; alpha=None for no class balance.
        beta: smooth L1's threshold, in deltas; 0 is L1.
        box_coder: "delta" (R-CNN's dx dy dw dh) or "fovea" (log-distances left, top, right, bottom).
        box_weights: the coder's four weights.
        normalize_loc: True for Eq. 7's normalised localisation weight, which w_loc multiplies as well.
        normalizer_scope: what the sums of Eq. 4 and 7 run over: "batch", "level" or "image".
        anchors_per_level: L ints summing to R; needed for scope "level" with flat inputs.
        eps: added to the normalisers' denominators.
        cls_weight: constant factor of the classification loss.
        avg_factor: divisor of both losses: positive number, 0-d tensor, tensor (N,) with one divisor per image, or a
            pair (classification, localisation) of these; default max(number of positives in the batch, 1).
        process_group, grad_scale, inplace, backend: as in ``iou_balanced_sigmoid_focal_loss``.

    A positive whose anchor or gt box has width or height <= 0 counts as a positive with IoU 0 and has no localisation
    loss.

    Returns:
        DetectionLoss(classification, localization, num_positives, mean_iou). The losses are float32, float64 if the
        logits or the deltas are; neither loss has a gradient in the other's input.

    Raises:
        TypeError, ValueError: for any argument that is not as above, before anything is computed.
        RuntimeError: for a named backend that is absent here.
    """
    logits, deltas, level_sizes, num_classes = _heads(cls_logits, bbox_deltas)
    first = logits[0]
    device, images, anchors_per_image = first.device, first.shape[0], sum(level_sizes)
    _targets(anchors, matched_idxs, gt_boxes, gt_labels, images, anchors_per_image, device)
    if not validation.are_plain(eta, lambda_, w_loc, gamma, beta, eps, cls_weight):
        validation.number(_OP, "eta", eta)
        validation.number(_OP, "lambda_", lambda_)
        validation.number(_OP, "w_loc", w_loc)
        validation.number(_OP, "gamma", gamma)
        validation.number(_OP, "beta", beta)
        validation.number(_OP, "eps", eps)
        validation.number(_OP, "cls_weight", cls_weight)
    # What has its default needs no further look: calls take a tenth of a small loss's time.
    if alpha is not None and (type(alpha) is not float or not 0.0 <= alpha <= 1.0):
        validation.number(_OP, "alpha", alpha, high=1.0)
    if type(box_coder) is not str or box_coder != "delta":
        validation.choice(_OP, "box_coder", box_coder, BOX_CODERS)
    validation.four_weights(_OP, "box_weights", box_weights)
    if normalize_loc is not False:
        validation.flag(_OP, "normalize_loc", normalize_loc)
    if type(normalizer_scope) is not str or normalizer_scope != "batch" or anchors_per_level is not None:
        validation.choice(_OP, "normalizer_scope", normalizer_scope, NORMALIZER_SCOPES)
        level_sizes = _level_sizes(anchors_per_level, level_sizes, first.ndim == 3, normalizer_scope, anchors_per_image)
    avg_factor = (None, None) if avg_factor is None else _avg_factors(avg_factor, device, images)
    if type(grad_scale) is not float or grad_scale != 1.0:
        validation.grad_scale(_OP, grad_scale, device)
    if inplace is not False:
        for level in logits:
            validation.inplace(_OP, inplace, "cls_logits", level)
    if process_group is not None:
        process_group = resolve_process_group(_OP, process_group)
    float64 = first.dtype is torch.float64 or deltas[0].dtype is torch.float64
    impl = backends.choose(_OP, backend, device, float64)
    check = None
    if validation.values_checked(matched_idxs):
        check = partial(validation.check_matched_idxs, _OP, impl, matched_idxs, gt_labels, num_classes)
    return DetectionLoss(
        *impl.detection_loss(
            logits,
            deltas,
            anchors,
            matched_idxs,
            gt_boxes,
            gt_labels,
            eta=eta,
            lambda_=lambda_,
            w_loc=w_loc,
            alpha=alpha,
            gamma=gamma,
            beta=beta,
            box_coder=box_coder,
            box_weights=box_weights,
            normalize_loc=normalize_loc,
            normalizer_scope=normalizer_scope,
            level_sizes=level_sizes,
            eps=eps,
            cls_weight=cls_weight,
            avg_factor=avg_factor,
            process_group=process_group,
            grad_scale=grad_scale,
            inplace=inplace,
            check=check,
        )
    )


def _heads(cls_logits: Any, bbox_deltas: Any) -> tuple[Sequence[Tensor], Sequence[Tensor], list[int], int]:
    """Both heads' outputs as lists, the anchors of each level, and K."""
    flat = isinstance(cls_logits, Tensor)
    if not flat and not isinstance(cls_logits, (list, tuple)):
        fail_type(_OP, "cls_logits", "be a tensor (N, R, K) or a list of level maps (N, A*K, H, W)", cls_logits)
    if flat != isinstance(bbox_deltas, Tensor) or (not flat and not isinstance(bbox_deltas, (list, tuple))):
        want = (
            "be a tensor (N, R, 4) because cls_logits is a tensor" if flat else "be a list because cls_logits is a list"
        )
        fail_type(_OP, "bbox_deltas", want, bbox_deltas)
    if flat:
        return [cls_logits], [bbox_deltas], *_flat_heads(cls_logits, bbox_deltas)
    if not cls_logits:
        fail_value(_OP, "cls_logits", "have at least one level", cls_logits)
    if len(bbox_deltas) != len(cls_logits):
        fail_value(_OP, "bbox_deltas", f"have {len(cls_logits)} levels like cls_logits", bbox_deltas)
    return cls_logits, bbox_deltas, *_level_heads(cls_logits, bbox_deltas)


def _flat_heads(logits: Tensor, deltas: Tensor) -> tuple[list[int], int]:
    validation.tensor(_OP, "cls_logits", logits, FLOAT_DTYPES)
    if logits.ndim != 3 or logits.shape[2] == 0:
        fail_value(_OP, "cls_logits", "have shape (N, R, K) with K >= 1", logits)
    images, rows, num_classes = logits.shape
    validation.like(_OP, "bbox_deltas", deltas, FLOAT_DTYPES, (images, rows, 4), logits.device, "cls_logits")
    return [rows], num_classes


def _level_heads(logits: Sequence[Tensor], deltas: Sequence[Tensor]) -> tuple[list[int], int]:
    level_sizes = []
    num_classes = None
    for i in range(len(logits)):
        scores, offsets = logits[i], deltas[i]
        validation.tensor(_OP, f"cls_logits[{i}]", scores, FLOAT_DTYPES)
        validation.tensor(_OP, f"bbox_deltas[{i}]", offsets, FLOAT_DTYPES)
        if scores.ndim != 4:
            fail_value(_OP, f"cls_logits[{i}]", "have shape (N, A*K, H, W)", scores)
        if offsets.ndim != 4 or offsets.shape[1] == 0 or offsets.shape[1] % 4:
            fail_value(_OP, f"bbox_deltas[{i}]", "have shape (N, A*4, H, W) with A >= 1", offsets)
        images, channels, height, width = scores.shape
        if (offsets.shape[0], offsets.shape[2], offsets.shape[3]) != (images, height, width):
            expected = f"have shape ({images}, A*4, {height}, {width}) to match cls_logits[{i}]"
            fail_value(_OP, f"bbox_deltas[{i}]", expected, offsets)
        per_location = offsets.shape[1] // 4
        if channels == 0 or channels % per_location:
            expected = f"have A*K channels with A = {per_location} from bbox_deltas[{i}] and K >= 1"
            fail_value(_OP, f"cls_logits[{i}]", expected, scores)
        if num_classes is None:
            num_classes = channels // per_location
        elif channels != num_classes * per_location:
            expected = f"have A*K = {per_location * num_classes} channels (K = {num_classes} by cls_logits[0])"
            fail_value(_OP, f"cls_logits[{i}]", expected, scores)
        for argument, tensor, like in (("cls_logits", scores, logits[0]), ("bbox_deltas", offsets, deltas[0])):
            if tensor.dtype != like.dtype:
                fail_type(_OP, f"{argument}[{i}]", f"have dtype {like.dtype} like {argument}[0]", tensor)
            if tensor.device != logits[0].device:
                fail_value(_OP, f"{argument}[{i}]", f"be on {logits[0].device} like cls_logits[0]", tensor)
        if images != logits[0].shape[0]:
            fail_value(_OP, f"cls_logits[{i}]", f"have {logits[0].shape[0]} images like cls_logits[0]", scores)
        level_sizes.append(height * width * per_location)
    return level_sizes, num_classes


def _targets(
    anchors: Any, matched_idxs: Any, gt_boxes: Any, gt_labels: Any, images: int, rows: int, device: torch.device
) -> None:
    if not validation.is_like(anchors, FLOAT_DTYPES, (rows, 4), device):
        validation.tensor(_OP, "anchors", anchors, FLOAT_DTYPES)
        if anchors.shape != (rows, 4) and anchors.shape != (images, rows, 4):
            fail_value(_OP, "anchors", f"have shape ({rows}, 4) or ({images}, {rows}, 4) to match cls_logits", anchors)
        if anchors.device != device:
            fail_value(_OP, "anchors", f"be on {device} like cls_logits", anchors)
    validation.like(_OP, "matched_idxs", matched_idxs, INDEX_DTYPES, (images, rows), device, "cls_logits")
    if isinstance(gt_boxes, Tensor):
        validation.tensor(_OP, "gt_boxes", gt_boxes, FLOAT_DTYPES)
        if gt_boxes.ndim != 3 or gt_boxes.shape[0] != images or gt_boxes.shape[2] != 4:
            fail_value(
                _OP, "gt_boxes", f"have shape ({images}, G, 4), or be a list of {images} tensors (G_i, 4)", gt_boxes
            )
        validation.like(_OP, "gt_boxes", gt_boxes, FLOAT_DTYPES, gt_boxes.shape, device, "cls_logits")
        if not isinstance(gt_labels, Tensor):
            fail_type(_OP, "gt_labels", "be a padded tensor (N, G) because gt_boxes is one", gt_labels)
        validation.like(_OP, "gt_labels", gt_labels, INDEX_DTYPES, gt_boxes.shape[:2], device, "gt_boxes")
        return
    if not isinstance(gt_boxes, (list, tuple)):
        fail_type(_OP, "gt_boxes", "be a list of tensors (G_i, 4) or a padded tensor (N, G, 4)", gt_boxes)
    if not isinstance(gt_labels, (list, tuple)):
        fail_type(_OP, "gt_labels", "be a list because gt_boxes is a list", gt_labels)
    for argument, value in (("gt_boxes", gt_boxes), ("gt_labels", gt_labels)):
        if len(value) != images:
            fail_value(_OP, argument, f"have one tensor for each of the {images} images", value)
    first_box, first_label = (gt_boxes[0], gt_labels[0]) if images else (None, None)
    for i in range(images):
        boxes, labels = gt_boxes[i], gt_labels[i]
        if (  # the names of the arguments are put together for errors only
            validation.is_like(boxes, FLOAT_DTYPES, None, device)
            and boxes.ndim == 2
            and boxes.shape[1] == 4
            and validation.is_like(labels, INDEX_DTYPES, boxes.shape[:1], device)
            and boxes.dtype is first_box.dtype
            and labels.dtype is first_label.dtype
        ):
            continue
        validation.tensor(_OP, f"gt_boxes[{i}]", boxes, FLOAT_DTYPES)
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            fail_value(_OP, f"gt_boxes[{i}]", "have shape (G_i, 4)", boxes)
        validation.like(_OP, f"gt_boxes[{i}]", boxes, FLOAT_DTYPES, boxes.shape, device, "cls_logits")
        validation.like(_OP, f"gt_labels[{i}]", labels, INDEX_DTYPES, boxes.shape[:1], device, f"gt_boxes[{i}]")
        if boxes.dtype != gt_boxes[0].dtype:
            fail_type(_OP, f"gt_boxes[{i}]", f"have dtype {gt_boxes[0].dtype} like gt_boxes[0]", boxes)
        if labels.dtype != gt_labels[0].dtype:
            fail_type(_OP, f"gt_labels[{i}]", f"have dtype {gt_labels[0].dtype} like gt_labels[0]", labels)


def _level_sizes(given: Any, own: list[int], flat: bool, scope: str, anchors_per_image: int) -> list[int]:
    """Anchors of each level: the maps' own, or anchors_per_level for flat inputs."""
    if given is None:
        if flat and scope == "level":
            fail_value(_OP, "anchors_per_level", "be given for normalizer_scope='level' with flat cls_logits", None)
        return own
    if not isinstance(given, (list, tuple)):
        fail_type(_OP, "anchors_per_level", "be a list of ints", given)
    for i, size in enumerate(given):
        validation.integer(_OP, f"anchors_per_level[{i}]", size, 0)
    if sum(given) != anchors_per_image or not given:
        raise ValueError(
            f"{_OP}: anchors_per_level must sum to the {anchors_per_image} anchors of cls_logits, got {list(given)}"
            f" with sum {sum(given)}"
        )
    if not flat and list(given) != own:
        raise ValueError(f"{_OP}: anchors_per_level must equal the level maps' {own}, got {list(given)}")
    return list(given)


def _avg_factors(avg_factor: Any, device: torch.device, images: int) -> tuple[Any, Any]:
    """The pair (classification, localisation) of divisors."""
    if not isinstance(avg_factor, (tuple, list)):
        validation.divisor(_OP, "avg_factor", avg_factor, device, images)
        return avg_factor, avg_factor
    if len(avg_factor) != 2:
        fail_value(_OP, "avg_factor", "be one divisor or a pair (classification, localisation)", avg_factor)
    for i, part in enumerate(avg_factor):
        validation.divisor(_OP, f"avg_factor[{i}]", part, device, images)
    return avg_factor[0], avg_factor[1]
