"""MMDetection's dense heads, passing each positive's IoU to the classification loss.

Matching, sampling, ignored regions, allowed_border and divisors are the parents'; only the losses differ.
"""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.dense_heads import FoveaHead, RetinaHead, RPNHead, SSDHead
from mmdet.registry import MODELS
from torch import Tensor

import ioubal_kernels as ik

from .losses import IoUBalancedCrossEntropyLoss
from .positives import check_losses, decoded, decoded_iou, loss_configs, positive_rows, spread

# A label that the softmax loss leaves out.
_LEFT_OUT = -100


class IoUBalancedAnchorHeadMixin:
    """For heads derived from AnchorHead whose loss_by_feat_single is AnchorHead's, ahead of them:

        @MODELS.register_module()
        class MyHead(IoUBalancedAnchorHeadMixin, RetinaSepBNHead): ...

    The losses' sums run over one pyramid level of the batch, as in the authors' code.

    Args:
        loss_cls: config of a loss with target=(labels, iou); default IoUBalancedFocalLoss.
        loss_bbox: config of any box loss of mmdet; default IoUBalancedSmoothL1Loss, which learns the box coder here.
        args, keywords: the parent's.

    Raises:
        TypeError: a loss_cls that takes labels only.
        ValueError: a loss_bbox that contradicts the box coder.
    """

    _default_loss_cls = "IoUBalancedFocalLoss"

    def __init__(self, *args: Any, loss_cls: Any = None, loss_bbox: Any = None, **keywords: Any) -> None:
        super().__init__(*args, **loss_configs(loss_cls, loss_bbox, self._default_loss_cls), **keywords)
        check_losses(self, self.bbox_coder)

    def loss_by_feat_single(
        self,
        cls_score: Tensor,
        bbox_pred: Tensor,
        anchors: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        bbox_targets: Tensor,
        bbox_weights: Tensor,
        avg_factor: float,
    ) -> tuple[Tensor, Tensor]:
        """Both losses of one level; arguments and result as in AnchorHead."""
        cls_score = cls_score.permute(0, 2, 3, 1).reshape(-1, self.cls_out_channels)
        bbox_pred = bbox_pred.permute(0, 2, 3, 1).reshape(-1, self.bbox_coder.encode_size)
        anchors = anchors.reshape(-1, anchors.size(-1))
        labels = labels.reshape(-1)
        bbox_targets, bbox_weights = (t.reshape(-1, t.size(-1)) for t in (bbox_targets, bbox_weights))
        rows = positive_rows(labels, self.num_classes)
        iou = spread(decoded_iou(self, anchors[rows], bbox_pred[rows], bbox_targets[rows]), rows, labels.numel())
        loss_cls = self.loss_cls(cls_score, (labels, iou), label_weights.reshape(-1), avg_factor=avg_factor)
        if self.reg_decoded_bbox:
            bbox_pred = decoded(self, anchors, bbox_pred)
        return loss_cls, self.loss_bbox(bbox_pred, bbox_targets, bbox_weights, avg_factor=avg_factor)


@MODELS.register_module()
class IoUBalancedRetinaHead(IoUBalancedAnchorHeadMixin, RetinaHead):
    """RetinaHead whose classification loss gets the IoU; see IoUBalancedAnchorHeadMixin."""


@MODELS.register_module()
class IoUBalancedRPNHead(IoUBalancedAnchorHeadMixin, RPNHead):
    """RPNHead whose classification loss gets the IoU; binary cross entropy unless loss_cls says otherwise."""

    _default_loss_cls = "IoUBalancedCrossEntropyLoss"

    def __init__(self, *args: Any, loss_cls: Any = None, **keywords: Any) -> None:
        super().__init__(*args, loss_cls={"use_sigmoid": True, **(loss_cls or {})}, **keywords)


@MODELS.register_module()
class IoUBalancedSSDHead(SSDHead):
    """SSDHead with IoU-balanced cross entropy on the positives and the hardest negatives, and balanced smooth L1.

    The sums run over one image, as in the authors' code. Mining ranks negatives by their plain loss, which the weights
    do not touch. SSDHead has no losses in its config; this head has:

    Args:
        loss_cls: config of IoUBalancedCrossEntropyLoss.
        loss_bbox: config of any box loss of mmdet; default IoUBalancedSmoothL1Loss with train_cfg's smoothl1_beta.
        args, keywords: SSDHead's.

    Raises:
        TypeError, ValueError: another loss_cls; a loss_bbox that contradicts the box coder.
    """

    def __init__(self, *args: Any, loss_cls: Any = None, loss_bbox: Any = None, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        configs = loss_configs(loss_cls, loss_bbox, "IoUBalancedCrossEntropyLoss")
        if loss_bbox is None and self.train_cfg:
            configs["loss_bbox"]["beta"] = self.train_cfg["smoothl1_beta"]
        self.loss_cls, self.loss_bbox = MODELS.build(configs["loss_cls"]), MODELS.build(configs["loss_bbox"])
        if not isinstance(self.loss_cls, IoUBalancedCrossEntropyLoss) or self.loss_cls.use_sigmoid:
            raise TypeError(
                f"{type(self).__name__}: loss_cls must be IoUBalancedCrossEntropyLoss with use_sigmoid=False, got"
                f" {self.loss_cls}"
            )
        check_losses(self, self.bbox_coder)

    def loss_by_feat_single(
        self,
        cls_score: Tensor,
        bbox_pred: Tensor,
        anchor: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        bbox_targets: Tensor,
        bbox_weights: Tensor,
        avg_factor: float,
    ) -> tuple[Tensor, Tensor]:
        """Both losses of one image; arguments and result as in SSDHead."""
        rows = positive_rows(labels, self.num_classes)
        iou = spread(decoded_iou(self, anchor[rows], bbox_pred[rows], bbox_targets[rows]), rows, labels.numel())
        kept = self._mined(cls_score, labels, label_weights, rows.numel()).index_fill(0, rows, True)
        loss_cls = self.loss_cls(
            cls_score, (torch.where(kept, labels, _LEFT_OUT), iou), label_weights, avg_factor=avg_factor
        )
        if self.reg_decoded_bbox:
            bbox_pred = decoded(self, anchor, bbox_pred)
        return loss_cls[None], self.loss_bbox(bbox_pred, bbox_targets, bbox_weights, avg_factor=avg_factor)

    @torch.no_grad()
    def _mined(self, cls_score: Tensor, labels: Tensor, label_weights: Tensor, positives: int) -> Tensor:
        """bool (M,): the neg_pos_ratio times as many negatives as positives that have the largest loss."""
        negatives = (labels == self.num_classes).nonzero().squeeze(1)
        count = min(int(self.train_cfg["neg_pos_ratio"] * positives), negatives.numel())
        weight = label_weights[negatives]
        plain = ik.iou_balanced_cross_entropy(
            cls_score[negatives],
            labels[negatives],
            torch.zeros_like(weight),
            eta=0.0,
            background_index=self.num_classes,
            weight=weight,
            reduction="none",
        )
        mined = torch.zeros_like(labels, dtype=torch.bool)
        mined[negatives[plain.topk(count).indices]] = True
        return mined


@MODELS.register_module()
class IoUBalancedFoveaHead(FoveaHead):
    """FoveaHead whose classification loss gets the IoU, which follows from the log-distances alone.

    The sums run over the batch of one process.

    Args:
        loss_cls: config of a loss with target=(labels, iou); default IoUBalancedFocalLoss.
        loss_bbox: config of a box loss on log-distances; default IoUBalancedSmoothL1Loss.
        args, keywords: FoveaHead's.

    Raises:
        TypeError, ValueError: as in IoUBalancedAnchorHeadMixin.
    """

    def __init__(self, *args: Any, loss_cls: Any = None, loss_bbox: Any = None, **keywords: Any) -> None:
        super().__init__(*args, **loss_configs(loss_cls, loss_bbox, "IoUBalancedFocalLoss"), **keywords)
        check_losses(self, "fovea")

    def loss_by_feat(
        self,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        batch_gt_instances: list[Any],
        batch_img_metas: list[dict],
        batch_gt_instances_ignore: list[Any] | None = None,
    ) -> dict[str, Tensor]:
        """Both losses of the batch; arguments and result as in FoveaHead. Without positives the box loss is 0 with a
        gradient of 0, where FoveaHead's is a constant.
        """
        sizes = [scores.shape[-2:] for scores in cls_scores]
        like = {"dtype": bbox_preds[0].dtype, "device": bbox_preds[0].device}
        priors = self.prior_generator.grid_priors(sizes, **like)
        labels, targets = self.get_targets(batch_gt_instances, sizes, priors)
        scores = torch.cat([level.permute(0, 2, 3, 1).reshape(-1, self.cls_out_channels) for level in cls_scores])
        preds = torch.cat([level.permute(0, 2, 3, 1).reshape(-1, 4) for level in bbox_preds])
        rows = positive_rows(labels, self.num_classes)
        pred, target, count = preds[rows], targets[rows], rows.numel()
        iou = spread(ik.delta_iou(pred, target, box_coder="fovea"), rows, labels.numel())
        loss_cls = self.loss_cls(scores, (labels, iou), avg_factor=count + len(cls_scores[0]))
        loss_bbox = self.loss_bbox(pred, target, torch.ones_like(target), avg_factor=max(count, 1))
        return {"loss_cls": loss_cls, "loss_bbox": loss_bbox}
