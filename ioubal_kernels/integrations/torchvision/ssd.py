"""SSD: softmax cross entropy on the positives and the hardest negatives of each image, smooth L1."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection.ssd import SSD

import ioubal_kernels as ik

from ... import validation
from . import flat
from .settings import OP, Settings
from .swapping import Balanced, swap, swap_back, warn_of_own_loss

OWN_BETA = 1.0


class BalancedSSD(Balanced):
    """torchvision's matching and mining, then the flat losses. Mining ranks negatives by their plain loss, which the
    weights do not touch, and never takes a positive.
    """

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        settings = self.iou_balanced.with_beta(OWN_BETA)
        logits, deltas = head_outputs["cls_logits"], head_outputs["bbox_regression"]
        matched = torch.stack(matched_idxs)
        images, count, classes = logits.shape
        positive = matched >= 0
        mined = hard_negatives(logits, positive, self.neg_to_pos_ratio)
        labels = torch.where(mined, 0, -1)
        goals = []
        for n, target in enumerate(targets):
            known = target["labels"]
            if validation.values_checked(known) and bool((known < 0).any()):  # would count as ignored below
                raise ValueError(f"{OP}: targets[{n}]['labels'] must be classes, got {int(known.min())}")
            rows = positive[n].nonzero().squeeze(1)
            gt = matched[n, rows]
            labels[n, rows] = target["labels"][gt].to(labels.dtype)
            goals.append(ik.encode_boxes(target["boxes"][gt], anchors[n][rows], weights=self.box_coder.weights))
        rows = positive.flatten().nonzero().squeeze(1)
        image = torch.arange(images, device=logits.device).repeat_interleave(count)
        sample = flat.Sample(
            logits=logits.reshape(-1, classes),
            labels=labels.flatten(),
            rows=rows,
            pred_deltas=deltas.reshape(-1, 4)[rows],
            target_deltas=torch.cat(goals),
            image=image,
            images=images,
            count=rows.numel(),
        )
        cls, loc = flat.losses(self, settings, sample, self.box_coder.weights)
        return {"bbox_regression": loc, "classification": cls}


@torch.no_grad()
def hard_negatives(logits: Tensor, positive: Tensor, ratio: float) -> Tensor:
    """bool (N, R): the `ratio` times as many negatives as there are positives, with the largest background loss.

    Args:
        logits: (N, R, C), the background is class 0.
        positive: bool (N, R).
        ratio: negatives for one positive.
    """
    wide = logits.float()
    loss = (wide.logsumexp(-1) - wide[..., 0]).masked_fill(positive, -torch.inf)
    rank = loss.argsort(dim=1, descending=True).argsort(dim=1)
    return (rank < ratio * positive.sum(1, keepdim=True)) & ~positive


def convert(model: nn.Module, settings: Settings) -> None:
    if settings.normalizer_scope == "level":
        raise ValueError(f"{OP}: normalizer_scope must be 'batch' or 'image' for SSD, got 'level'")
    warn_of_own_loss(model, SSD)
    swap(model, BalancedSSD, settings)


def own_beta(model: nn.Module) -> float:
    """The threshold of torchvision's smooth L1."""
    return OWN_BETA


def loss_module(model: nn.Module) -> nn.Module:
    """The module that computes the losses."""
    return model


def revert(model: nn.Module) -> None:
    swap_back(model)
