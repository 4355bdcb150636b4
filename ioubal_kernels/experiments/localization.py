"""How scores go with localisation: what Figures 3a and 3b of the paper show, from the detections of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torchvision.ops import box_iou

from ..detection.data import Dataset
from ..detection.evaluate import ImageDetections

EDGES = tuple(round(0.5 + 0.05 * i, 2) for i in range(11))
"""Of Figure 3a's bins: 0.5, 0.55 .. 1. All but the last are Figure 3b's thresholds."""


@dataclass(frozen=True)
class Localization:
    """Of the detections whose IoU with the best box of their class is at least 0.5.

    Attributes:
        count: how many they are.
        score_by_iou: mean score in each bin of `EDGES` (Figure 3a); None in an empty one.
        counts_by_iou: detections in each bin.
        share_above: share of them above each threshold (Figure 3b).
        rank_correlation: Spearman's, of score and IoU; None for fewer than 3 or constant values.
    """

    count: int
    score_by_iou: list[float | None]
    counts_by_iou: list[int]
    share_above: list[float]
    rank_correlation: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def scores_and_ious(dataset: Dataset, detections: Sequence[ImageDetections]) -> tuple[np.ndarray, np.ndarray]:
    """Every detection's score and its IoU with the best box of its class in its image, 0 without one.

    Detections whose best box is one that evaluation ignores (a crowd region, a difficult box) are left out.
    """
    records = {record.id: record for record in dataset.records}
    scores, ious = [np.zeros(0)], [np.zeros(0)]
    for found in detections:
        record = records[found.image_id]
        same = torch.from_numpy(record.labels)[None, :] == found.labels[:, None]
        overlap = box_iou(found.boxes.float(), torch.from_numpy(record.boxes).float()) * same
        if overlap.shape[1] == 0:
            best, counted = torch.zeros(len(found.scores)), torch.ones(len(found.scores), dtype=torch.bool)
        else:
            best, index = overlap.max(dim=1)
            ignored = torch.from_numpy(record.iscrowd.astype(bool) | record.difficult.astype(bool))
            counted = ~(ignored[index] & (best > 0))
        scores.append(found.scores[counted].double().numpy())
        ious.append(best[counted].double().numpy())
    return np.concatenate(scores), np.concatenate(ious)


def localization(dataset: Dataset, detections: Sequence[ImageDetections]) -> Localization:
    """The figures of one run's detections."""
    scores, ious = scores_and_ious(dataset, detections)
    kept = ious >= EDGES[0]
    scores, ious = scores[kept], ious[kept]
    bins = np.clip(np.digitize(ious, EDGES) - 1, 0, len(EDGES) - 2)
    groups = [scores[bins == b] for b in range(len(EDGES) - 1)]
    constant = len(scores) < 3 or scores.min() == scores.max() or ious.min() == ious.max()
    return Localization(
        count=len(scores),
        score_by_iou=[float(group.mean()) if len(group) else None for group in groups],
        counts_by_iou=[len(group) for group in groups],
        share_above=[float((ious >= edge).mean()) if len(ious) else 0.0 for edge in EDGES[:-1]],
        rank_correlation=None if constant else float(stats.spearmanr(scores, ious).statistic),
    )
