"""What a training step minimises: matching and the fused IoU-balanced loss on the heads' raw maps."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

import ioubal_kernels as ik

from .anchors import match_batch
from .config import LossConfig
from .data import Batch
from .models import HeadMaps, RetinaNet


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """torch's autocast for this dtype, or nothing for float32."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def to_device(batch: Batch, device: torch.device, channels_last: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Images (N, 3, H, W), gt boxes N x (G, 4) and gt labels N x (G,) of a batch on `device`."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images = batch.images.to(device, non_blocking=True).contiguous(memory_format=memory_format)
    boxes = [t["boxes"].to(device, non_blocking=True) for t in batch.targets]
    labels = [t["labels"].to(device, non_blocking=True) for t in batch.targets]
    return images, boxes, labels


def detection_loss(
    model: RetinaNet, maps: HeadMaps, gt_boxes: list[Tensor], gt_labels: list[Tensor], config: LossConfig, w_loc: float
) -> ik.DetectionLoss:
    """Match the batch and evaluate `ik.iou_balanced_detection_loss` on the raw level maps.

    Args:
        maps: what `model` gave for the batch.
        gt_boxes, gt_labels: N tensors (G, 4) float32 and (G,) int64.
        config: exponents and options.
        w_loc: the factor to use (config.w_loc may still say "auto").
    """
    anchors = model.anchors(maps)
    backend = None if config.backend == "auto" else config.backend
    return ik.iou_balanced_detection_loss(
        maps.cls_logits,
        maps.bbox_deltas,
        anchors,
        match_batch(anchors, gt_boxes, backend),
        gt_boxes,
        gt_labels,
        eta=config.eta,
        lambda_=config.lambda_,
        w_loc=w_loc,
        alpha=config.alpha,
        gamma=config.gamma,
        beta=config.beta,
        normalize_loc=config.normalize_loc,
        normalizer_scope=config.normalizer_scope,
        eps=config.eps,
        cls_weight=config.cls_weight,
        backend=backend,
    )


@torch.no_grad()
def positive_deltas(model: RetinaNet, maps: HeadMaps, gt_boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Predicted and target deltas (P, 4) of the positives of a batch."""
    from .models.retinanet import flatten_maps

    anchors = model.anchors(maps)
    matched = match_batch(anchors, gt_boxes)
    deltas = flatten_maps(maps.bbox_deltas, 4).float()
    predicted, targets = [], []
    for n, boxes in enumerate(gt_boxes):
        rows = (matched[n] >= 0).nonzero().squeeze(1)
        predicted.append(deltas[n, rows])
        targets.append(ik.encode_boxes(boxes[matched[n, rows].long()], anchors[rows]))
    return torch.cat(predicted), torch.cat(targets)


@torch.no_grad()
def calibrate(
    model: RetinaNet,
    batches: Iterable[Batch],
    config: LossConfig,
    device: torch.device,
    amp: torch.dtype | None,
    channels_last: bool,
) -> float:
    """The w_loc that keeps the untrained model's localisation loss over `batches` unchanged by the IoU weights.

    The model is left as it was: BatchNorm sees the batches as in training, its running statistics are put back.
    """
    if config.lambda_ == 0:
        return 1.0
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    was_training = model.training
    model.train()

    def pairs() -> Iterable[tuple[Tensor, Tensor]]:
        for batch in batches:
            images, boxes, _ = to_device(batch, device, channels_last)
            with autocast(device, amp):
                maps = model(images)
            yield positive_deltas(model, maps, boxes)

    try:
        w_loc = float(ik.calibrate_w_loc(pairs(), lambda_=config.lambda_, beta=config.beta))
    finally:
        for name, value in model.named_buffers():
            value.copy_(buffers[name])
        model.train(was_training)
    return broadcast_from_first_rank(w_loc, device)


def broadcast_from_first_rank(value: float, device: torch.device) -> float:
    """The first rank's value on every rank: each rank sees other batches, and all must train with one factor."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device if device.type == "cuda" else "cpu")
    distributed.broadcast(tensor, src=0)
    return tensor.item()
