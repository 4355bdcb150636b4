"""MMDetection's R-CNN box heads, passing each positive RoI's IoU to the classification loss."""

from __future__ import annotations

from typing import Any

from mmdet.models.losses import accuracy
from mmdet.models.roi_heads.bbox_heads import Shared2FCBBoxHead
from mmdet.registry import MODELS
from torch import Tensor

from .positives import check_losses, decoded_iou, loss_configs, positive_rows, spread


class IoUBalancedBBoxHeadMixin:
    """For box heads derived from BBoxHead, ahead of them:

        @MODELS.register_module()
        class MyBBoxHead(IoUBalancedBBoxHeadMixin, Shared4Conv1FCBBoxHead): ...

    The losses' sums run over all sampled RoIs of one process, as in the authors' code.

    Args:
        loss_cls: config of a loss with target=(labels, iou); default IoUBalancedCrossEntropyLoss.
        loss_bbox: config of any box loss of mmdet; default IoUBalancedSmoothL1Loss, which learns the box coder here.
        args, keywords: the parent's.

    Raises:
        TypeError: a loss_cls that takes labels only.
        ValueError: a loss_bbox that contradicts the box coder; a head without regression, which has no IoU.
    """

    def __init__(self, *args: Any, loss_cls: Any = None, loss_bbox: Any = None, **keywords: Any) -> None:
        super().__init__(*args, **loss_configs(loss_cls, loss_bbox, "IoUBalancedCrossEntropyLoss"), **keywords)
        if not self.with_reg:
            raise ValueError(f"{type(self).__name__}: with_reg must be True: the IoU is that of the predicted box")
        check_losses(self, self.bbox_coder)

    def loss(
        self,
        cls_score: Tensor | None,
        bbox_pred: Tensor,
        rois: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        bbox_targets: Tensor,
        bbox_weights: Tensor,
        reduction_override: str | None = None,
    ) -> dict[str, Tensor]:
        """Losses and accuracy; arguments and result as in BBoxHead."""
        regression = super().loss(
            None, bbox_pred, rois, labels, label_weights, bbox_targets, bbox_weights, reduction_override
        )
        if cls_score is None or cls_score.numel() == 0:
            return regression
        rows = positive_rows(labels, self.num_classes)
        pred = bbox_pred.reshape(len(labels), -1, self.bbox_coder.encode_size)[rows]
        # Class-specific regression: the box of the RoI's own class.
        pred = pred[:, 0] if self.reg_class_agnostic else pred.take_along_dim(labels[rows, None, None], 1)[:, 0]
        iou = spread(decoded_iou(self, rois[rows, 1:], pred, bbox_targets[rows]), rows, labels.numel())
        loss_cls = self.loss_cls(
            cls_score,
            (labels, iou),
            label_weights,
            avg_factor=(label_weights > 0).sum().clamp(min=1).float(),
            reduction_override=reduction_override,
        )
        return {"loss_cls": loss_cls, "acc": accuracy(cls_score, labels), **regression}


@MODELS.register_module()
class IoUBalancedShared2FCBBoxHead(IoUBalancedBBoxHeadMixin, Shared2FCBBoxHead):
    """Shared2FCBBoxHead whose classification loss gets the IoU; see IoUBalancedBBoxHeadMixin."""
