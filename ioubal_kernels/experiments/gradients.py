"""Figure 2 measured: the gradient of the balanced localisation loss as autograd gives it, on boxes of real data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import ioubal_kernels as ik

from ..detection.data import TrainLoader
from ..detection.objective import to_device
from ..detection.predict import open_trained
from ..detection.resources import resolve_device, transform_config
from .paper import W_LOC
from .study import RowStudy

BETA = 0.111  # the paper's delta in Figure 2
COORDINATES = {"center": (0, 1), "size": (2, 3)}
POSITIVES = 512


@dataclass(frozen=True)
class GradientNorms:
    """Norms over the positives, at each d.

    Attributes:
        d: (D,) how far one delta is off, the others being right.
        median, low, high: (D,) median, 10 % and 90 % quantile of the norm of the gradient with respect to that delta.
    """

    d: np.ndarray
    median: np.ndarray
    low: np.ndarray
    high: np.ndarray


def real_targets(row: RowStudy, limit: int = POSITIVES) -> Tensor:
    """Target deltas (P, 4) of the positives that a row's detector has in its training images, float32, weights 1.

    They hold all that Figure 2 depends on: a box relative to its anchor. None, (0, 4), where the first batches have no
    positives.
    """
    config = row.first.config
    trained = open_trained(str(row.first.folder))
    data = row.load_data().training
    loader = TrainLoader(data, transform_config(config), config.train.batch_size, seed=config.train.seed)
    device = resolve_device("cpu")
    prepared = (to_device(batch, device, channels_last=True) for _, batch in zip(range(4), loader))
    inputs = ((images, trained.model.targets(boxes, labels)) for images, boxes, labels in prepared)
    pairs = trained.model.collect_deltas(inputs, rpn=False)
    weights = trained.model.box_coder(rpn=False).get("box_weights", (1.0, 1.0, 1.0, 1.0))
    targets = torch.cat([target for _, target in pairs]) / torch.tensor(weights)
    step = max(1, len(targets) // limit)
    return targets[::step][:limit]


def measured_gradient_norms(
    targets: Tensor, d: Sequence[float], kind: str, lambda_: float, w_loc: float, *, backend: str | None = None
) -> GradientNorms:
    """Move one predicted delta of every positive by d away from its target and ask autograd, through
    `iou_balanced_detection_loss`, for the gradient with respect to it.

    Args:
        targets: (P, 4) float32, see `real_targets`.
        d: the distances.
        kind: "center" (dx and dy) or "size" (dw and dh); positives and both coordinates are pooled.
        lambda_, w_loc: of the loss; its beta is the paper's.
        backend: of the loss; None for the automatic choice.
    """
    count = len(targets)
    anchors = torch.tensor([[0.0, 0.0, 100.0, 100.0]]).repeat(count, 1)
    gt_boxes = ik.decode_boxes(targets, anchors)
    # As the loss sees it: clamped sizes come back as they went in.
    goal = ik.encode_boxes(gt_boxes, anchors)
    matched = torch.arange(count)[None]
    labels = torch.zeros(count, dtype=torch.int64)
    norms = []
    for distance in d:
        found = []
        for coordinate in COORDINATES[kind]:
            deltas = goal.clone()
            deltas[:, coordinate] += distance
            deltas = deltas[None].requires_grad_()
            loss = ik.iou_balanced_detection_loss(
                torch.zeros(1, count, 1),
                deltas,
                anchors,
                matched,
                [gt_boxes],
                [labels],
                lambda_=lambda_,
                w_loc=w_loc,
                beta=BETA,
                avg_factor=1.0,
                backend=backend,
            )
            (gradient,) = torch.autograd.grad(loss.localization, deltas)
            found.append(gradient[0, :, coordinate].abs())
        norms.append(torch.cat(found).double().numpy())
    low, median, high = np.quantile(np.array(norms), (0.1, 0.5, 0.9), axis=1)
    return GradientNorms(np.asarray(d, dtype=float), median, low, high)


def figure_2(targets: Tensor) -> dict[str, dict[float, GradientNorms]]:
    """The paper's curves, measured: by kind, then by lambda (with Table 3's w_loc)."""
    distances = np.linspace(0.0, 1.0, 41)
    return {
        kind: {
            lambda_: measured_gradient_norms(targets, distances.tolist(), kind, lambda_, w_loc)
            for lambda_, w_loc in W_LOC.items()
        }
        for kind in COORDINATES
    }
