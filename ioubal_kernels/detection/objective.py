"""What a training step minimises: the detector's losses with the IoU weights of the configuration."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

import ioubal_kernels as ik
from ioubal_kernels.integrations.torchvision.observing import Recording

from .config import LossConfig
from .data import Batch
from .errors import UsageError
from .models import Detector, PreparedImages
from .processes import Processes


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """torch's autocast for this dtype, or nothing for float32."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def images_to_device(batch: Batch, device: torch.device, channels_last: bool) -> PreparedImages:
    """The batch's images on `device`."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    tensors = batch.images.to(device, non_blocking=True).contiguous(memory_format=memory_format)
    return PreparedImages(tensors, [t["size"] for t in batch.targets])


def to_device(
    batch: Batch, device: torch.device, channels_last: bool
) -> tuple[PreparedImages, list[Tensor], list[Tensor]]:
    """Images (N, 3, H, W), gt boxes N x (G, 4) and gt labels N x (G,) of a batch on `device`."""
    boxes = [t["boxes"].to(device, non_blocking=True) for t in batch.targets]
    labels = [t["labels"].to(device, non_blocking=True) for t in batch.targets]
    return images_to_device(batch, device, channels_last), boxes, labels


def apply_loss(
    detector: Detector,
    config: LossConfig,
    *,
    w_loc: float = 1.0,
    rpn_w_loc: float = 1.0,
    process_group: str | None = None,
) -> None:
    """Give the detector the losses of the configuration, through `ik.integrations.torchvision.convert`.

    Args:
        w_loc, rpn_w_loc: the factors to use where the configuration says "auto".
        process_group: "world" where several processes share a batch.
    """
    options = {
        "eta": config.eta,
        "lambda_": config.lambda_,
        "beta": config.beta,
        "divisor": "paper",
        "normalizer_scope": config.normalizer_scope,
        "backend": None if config.backend == "auto" else config.backend,
        "alpha": config.alpha,
        "gamma": config.gamma,
        "eps": config.eps,
        "normalize_loc": config.normalize_loc,
        "cls_weight": config.cls_weight,
        "process_group": process_group,
        "w_loc": w_loc if config.w_loc == "auto" else config.w_loc,
        "rpn_w_loc": rpn_w_loc if config.rpn_w_loc == "auto" else config.rpn_w_loc,
    }
    detector.balance(options, rpn=config.rpn)


@torch.no_grad()
def normalizers(recording: Recording, config: LossConfig, coder: dict[str, Any]) -> dict[str, float | None]:
    """What Eq. 4 and 7 would multiply the weights of these positives by.

    Args:
        recording: of one or several training forwards; their positives count as one batch.
        config: its eta and lambda_ are the exponents; where it has 0, the method's 1.5.
        coder: `Detector.box_coder`.

    Returns:
        cls_normalizer, sum(CE) over sum(iou^eta CE); loc_normalizer, the same with iou^lambda and smooth L1. None
        without positives, or where all IoUs are 0.
    """
    defaults = LossConfig()
    plain = weighted = 0.0
    for (pred, target), losses in zip(recording.pairs, recording.plain, strict=True):
        iou = ik.delta_iou(pred, target, **{"weights" if k == "box_weights" else k: v for k, v in coder.items()})
        plain += losses.double().sum().item()
        weighted += (iou.double() ** (config.eta or defaults.eta) * losses.double()).sum().item()
    try:
        localization = ik.calibrate_w_loc(
            recording.pairs, lambda_=config.lambda_ or defaults.lambda_, beta=config.beta, **coder
        )
    except ValueError:
        localization = None
    return {"cls_normalizer": plain / weighted if weighted > 0 else None, "loc_normalizer": localization}


@torch.no_grad()
def calibrate(
    detector: Detector,
    batches: Iterable[Batch],
    config: LossConfig,
    device: torch.device,
    amp: torch.dtype | None,
    channels_last: bool,
    *,
    rpn: bool = False,
    processes: Processes | None = None,
) -> float:
    """The w_loc that keeps the model's localisation loss over `batches` unchanged by the IoU weights.

    The model is left as it was: BatchNorm sees the batches as in training, its running statistics are put back.

    Args:
        rpn: calibrate the proposals' factor instead (Faster R-CNN).
        processes: whose batches are looked at together; all get the same value.
    """
    if config.lambda_ == 0 or config.normalize_loc:  # Eq. 7 keeps the sum unchanged by itself
        return 1.0
    pairs = (to_device(batch, device, channels_last) for batch in batches)
    inputs = ((images, detector.targets(boxes, labels)) for images, boxes, labels in pairs)
    with autocast(device, amp):
        own = detector.collect_deltas(inputs, rpn=rpn)
    parts = (processes or Processes()).gather([(pred.cpu(), target.cpu()) for pred, target in own])
    pairs = [pair for part in parts for pair in part]
    if not any(len(pred) for pred, _ in pairs):
        factor = "rpn_w_loc" if rpn else "w_loc"
        raise UsageError(
            f"loss.{factor}: auto: no box in the first {len(pairs)} batches to calibrate it on; more batches by"
            f" loss.calibration_batches=N, or loss.{factor}=NUMBER"
        )
    beta = 1 / 9 if rpn else config.beta
    return ik.calibrate_w_loc(pairs, lambda_=config.lambda_, beta=beta, **detector.box_coder(rpn))


def large_factor(name: str, value: float) -> str | None:
    """What to say of a calibrated w_loc that is far above the paper's, which lie below 4."""
    if value <= 20:
        return None
    return (
        f"{name} {value:.0f} is large, since the untrained model's boxes hardly overlap what they are to find (are the"
        " objects much smaller than the anchors?). Training can become unstable or find nothing;"
        f" loss.{name}=NUMBER sets a smaller one"
    )
