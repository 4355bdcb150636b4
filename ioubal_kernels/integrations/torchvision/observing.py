"""What a training forward leaves to look at: its positives, and on request the boxes they predicted.

Kept beside the modules, not in them: state dicts, copies and pickles do not see it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import ioubal_kernels as ik

_last: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()
_recorders: WeakKeyDictionary[nn.Module, list[tuple[Tensor, Tensor]]] = WeakKeyDictionary()


def remember(module: nn.Module, num_positives: Tensor, mean_iou: Tensor) -> None:
    """Keep the figures of a training forward until the next one."""
    _last[module] = {"num_positives": num_positives.detach(), "mean_iou": mean_iou.detach()}


def last(module: nn.Module) -> dict[str, Tensor] | None:
    """What `remember` kept, or None."""
    return _last.get(module)


@contextmanager
def record(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """While the block runs, every training forward of `module` appends the deltas of its positives to the list: pairs
    (pred_deltas (P, 4), target_deltas (P, 4)).
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    _recorders[module] = pairs
    try:
        yield pairs
    finally:
        del _recorders[module]


def recording(module: nn.Module) -> bool:
    """Whether a `record` block of `module` is running."""
    return module in _recorders


def record_pairs(module: nn.Module, pred_deltas: Tensor, target_deltas: Tensor) -> None:
    """Append the deltas (P, 4) of a forward's positives, if a `record` block is running."""
    if recording(module):
        _recorders[module].append((pred_deltas.detach().float(), target_deltas.detach().float()))


def flatten_maps(maps: Tensor | Sequence[Tensor], channels: int) -> Tensor:
    """Level maps (N, A*channels, H, W) as (N, R, channels) in the order level, h, w, a (a copy); flat as they are."""
    if isinstance(maps, Tensor):
        return maps
    return torch.cat([m.permute(0, 2, 3, 1).reshape(m.shape[0], -1, channels) for m in maps], dim=1)


def record_dense(
    module: nn.Module,
    bbox_deltas: Tensor | Sequence[Tensor],
    anchors: Tensor,
    matched_idxs: Tensor,
    gt_boxes: Sequence[Tensor],
    **coder: Any,
) -> None:
    """`record_pairs` of a dense detector, if a `record` block is running: arguments as in
    `iou_balanced_detection_loss`, `coder` those of `encode_boxes`.
    """
    if not recording(module):
        return
    flat, predicted, targets = flatten_maps(bbox_deltas, 4), [], []
    for n, gt in enumerate(gt_boxes):
        rows = (matched_idxs[n] >= 0).nonzero().squeeze(1)
        own = anchors if anchors.ndim == 2 else anchors[n]
        predicted.append(flat[n, rows])
        targets.append(ik.encode_boxes(gt[matched_idxs[n, rows].long()], own[rows], **coder))
    record_pairs(module, torch.cat(predicted), torch.cat(targets))


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
            for images, targets in batches:
                model(images, targets)
    finally:
        for part, training in modes.items():
            part.training = training
        for name, value in model.named_buffers():
            value.copy_(buffers[name])
    return pairs
