"""What the heads share: their losses' configs, and the IoU of the positives' decoded boxes."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.losses import QualityFocalLoss
from mmdet.models.task_modules.coders import BaseBBoxCoder, DeltaXYWHBBoxCoder
from mmdet.registry import MODELS
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor, nn

import ioubal_kernels as ik

from .losses import IoUBalancedCrossEntropyLoss, IoUBalancedFocalLoss, IoUBalancedSmoothL1Loss

# Losses that take target=(labels, iou).
WITH_IOU = (IoUBalancedFocalLoss, IoUBalancedCrossEntropyLoss, QualityFocalLoss)


def loss_configs(loss_cls: Any, loss_bbox: Any, default: str) -> dict[str, dict[str, Any]]:
    """The two configs, completed: mmdet's heads read use_sigmoid from the config, not from the loss.

    Args:
        loss_cls, loss_bbox: as in the head's config; None for this package's losses with their defaults.
        default: type of the classification loss.
    """
    loss_cls = {"type": default, **(loss_cls or {})}
    kind = loss_cls["type"]
    kind = MODELS.get(kind) if isinstance(kind, str) else kind
    if kind in (IoUBalancedFocalLoss, QualityFocalLoss):
        loss_cls.setdefault("use_sigmoid", True)
    return {"loss_cls": loss_cls, "loss_bbox": {"type": "IoUBalancedSmoothL1Loss", **(loss_bbox or {})}}


def check_losses(head: nn.Module, box_coder: BaseBBoxCoder | str) -> None:
    """The head's losses fit: the classification loss takes the IoU, the box loss knows the head's box coder.

    Raises:
        TypeError: a classification loss that takes labels only.
        ValueError: a config that contradicts the head.
    """
    name = type(head).__name__
    if not isinstance(head.loss_cls, WITH_IOU):
        raise TypeError(
            f"{name}: loss_cls must be a loss with target=(labels, iou): {', '.join(c.__name__ for c in WITH_IOU)};"
            f" got {type(head.loss_cls).__name__}"
        )
    if not isinstance(head.loss_bbox, IoUBalancedSmoothL1Loss):
        return
    if isinstance(box_coder, str):
        head.loss_bbox.configure(name, box_coder)
    elif head.reg_decoded_bbox:
        head.loss_bbox.configure(name, "boxes")
    elif isinstance(box_coder, DeltaXYWHBBoxCoder):
        if any(box_coder.means[2:]):
            raise ValueError(
                f"{name}: bbox_coder's target_means of dw and dh must be 0 for IoUBalancedSmoothL1Loss, which takes the"
                f" IoU from the deltas; got {tuple(box_coder.means)}"
            )
        head.loss_bbox.configure(name, "delta", box_coder.stds)
    else:
        raise ValueError(
            f"{name}: bbox_coder must be a DeltaXYWHBBoxCoder for IoUBalancedSmoothL1Loss, got"
            f" {type(box_coder).__name__}; set reg_decoded_bbox=True, or use another loss_bbox"
        )


def positive_rows(labels: Tensor, num_classes: int) -> Tensor:
    """(P,) int64, the rows of labels (M,) that are a class; the background is num_classes."""
    return ((labels >= 0) & (labels < num_classes)).nonzero().squeeze(1)


def spread(iou: Tensor, rows: Tensor, count: int) -> Tensor:
    """(count,) with iou (P,) at `rows` (P,), 0 elsewhere."""
    return iou.new_zeros(count).index_copy(0, rows, iou)


def decoded(head: nn.Module, priors: Any, deltas: Tensor) -> Tensor:
    """Boxes (M, 4) of `deltas` (M, 4) on priors (M, 4), a tensor or mmdet's boxes, by the head's box coder."""
    return get_box_tensor(head.bbox_coder.decode(priors, deltas))


@torch.no_grad()
def decoded_iou(head: nn.Module, priors: Any, bbox_pred: Tensor, bbox_targets: Tensor) -> Tensor:
    """IoU (P,) of the positives' decoded predictions with their target boxes, float32. No gradient.

    Args:
        head: has bbox_coder and reg_decoded_bbox.
        priors: (P, 4) anchors or RoIs, a tensor or mmdet's boxes.
        bbox_pred: (P, 4) as the head gives them, encoded.
        bbox_targets: (P, 4), boxes if the head has reg_decoded_bbox, else encoded.
    """
    targets = bbox_targets.float()
    if not head.reg_decoded_bbox:
        targets = decoded(head, priors, targets)
    return ik.paired_box_iou(decoded(head, priors, bbox_pred.float()), targets)
