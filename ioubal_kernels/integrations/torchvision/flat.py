"""The two losses of sampled anchors or RoIs: what SSD, the box head and the RPN share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import ioubal_kernels as ik

from ...distributed import all_reduce_sums, world_size
from .observing import record_flat, remember
from .settings import Settings


class Sample(NamedTuple):
    """Sampled anchors or RoIs, M rows of which P are positive.

    logits: (M, C) of a softmax with background 0, or (M, 1) of a sigmoid.
    labels: (M,) int64, in the terms of the loss; negative values as the loss has them.
    rows: (P,) int64, the positive rows.
    pred_deltas, target_deltas: (P, 4) of the positives, in the coder's units.
    image: (M,) int64, the image of each row.
    images: number of images.
    count: 0-d or int, what both losses are divided by, of this process.
    """

    logits: Tensor
    labels: Tensor
    rows: Tensor
    pred_deltas: Tensor
    target_deltas: Tensor
    image: Tensor
    images: int
    count: Tensor | int


def losses(
    module: nn.Module, settings: Settings, sample: Sample, weights: tuple[float, ...], *, sigmoid: bool = False
) -> tuple[Tensor, Tensor]:
    """Classification and localisation loss, 0-d each.

    Args:
        module: whose losses they are, for `statistics` and `record`.
        settings: with a number as beta.
        sample: see there.
        weights: the box coder's.
        sigmoid: binary cross entropy instead of softmax cross entropy.
    """
    pred, target, rows = sample.pred_deltas, sample.target_deltas, sample.rows
    iou = torch.zeros(sample.labels.shape, dtype=torch.float32, device=sample.labels.device)
    positive_iou = ik.delta_iou(pred, target, weights=weights).float()
    iou[rows] = positive_iou
    group = settings.group(type(module).__name__)
    count = torch.as_tensor(sample.count, dtype=torch.float32, device=iou.device).reshape(())
    positives = torch.full_like(count, rows.numel())
    count, positives, iou_sum = all_reduce_sums([count, positives, positive_iou.sum()], group)
    divisor = count.clamp(min=1) / world_size(group)
    remember(module, positives.long(), iou_sum / positives.clamp(min=1))
    shared = {"eps": settings.eps, "avg_factor": divisor, "backend": settings.backend}
    scope = ({"process_group": settings.process_group},) * 2
    # An image is in one process: its sums are complete there, and its number is not unique.
    if settings.normalizer_scope == "image":
        scope = tuple({"scope_ids": ids, "num_scopes": sample.images} for ids in (sample.image, sample.image[rows]))
    classify = ik.iou_balanced_binary_cross_entropy if sigmoid else ik.iou_balanced_cross_entropy
    record_flat(module, pred, target, lambda: _plain(classify, sample, sigmoid))
    cls = classify(sample.logits, sample.labels, iou, eta=settings.classification_exponent, **shared, **scope[0])
    loc = ik.iou_balanced_smooth_l1_loss(
        pred,
        target,
        positive_iou,
        box_weights=weights,
        normalize=settings.normalize_loc and settings.localization,
        **settings.localization_keywords(),
        **shared,
        **scope[1],
    )
    return settings.cls_weight * cls, loc


def _plain(classify: Callable[..., Tensor], sample: Sample, sigmoid: bool) -> Tensor:
    """The positives' losses (P,) without IoU weights."""
    logits, labels = sample.logits.detach()[sample.rows], sample.labels[sample.rows]
    found = classify(logits, labels, torch.ones_like(logits[:, 0]), eta=0.0, reduction="none")
    return found[:, 0] if sigmoid else found
