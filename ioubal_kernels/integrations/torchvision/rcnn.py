"""Faster, Mask and Keypoint R-CNN: the box head's losses, and on request the proposals'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.rpn import RegionProposalNetwork

import ioubal_kernels as ik

from . import flat
from .settings import OP, Settings
from .swapping import Balanced, swap, swap_back, warn_of_own_loss

OWN_BETA = 1 / 9


class BalancedRoIHeads(Balanced):
    """The stock forward, whose two box losses are replaced afterwards: what they are made of is caught on the way."""

    def forward(self, features: Any, proposals: Any, image_shapes: Any, targets: Any = None) -> Any:
        if not self.training:
            return super().forward(features, proposals, image_shapes, targets)
        outputs: list[tuple[Tensor, Tensor]] = []
        caught = self.box_predictor.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        try:
            result, losses = super().forward(features, proposals, image_shapes, targets)
            labels, regression_targets = self._sampled
        finally:
            caught.remove()
            self.__dict__.pop("_sampled", None)
        logits, deltas = outputs[0]
        cls, loc = self._losses(logits, deltas, labels, regression_targets)
        return result, {**losses, "loss_classifier": cls, "loss_box_reg": loc}

    def select_training_samples(self, proposals: Any, targets: Any) -> Any:
        found = super().select_training_samples(proposals, targets)
        self.__dict__["_sampled"] = found[2], found[3]
        return found

    def _losses(
        self, logits: Tensor, deltas: Tensor, labels: list[Tensor], targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Of class-specific deltas (M, 4 * C): a positive's are those of its class."""
        label = torch.cat(labels)
        rows = (label > 0).nonzero().squeeze(1)
        sample = flat.Sample(
            logits=logits,
            labels=label,
            rows=rows,
            pred_deltas=deltas.reshape(len(label), deltas.shape[1] // 4, 4)[rows, label[rows]],
            target_deltas=torch.cat(targets)[rows],
            image=_image_of(labels),
            images=len(labels),
            count=(label >= 0).sum(),
        )
        return flat.losses(self, self.iou_balanced.with_beta(OWN_BETA), sample, self.box_coder.weights)


class BalancedRPN(Balanced):
    """The proposals' losses on the sampled anchors: binary cross entropy and smooth L1."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        positive, negative = self.fg_bg_sampler(labels)
        taken = (torch.cat(positive) + torch.cat(negative)).nonzero().squeeze(1)
        label = torch.cat(labels)[taken]
        rows = (label > 0).nonzero().squeeze(1)
        sample = flat.Sample(
            logits=objectness.reshape(-1, 1)[taken],
            labels=torch.where(label > 0, 0, ik.BACKGROUND),
            rows=rows,
            pred_deltas=pred_bbox_deltas[taken[rows]],
            target_deltas=torch.cat(regression_targets)[taken[rows]],
            image=_image_of(labels)[taken],
            images=len(labels),
            count=taken.numel(),
        )
        return flat.losses(self, self.iou_balanced.with_beta(OWN_BETA), sample, self.box_coder.weights, sigmoid=True)


def _image_of(parts: list[Tensor]) -> Tensor:
    """The image's number of each row of the concatenated parts."""
    numbers = [torch.full((len(part),), n, device=part.device) for n, part in enumerate(parts)]
    return torch.cat(numbers)


def convert(model: nn.Module, settings: Settings, rpn_settings: Settings | None = None) -> None:
    """Swap the box head, and the RPN if settings for it are given; else give it its own class back."""
    if settings.normalizer_scope == "level":
        raise ValueError(f"{OP}: normalizer_scope must be 'batch' or 'image' for R-CNN models, got 'level'")
    if rpn_settings is not None:
        warn_of_own_loss(model.rpn, RegionProposalNetwork)
    swap(model.roi_heads, BalancedRoIHeads, settings)
    if rpn_settings is None:
        swap_back(model.rpn)
    else:
        swap(model.rpn, BalancedRPN, rpn_settings)


def own_beta(model: nn.Module) -> float:
    """The threshold of torchvision's smooth L1, of the box head and the RPN alike."""
    return OWN_BETA


def loss_module(model: nn.Module) -> nn.Module:
    """The module that computes the detection losses."""
    return model.roi_heads


def revert(model: nn.Module) -> None:
    swap_back(model.roi_heads)
    swap_back(model.rpn)
