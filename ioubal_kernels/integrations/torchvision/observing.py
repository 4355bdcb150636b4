"""What a training forward leaves to look at: its positives, and on request the boxes they predicted.

Kept beside the modules, not in them: state dicts, copies and pickles do not see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import ioubal_kernels as ik
from ioubal_kernels import validation

_last: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()
_recorders: WeakKeyDictionary[nn.Module, Recording] = WeakKeyDictionary()


@dataclass
class Recording:
    """The positives of the training forwards that ran meanwhile, one entry a forward.

    Attributes:
        pairs: (pred_deltas (P, 4), target_deltas (P, 4)), float32.
        plain: (P,) the positives' classification losses without IoU weights (CE in Eq. 3: focal loss, cross entropy),
            float32.
    """

    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    plain: list[Tensor] = field(default_factory=list)


def remember(module: nn.Module, num_positives: Tensor, mean_iou: Tensor) -> None:
    """Keep the figures of a training forward until the next one."""
    _last[module] = {"num_positives": num_positives.detach(), "mean_iou": mean_iou.detach()}


def last(module: nn.Module) -> dict[str, Tensor] | None:
    """What `remember` kept, or None."""
    return _last.get(module)


@contextmanager
def record_positives(module: nn.Module) -> Iterator[Recording]:
    """While the block runs, every training forward of `module` adds its positives to the recording."""
    _recorders[module] = Recording()
    try:
        yield _recorders[module]
    finally:
        del _recorders[module]


@contextmanager
def record(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """While the block runs, every training forward of `module` appends the deltas of its positives to the list: pairs
    (pred_deltas (P, 4), target_deltas (P, 4)).
    """
    with record_positives(module) as recording:
        yield recording.pairs


def record_flat(
    module: nn.Module, pred_deltas: Tensor, target_deltas: Tensor, plain_losses: Callable[[], Tensor]
) -> None:
    """Add a forward's positives, if a recording runs: their deltas (P, 4) and what gives their plain losses (P,)."""
    recording = _recorders.get(module)
    if recording is None:
        return
    recording.pairs.append((pred_deltas.detach().float(), target_deltas.detach().float()))
    with torch.no_grad():
        recording.plain.append(plain_losses().detach().float())


def flatten_maps(maps: Tensor | Sequence[Tensor], channels: int) -> Tensor:
    """Level maps (N, A*channels, H, W) as (N, R, channels) in the order level, h, w, a (a copy); flat as they are."""
    if isinstance(maps, Tensor):
        return maps
    return torch.cat([m.permute(0, 2, 3, 1).reshape(m.shape[0], -1, channels) for m in maps], dim=1)


def record_dense(
    module: nn.Module,
    cls_logits: Tensor | Sequence[Tensor],
    bbox_deltas: Tensor | Sequence[Tensor],
    anchors: Tensor,
    matched_idxs: Tensor,
    gt_boxes: Sequence[Tensor],
    gt_labels: Sequence[Tensor],
    *,
    alpha: float | None,
    gamma: float,
    **coder: Any,
) -> None:
    """`record_flat` of a dense detector with sigmoid scores, if a recording runs: arguments as in
    `iou_balanced_detection_loss`, `coder` those of `encode_boxes`.
    """
    if module not in _recorders:
        return
    # Maps have A*K and A*4 channels.
    classes = 0 if isinstance(cls_logits, Tensor) else cls_logits[0].shape[1] * 4 // bbox_deltas[0].shape[1]
    flat_deltas, flat_logits = flatten_maps(bbox_deltas, 4), flatten_maps(cls_logits, classes)
    predicted, targets, logits, labels = [], [], [], []
    for n, gt in enumerate(gt_boxes):
        rows = (matched_idxs[n] >= 0).nonzero().squeeze(1)
        own = anchors if anchors.ndim == 2 else anchors[n]
        matched = matched_idxs[n, rows].long()
        predicted.append(flat_deltas[n, rows])
        targets.append(ik.encode_boxes(gt[matched], own[rows], **coder))
        labels.append(gt_labels[n][matched])
        logits.append(flat_logits[n, rows, labels[-1]])

    def plain() -> Tensor:
        column = torch.cat(logits)[:, None].detach()
        zero = torch.zeros(len(column), dtype=torch.int64, device=column.device)
        return ik.iou_balanced_sigmoid_focal_loss(
            column, zero, torch.ones_like(column[:, 0]), eta=0.0, alpha=alpha, gamma=gamma, reduction="none"
        )[:, 0]

    record_flat(module, torch.cat(predicted), torch.cat(targets), plain)


def _checked(op: str, argument: str, batch: Any) -> tuple[Any, Any]:
    """A pair (images, targets) as a detector takes it in training."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        validation.fail_type(op, argument, "be a pair (images, targets): batches is a list of them", batch)
    images, targets = batch
    if isinstance(images, (tuple, list)) and not all(isinstance(image, Tensor) for image in images):
        validation.fail_type(op, f"the images of {argument}", "be a list of tensors", images)
    if not isinstance(targets, (tuple, list)) or not all(isinstance(target, dict) for target in targets):
        validation.fail_type(op, f"the targets of {argument}", "be a list of dicts", targets)
    if isinstance(images, (tuple, list)) and len(images) != len(targets):
        validation.fail_value(op, f"the targets of {argument}", f"be {len(images)}, one for each image", targets)
    return images, targets


def positive_deltas(
    model: nn.Module, module: nn.Module, batches: Iterable[tuple[Any, Any]]
) -> list[tuple[Tensor, Tensor]]:
    """What `record` collects of `module` while `model` runs over batches (images, targets) in training mode, without
    gradients. Modes, buffers (BatchNorm's statistics) and torch's random numbers are put back.
    """
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    modes = {part: part.training for part in model.modules()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        model.train()
        with torch.random.fork_rng(devices=devices), torch.no_grad(), record(module) as pairs:
            for i, batch in enumerate(batches):
                model(*_checked("calibrate_w_loc", f"batches[{i}]", batch))
    finally:
        for part, training in modes.items():
            part.training = training
        for name, value in model.named_buffers():
            value.copy_(buffers[name])
    return pairs
