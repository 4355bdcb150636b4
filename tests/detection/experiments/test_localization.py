"""Scores against IoU, on boxes whose overlap is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ioubal_kernels.detection.data import Dataset, make_record
from ioubal_kernels.detection.evaluate import ImageDetections
from ioubal_kernels.experiments.localization import localization, scores_and_ious


def dataset(**ignored) -> Dataset:
    records = [
        make_record(
            id=1,
            name="a.png",
            path="a.png",
            width=100,
            height=100,
            boxes=[[0, 0, 10, 10], [50, 50, 60, 60]],
            labels=[0, 1],
            **ignored,
        ),
        make_record(id=2, name="b.png", path="b.png", width=100, height=100, boxes=[], labels=[]),
    ]
    return Dataset(".", "coco", "val", ("one", "two"), (1, 2), records)


def found(image: int, *rows: tuple[list[float], float, int]) -> ImageDetections:
    boxes, scores, labels = zip(*rows) if rows else ((), (), ())
    return ImageDetections(
        image, torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels, dtype=torch.int64)
    )


def test_the_best_box_of_the_class_counts():
    detections = [
        found(1, ([0.0, 0, 10, 8], 0.9, 0), ([0.0, 0, 10, 8], 0.8, 1), ([50.0, 50, 60, 56], 0.4, 1)),
        found(2, ([1.0, 1, 5, 5], 0.7, 0)),
    ]
    scores, ious = scores_and_ious(dataset(), detections)
    np.testing.assert_allclose(scores, [0.9, 0.8, 0.4, 0.7], rtol=1e-6)
    np.testing.assert_allclose(ious, [0.8, 0.0, 0.6, 0.0], rtol=1e-6)


@pytest.mark.parametrize("flag", ["iscrowd", "difficult"])
def test_what_evaluation_ignores_is_left_out(flag):
    detections = [found(1, ([0.0, 0, 10, 8], 0.9, 0), ([50.0, 50, 60, 56], 0.4, 1))]
    scores, _ = scores_and_ious(dataset(**{flag: [True, False]}), detections)
    np.testing.assert_allclose(scores, [0.4], rtol=1e-6)


def test_bins_shares_and_rank_correlation():
    rows = [([0.0, 0, 10, iou * 10], score, 0) for iou, score in ((0.52, 0.2), (0.72, 0.4), (0.74, 0.6), (0.97, 0.9))]
    figures = localization(dataset(), [found(1, *rows, ([0.0, 0, 10, 3], 0.99, 0))])
    assert figures.count == 4  # IoU 0.3 is no localisation of the box
    assert figures.counts_by_iou == [1, 0, 0, 0, 2, 0, 0, 0, 0, 1]
    assert figures.score_by_iou[0] == pytest.approx(0.2)
    assert figures.score_by_iou[1] is None
    assert figures.score_by_iou[4] == pytest.approx(0.5)
    assert figures.share_above == pytest.approx([1, 0.75, 0.75, 0.75, 0.75, 0.25, 0.25, 0.25, 0.25, 0.25])
    assert figures.rank_correlation == pytest.approx(1.0)
    falling = [(box, 1 - score, label) for box, score, label in rows]
    assert localization(dataset(), [found(1, *falling)]).rank_correlation == pytest.approx(-1.0)


def test_nothing_found():
    figures = localization(dataset(), [])
    assert (figures.count, figures.rank_correlation) == (0, None)
    assert figures.share_above == [0.0] * 10
    assert localization(dataset(), [found(2)]).count == 0
