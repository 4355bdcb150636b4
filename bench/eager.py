"""The IoU-balanced loss as one writes it in eager PyTorch: what the README shows beside the fused call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou


# README: begin
def eager_loss(logits, deltas, anchors, matched, gt_boxes, gt_labels, eta=1.5, lambda_=1.5, w_loc=1.0, beta=1 / 9):
    pos, counted = matched >= 0, matched != -2
    target = torch.zeros_like(logits)
    wa, ha = anchors[:, 2] - anchors[:, 0], anchors[:, 3] - anchors[:, 1]
    xa, ya = anchors[:, 0] + wa / 2, anchors[:, 1] + ha / 2
    p = logits.sigmoid()
    ce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    cls = 0.75 * p**2 * ce * counted[..., None]
    pos_sum = weighted = loc = logits.new_zeros(())
    for i in range(len(logits)):
        at = pos[i].nonzero()[:, 0]
        box, label = gt_boxes[i][matched[i][at]], gt_labels[i][matched[i][at]]
        d, w, h, x, y = deltas[i][at], wa[at], ha[at], xa[at], ya[at]
        bw, bh = box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]
        goal = torch.stack(
            [(box[:, 0] + bw / 2 - x) / w, (box[:, 1] + bh / 2 - y) / h, (bw / w).log(), (bh / h).log()], 1
        )
        px, py = d[:, 0] * w + x, d[:, 1] * h + y
        pw, ph = d[:, 2].clamp(max=4.135).exp() * w, d[:, 3].clamp(max=4.135).exp() * h
        pred = torch.stack([px - pw / 2, py - ph / 2, px + pw / 2, py + ph / 2], 1)
        iou = box_iou(pred, box).diagonal().detach()
        z = logits[i][at, label]
        plain = 0.25 * (1 - z.sigmoid()) ** 2 * F.softplus(-z)
        pos_sum, weighted = pos_sum + plain.sum(), weighted + (iou**eta * plain).sum()
        cls[i, at, label] = 0.0
        loc = loc + w_loc * (iou**lambda_ * F.smooth_l1_loss(d, goal, beta=beta, reduction="none").sum(1)).sum()
    weight = (pos_sum / weighted).detach() if pos.any() else 0.0
    return (cls.sum() + weight * weighted) / pos.sum().clamp(min=1), loc / pos.sum().clamp(min=1)


# README: end


def authors_style_loss(logits: Tensor, labels: Tensor, iou: Tensor, eta: float = 1.5) -> Tensor:
    """The classification loss as the authors' published code forms it: dense one-hot targets and dense weights."""
    target = F.one_hot(labels.clamp(min=0), logits.shape[-1]) * (labels >= 0)[..., None]
    target = target.to(logits.dtype)
    weight = (labels != -2)[..., None].to(logits.dtype).expand_as(logits)
    p = logits.sigmoid()
    pt = (1 - p) * target + p * (1 - target)
    modulated = (0.25 * target + 0.75 * (1 - target)) * weight * pt.pow(2)
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * modulated
    power = iou[..., None].expand_as(logits).pow(eta)
    normalizer = ((loss * target).sum() / ((loss * target * power).sum() + 1e-6)).detach()
    balanced = target * power * normalizer + (1 - target)
    return (loss * balanced.detach()).sum() / (labels >= 0).sum().clamp(min=1)
