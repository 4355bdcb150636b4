"""The oracle and the fallback: every loss in plain PyTorch. Its formulas, in ``reference_terms``, are Python's only
copy.

Arguments are validated by ``functional``. Half precision is computed in float32, float64 in float64; autograd
differentiates, so double backward and forward-mode AD work. Nothing here synchronises with the host or depends on
values in its control flow, so the functions trace under ``torch.compile(fullgraph=True)``. ``grad_scale`` and
``inplace`` only matter to the fused backends and change nothing here. ``check``, if given, raises for a label or index
out of range: a backend calls it before it computes anything, unless it knows by itself that there is none.

Values outside their range never read out of bounds: the row they are in becomes NaN, and with it the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import boxes, distributed
from .boxes import IGNORE
from .reference_matching import match_anchors as match_anchors
from .reference_matching import match_fovea as match_fovea
from .reference_terms import (
    Scope,
    accumulator,
    focal_term,
    iou_power,
    mean,
    normalized_power,
    normalizer_parts,
    row_scope,
    scaled,
    smooth_l1_term,
    softmax_term,
)

# ---------------------------------------------------------------------------------------------- flat losses


class _Sigmoid(NamedTuple):
    """What one pass over sigmoid logits (M, K) gives before the normaliser is known."""

    plain: Tensor  # (M, K) losses
    onehot: Tensor  # (M, K) bool, the positive entries
    positive: Tensor  # (M,) bool
    positive_loss: Tensor  # (M,) loss of the positive entry, 0 without one
    power: Tensor  # (M,) iou^eta at positives, else 0

    def weighted(self, factor: Tensor) -> Tensor:
        """Eq. 3: the positive entries times their factor (M,), the negatives as they are."""
        return torch.where(self.onehot, scaled(self.positive_loss, factor)[:, None], self.plain)


def _sigmoid_parts(
    logits: Tensor,
    labels: Tensor,
    iou: Tensor,
    weight: Tensor | None,
    bad_rows: Tensor | None,
    *,
    eta: float,
    alpha: float | None,
    gamma: float,
    dtype: torch.dtype,
) -> _Sigmoid:
    num_classes = logits.shape[1]
    bad = (labels < IGNORE) | (labels >= num_classes)
    positive = (labels >= 0) & ~bad
    if bad_rows is not None:
        bad = bad | bad_rows
    counted = labels != IGNORE
    # Ignored rows are replaced before anything is computed, so that a NaN there reaches neither the loss nor the
    # gradient.
    x = torch.where(counted[:, None], logits, 0.0).to(dtype)
    onehot = labels[:, None] == torch.arange(num_classes, device=labels.device, dtype=labels.dtype)
    plain = focal_term(torch.where(onehot, -x, x), gamma)
    if alpha is not None:
        plain = plain * torch.where(onehot, plain.new_full((), alpha), plain.new_full((), 1.0 - alpha))
    row = torch.ones((), dtype=dtype, device=logits.device) if weight is None else weight.detach().to(dtype)
    row = torch.where(bad, float("nan"), torch.where(counted, row, 0.0))
    plain = plain * row[:, None]
    positive_loss = torch.where(onehot, plain, 0.0).sum(1)
    return _Sigmoid(plain, onehot, positive, positive_loss, iou_power(iou, positive, eta, dtype))


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
    called: str = "",
    check: Callable[[], None] | None = None,
) -> Tensor:
    """Eq. 3 and 4 with the focal loss (gamma 0 and alpha None: binary cross entropy). Logits (..., K), the rest
    (...).
    """
    del grad_scale, inplace, called
    if check is not None:
        check()
    dtype = boxes.result_dtype(logits)
    num_classes = logits.shape[-1]
    rows = labels.numel()
    scope, bad_scope = row_scope(scope_ids, num_scopes)
    parts = _sigmoid_parts(
        logits.reshape(rows, num_classes),
        labels.reshape(rows),
        iou.reshape(rows),
        None if weight is None else weight.reshape(rows),
        bad_scope,
        eta=eta,
        alpha=alpha,
        gamma=gamma,
        dtype=dtype,
    )
    sums = normalizer_parts(parts.positive_loss, parts.power, scope)
    count = (labels >= 0).sum().to(sums[0].dtype)
    plain, weighted, count = distributed.all_reduce_sums([*sums, count], process_group)
    factor = normalized_power(parts.power, plain, weighted, scope, eps)
    loss = parts.weighted(factor)
    if reduction == "none":
        return loss.reshape(logits.shape)
    total = loss.sum()
    return total if reduction == "sum" else mean(total, avg_factor, count, process_group)


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
) -> Tensor:
    """Eq. 3 and 4 with softmax cross entropy. Logits (..., K); labels (...) are columns, negative ones are ignored."""
    del grad_scale
    if check is not None:
        check()
    dtype = boxes.result_dtype(logits)
    num_classes = logits.shape[-1]
    rows = labels.numel()
    scope, bad_scope = row_scope(scope_ids, num_scopes)
    columns = labels.reshape(rows)
    counted = columns >= 0
    bad = columns >= num_classes
    positive = counted & ~bad & (columns != background_index)
    if bad_scope is not None:
        bad = bad | bad_scope
    x = torch.where(counted[:, None], logits.reshape(rows, num_classes), 0.0).to(dtype)
    plain = softmax_term(x, columns.clamp(0, num_classes - 1).to(torch.int64))
    row = torch.ones((), dtype=dtype, device=x.device) if weight is None else weight.detach().reshape(rows).to(dtype)
    plain = plain * torch.where(bad, float("nan"), torch.where(counted, row, 0.0))

    power = iou_power(iou.reshape(rows), positive, eta, dtype)
    sums = normalizer_parts(torch.where(positive, plain, 0.0), power, scope)
    count = counted.sum().to(sums[0].dtype)
    plain_sum, weighted_sum, count = distributed.all_reduce_sums([*sums, count], process_group)
    factor = normalized_power(power, plain_sum, weighted_sum, scope, eps)
    loss = torch.where(positive, scaled(plain, factor), plain)
    if reduction == "none":
        return loss.reshape(labels.shape)
    total = loss.sum()
    return total if reduction == "sum" else mean(total, avg_factor, count, process_group)


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
) -> Tensor:
    """Eq. 5 with the weight of Eq. 6, or of Eq. 7 times w_loc. Deltas (P, 4), iou (P,); every row is a positive."""
    del grad_scale
    dtype = boxes.result_dtype(pred_deltas)
    scope, bad_scope = row_scope(scope_ids, num_scopes)
    if iou is None:
        iou = boxes.delta_iou(pred_deltas, target_deltas, box_weights)
    elements = smooth_l1_term(pred_deltas.to(dtype) - target_deltas.detach().to(dtype), beta)
    if weight is not None:
        weight = weight.detach().to(dtype)
        elements = elements * (weight if weight.ndim == 2 else weight[:, None])
    plain = elements.sum(1)
    if bad_scope is not None:
        plain = plain * torch.where(bad_scope, float("nan"), 1.0).to(dtype)
    power = iou_power(iou, torch.ones_like(iou, dtype=torch.bool), lambda_, dtype)

    acc = accumulator(dtype, plain.device)
    count = torch.full((), plain.shape[0], dtype=acc, device=plain.device)
    if normalize:
        sums = normalizer_parts(plain, power, scope)
        plain_sum, weighted_sum, count = distributed.all_reduce_sums([*sums, count], process_group)
        power = normalized_power(power, plain_sum, weighted_sum, scope, eps)
    else:
        (count,) = distributed.all_reduce_sums([count], process_group)
    loss = scaled(plain, w_loc * power)
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else mean(total, avg_factor, count, process_group)


# ---------------------------------------------------------------------------------------------- the fused loss


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Classification and localisation loss of a dense detector, num_positives (int64) and mean_iou (float32), all 0-d.

    A list of one 3-d tensor is flat: logits (N, R, K), deltas (N, R, 4). Else level maps (N, A*K, H, W) and (N, A*4,
    H, W).
    """
    del grad_scale, inplace
    if check is not None:
        check()
    dtype = boxes.result_dtype(*cls_logits, *bbox_deltas)
    logits, deltas = _flatten_levels(cls_logits, bbox_deltas)
    images, anchors_per_image, num_classes = logits.shape
    rows = images * anchors_per_image

    match = _match_targets(matched_idxs, anchors, gt_boxes, gt_labels, num_classes, dtype)
    valid = match.localised[..., None]
    unit = (torch.arange(4, device=deltas.device) >= 2).to(dtype)  # the box 0 0 1 1 stands in where there is no target
    target = boxes.encode(
        torch.where(valid, match.boxes, unit), torch.where(valid, match.anchors, unit), box_weights, box_coder
    )
    pred = torch.where(valid, deltas, 0.0).to(dtype)
    iou = boxes.delta_iou(pred, target, box_weights, box_coder)
    iou = torch.where(match.localised, iou, 0.0).reshape(rows)
    bad = match.bad.reshape(rows)

    scope = _detection_scope(normalizer_scope, images, level_sizes, logits.device)
    parts = _sigmoid_parts(
        logits.reshape(rows, num_classes),
        match.labels.reshape(rows),
        iou,
        None,
        bad,
        eta=eta,
        alpha=alpha,
        gamma=gamma,
        dtype=dtype,
    )
    loc = torch.where(valid, smooth_l1_term(pred - target, beta), 0.0).reshape(rows, 4).sum(1)
    loc = loc * torch.where(bad, float("nan"), 1.0).to(dtype)
    power = iou_power(iou, match.localised.reshape(rows), lambda_, dtype)

    acc = accumulator(dtype, logits.device)
    sums = list(normalizer_parts(parts.positive_loss, parts.power, scope))
    if normalize_loc:
        sums += normalizer_parts(torch.where(match.localised.reshape(rows), loc, 0.0), power, scope)
    totals = [(matched_idxs >= 0).sum().to(acc), iou.to(acc).sum()]
    if normalizer_scope == "image":  # an image's sums are complete on its own process
        totals = distributed.all_reduce_sums(totals, process_group)
    else:
        sums = distributed.all_reduce_sums([*sums, *totals], process_group)
        sums, totals = sums[:-2], sums[-2:]
    positives, iou_sum = totals

    classification = parts.weighted(normalized_power(parts.power, sums[0], sums[1], scope, eps))
    if normalize_loc:
        power = normalized_power(power, sums[2], sums[3], scope, eps)
    localization = scaled(loc, w_loc * power)

    cls_avg, loc_avg = avg_factor
    classification = (
        _batch_mean(classification.reshape(images, anchors_per_image * num_classes), cls_avg, positives, process_group)
        * cls_weight
    )
    localization = _batch_mean(localization.reshape(images, anchors_per_image), loc_avg, positives, process_group)
    mean_iou = (iou_sum / positives.clamp(min=1)).to(torch.float32)
    return classification, localization, positives.to(torch.int64), mean_iou


class _Match(NamedTuple):
    labels: Tensor  # (N, R) class, BACKGROUND or IGNORE
    boxes: Tensor  # (N, R, 4) matched gt box
    anchors: Tensor  # (N, R, 4)
    localised: Tensor  # (N, R) bool: positives whose anchor and gt box have an area
    bad: Tensor  # (N, R) bool: an index or a label outside its range


def _match_targets(
    matched_idxs: Tensor,
    anchors: Tensor,
    gt_boxes: Tensor | Sequence[Tensor],
    gt_labels: Tensor | Sequence[Tensor],
    num_classes: int,
    dtype: torch.dtype,
) -> _Match:
    images, anchors_per_image = matched_idxs.shape
    gt_boxes, gt_labels = _padded_gt(gt_boxes, gt_labels, images, matched_idxs.device)
    last = gt_labels.shape[1] - 1  # always padding, so an index beyond the boxes finds no label
    index = matched_idxs.clamp(0, last).to(torch.int64)
    label = gt_labels.gather(1, index)
    box = gt_boxes.to(dtype).gather(1, index[..., None].expand(-1, -1, 4))
    anchors = anchors.detach().to(dtype).expand(images, anchors_per_image, 4)
    matched = matched_idxs >= 0
    bad = (matched_idxs < IGNORE) | (matched & ((label < 0) | (label >= num_classes)))
    positive = matched & ~bad
    sentinel = matched_idxs.clamp(IGNORE, 0).to(torch.int64)
    labels = torch.where(positive, label, torch.where(bad, boxes.BACKGROUND, sentinel))
    return _Match(labels, box, anchors, positive & ~_without_area(box) & ~_without_area(anchors), bad)


def _without_area(box: Tensor) -> Tensor:
    """Width or height <= 0. A NaN coordinate is not: it must reach the loss."""
    x1, y1, x2, y2 = box.unbind(-1)
    return (x2 <= x1) | (y2 <= y1)


def _padded_gt(
    gt_boxes: Tensor | Sequence[Tensor], gt_labels: Tensor | Sequence[Tensor], images: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Boxes (N, G + 1, 4) and int64 labels (N, G + 1), -1 at padding; the last column is padding in every image."""
    if isinstance(gt_boxes, Tensor):
        return F.pad(gt_boxes.detach(), (0, 0, 0, 1)), F.pad(gt_labels.to(torch.int64), (0, 1), value=-1)
    if images == 0:
        return torch.zeros((0, 1, 4), device=device), torch.zeros((0, 1), dtype=torch.int64, device=device)
    longest = max(b.shape[0] for b in gt_boxes) + 1
    padded = [F.pad(b.detach(), (0, 0, 0, longest - b.shape[0])) for b in gt_boxes]
    labels = [F.pad(t.to(torch.int64), (0, longest - t.shape[0]), value=-1) for t in gt_labels]
    return torch.stack(padded), torch.stack(labels)


def _flatten_levels(cls_logits: Sequence[Tensor], bbox_deltas: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (N, R, K) and deltas (N, R, 4) in anchor order level, h, w, a."""
    if cls_logits[0].ndim == 3:
        return cls_logits[0], bbox_deltas[0]
    logits, deltas = [], []
    for scores, offsets in zip(cls_logits, bbox_deltas, strict=True):
        per_location = offsets.shape[1] // 4
        logits.append(_flatten_level(scores, per_location))
        deltas.append(_flatten_level(offsets, per_location))
    return torch.cat(logits, 1), torch.cat(deltas, 1)


def _flatten_level(level: Tensor, per_location: int) -> Tensor:
    images, channels, height, width = level.shape
    split = level.reshape(images, per_location, channels // per_location, height, width)
    return split.permute(0, 3, 4, 1, 2).reshape(images, height * width * per_location, channels // per_location)


def _detection_scope(name: str, images: int, level_sizes: Sequence[int], device: torch.device) -> Scope:
    anchors_per_image = sum(level_sizes)
    if name == "batch":
        return Scope(None, 1)
    if name == "image":
        ids = torch.arange(images, device=device)[:, None].expand(images, anchors_per_image)
        return Scope(ids.reshape(-1), images)
    ids = torch.cat([torch.full((size,), level, device=device) for level, size in enumerate(level_sizes)])
    return Scope(ids.expand(images, anchors_per_image).reshape(-1), len(level_sizes))


def _batch_mean(per_image: Tensor, avg_factor: float | Tensor | None, positives: Tensor, group: Any) -> Tensor:
    """Sum over everything of per-image terms (N, X), over avg_factor; a divisor (N,) divides image by image."""
    if isinstance(avg_factor, Tensor) and avg_factor.ndim == 1:
        return (per_image.sum(1) / avg_factor.detach().to(per_image.dtype)).sum()
    return mean(per_image.sum(), avg_factor, positives, group)


# ---------------------------------------------------------------------------------------------- boxes and value checks


def decode_boxes(deltas: Tensor, anchors: Tensor, *, weights: Sequence[float], box_coder: str = "delta") -> Tensor:
    """Boxes (..., 4); see boxes.decode."""
    return boxes.decode(deltas, anchors, weights, box_coder)


def encode_boxes(boxes_: Tensor, anchors: Tensor, *, weights: Sequence[float], box_coder: str = "delta") -> Tensor:
    """Deltas (..., 4); see boxes.encode."""
    return boxes.encode(boxes_, anchors, weights, box_coder)


def paired_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU (...) of aligned boxes; see boxes.paired_box_iou."""
    return boxes.paired_box_iou(boxes1, boxes2)


def delta_iou(pred_deltas: Tensor, target_deltas: Tensor, *, weights: Sequence[float], box_coder: str) -> Tensor:
    """IoU (...) of the boxes two sets of deltas stand for; see boxes.delta_iou."""
    return boxes.delta_iou(pred_deltas, target_deltas, weights, box_coder)


def check_labels(labels: Tensor, num_classes: int, min_label: int) -> int:
    """Flat index of the first label outside [min_label, num_classes), or -1. Reads the values: synchronises with the
    host.
    """
    return _first((labels < min_label) | (labels >= num_classes))


def check_matched_idxs(matched_idxs: Tensor, gt_labels: Tensor | Sequence[Tensor], num_classes: int) -> int:
    """Flat index of the first matched index that is < -2, names no box of its image, or a box whose label is outside
    [0, num_classes); or -1. Reads the values: synchronises with the host."""
    if isinstance(gt_labels, Tensor):
        labels = F.pad(gt_labels.to(torch.int64), (0, 1), value=-1)
    else:
        longest = max((t.shape[0] for t in gt_labels), default=0) + 1
        labels = [F.pad(t.to(torch.int64), (0, longest - t.shape[0]), value=-1) for t in gt_labels]
        labels = torch.stack(labels) if labels else matched_idxs.new_zeros((0, 1), dtype=torch.int64)
    label = labels.gather(1, matched_idxs.clamp(0, labels.shape[1] - 1).to(torch.int64))
    return _first((matched_idxs < IGNORE) | ((matched_idxs >= 0) & ((label < 0) | (label >= num_classes))))


def _first(bad: Tensor) -> int:
    hits = bad.reshape(-1).nonzero()
    return int(hits[0]) if hits.numel() else -1
