"""RetinaNet: the fused loss on the heads' raw level maps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import (
    RetinaNet,
    RetinaNetClassificationHead,
    RetinaNetHead,
    RetinaNetRegressionHead,
)
from torchvision.ops import box_iou

import ioubal_kernels as ik
from ioubal_kernels.boxes import result_dtype

from .observing import flatten_maps, record_dense, remember
from .settings import OP, Settings
from .swapping import Balanced, swap, swap_back, warn_of_own_loss

# What torchvision's smooth-L1 types are as a threshold; its IoU losses have none.
OWN_BETA = {"l1": 0.0, "smooth_l1": 1.0}


# Set by the model for its training forward: a part may be in another mode (a frozen head in eval mode, for instance).
_RAW = "_iou_balanced_raw"


class RawClassification(Balanced):
    """In the model's training the head's maps as they are: a list over levels of (N, A*K, H, W)."""

    def forward(self, x: list[Tensor]) -> Any:
        if not getattr(self, _RAW, False):
            return super().forward(x)
        return [self.cls_logits(self.conv(features)) for features in x]


class RawRegression(Balanced):
    """In the model's training the head's maps as they are: a list over levels of (N, A*4, H, W)."""

    def forward(self, x: list[Tensor]) -> Any:
        if not getattr(self, _RAW, False):
            return super().forward(x)
        return [self.bbox_reg(self.conv(features)) for features in x]


class BalancedRetinaNet(Balanced):
    """Matching for the whole batch in one call, then `iou_balanced_detection_loss`."""

    def forward(self, images: Any, targets: Any = None) -> Any:
        if not self.training:
            return super().forward(images, targets)
        with raw_maps(self):
            return super().forward(images, targets)

    def compute_loss(
        self, targets: list[dict[str, Tensor]], head_outputs: dict[str, Any], anchors: list[Tensor]
    ) -> dict[str, Tensor]:
        loss_type = self.head.regression_head._loss_type
        settings = self.iou_balanced.with_beta(own_beta(self))
        boxes = _of_one_dtype([t["boxes"] for t in targets])
        labels = [t["labels"].to(torch.int64) for t in targets]
        # torchvision's generator lays the same grid over every image of a batch.
        same = type(self.anchor_generator).forward is AnchorGenerator.forward
        shared = anchors[0] if same else torch.stack(anchors)
        matched = self._match(shared, anchors, boxes)
        logits, deltas = head_outputs["cls_logits"], head_outputs["bbox_regression"]
        weights = self.head.regression_head.box_coder.weights
        loss = ik.iou_balanced_detection_loss(
            logits,
            deltas,
            shared,
            matched,
            boxes,
            labels,
            box_weights=weights,
            avg_factor=_per_image(matched) if settings.divisor == "torchvision" else None,
            **settings.keywords(),
        )
        remember(self, loss.num_positives, loss.mean_iou)
        record_dense(
            self,
            logits,
            deltas,
            shared,
            matched,
            boxes,
            labels,
            alpha=settings.alpha,
            gamma=settings.gamma,
            weights=weights,
        )
        localization = loss.localization
        if self.iou_balanced.beta is None and loss_type not in OWN_BETA:
            outputs = {"bbox_regression": flatten_maps(deltas, 4)}
            localization = self.head.regression_head.compute_loss(targets, outputs, anchors, list(matched.long()))
        return {"classification": loss.classification, "bbox_regression": localization}

    def _match(self, shared: Tensor, anchors: list[Tensor], boxes: list[Tensor]) -> Tensor:
        matcher = self.proposal_matcher
        if type(matcher) is Matcher:
            return ik.match_anchors(
                shared,
                boxes,
                high=matcher.high_threshold,
                low=matcher.low_threshold,
                allow_low_quality=matcher.allow_low_quality_matches,
                dtype=torch.int32,
                backend=self.iou_balanced.backend,
            )
        return torch.stack(
            [
                matcher(box_iou(gt, own)) if gt.numel() else torch.full((len(own),), ik.BACKGROUND, device=own.device)
                for gt, own in zip(boxes, anchors, strict=True)
            ]
        )


@contextlib.contextmanager
def raw_maps(model: nn.Module) -> Iterator[None]:
    """In it the head of a converted model hands over its maps as they are."""
    parts = [part for part, _ in _raw_parts(model)]
    for part in parts:
        setattr(part, _RAW, True)
    try:
        yield
    finally:
        for part in parts:
            delattr(part, _RAW)


def _of_one_dtype(boxes: list[Tensor]) -> list[Tensor]:
    """Data sets mix them: float64 boxes beside an empty float32 tensor."""
    if len({b.dtype for b in boxes}) == 1:
        return boxes
    return [b.to(result_dtype(*boxes)) for b in boxes]


def _per_image(matched: Tensor) -> Tensor:
    """torchvision's divisors (N,): each image's positives, at least one, times the number of images."""
    return (matched >= 0).sum(1).clamp(min=1).float() * len(matched)


def convert(model: nn.Module, settings: Settings) -> None:
    """Swap the model, and its head's two parts where they are torchvision's own."""
    loss_type = model.head.regression_head._loss_type
    if settings.localization and settings.beta is None and loss_type not in OWN_BETA:
        raise ValueError(
            f"{OP}: beta must be a number for a model whose box loss is {loss_type!r}, got None: the balanced loss"
            " weights smooth L1, so give its threshold, or localization=False to keep the model's own"
        )
    parts = _raw_parts(model)
    if settings.normalizer_scope == "level" and not parts:
        raise ValueError(
            f"{OP}: normalizer_scope 'level' needs torchvision's own RetinaNetHead, got {type(model.head).__name__}"
        )
    warn_of_own_loss(model, RetinaNet)
    swap(model, BalancedRetinaNet, settings)
    for part, mixin in parts:
        swap(part, mixin, settings)


def own_beta(model: nn.Module) -> float:
    """The threshold that the model's own box loss has as a smooth L1; 1 for one that has none."""
    return OWN_BETA.get(model.head.regression_head._loss_type, 1.0)


def loss_module(model: nn.Module) -> nn.Module:
    """The module that computes the losses."""
    return model


def revert(model: nn.Module) -> None:
    swap_back(model)
    for name in ("classification_head", "regression_head"):
        part = getattr(model.head, name, None)
        if part is not None:
            swap_back(part)


def _raw_parts(model: nn.Module) -> list[tuple[nn.Module, type]]:
    """The two parts of the head with the mixins that make them hand over raw maps; none unless both are torchvision's
    own: another forward must not be replaced.
    """
    head = model.head
    if type(head) is not RetinaNetHead:
        return []
    wanted = (
        (head.classification_head, RetinaNetClassificationHead, RawClassification),
        (head.regression_head, RetinaNetRegressionHead, RawRegression),
    )
    own = [getattr(type(part), "_original", type(part)) is stock for part, stock, _ in wanted]
    return [(part, mixin) for part, _, mixin in wanted] if all(own) else []
