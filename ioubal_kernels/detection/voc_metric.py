"""The metric of Pascal VOC 2007, average precision at 11 recalls, at IoU 0.5 to 0.95 as in the paper's Table 5.

The rules are those of the VOC 2007 development kit (VOCevaldet.m). Its overlap counts pixels with + 1; the boxes here
have x1 = xmin - 1 and y1 = ymin - 1, so that plain areas are the same numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .data import Dataset

PERCENTS = tuple(range(50, 100, 5))


def voc07_metrics(
    dataset: Dataset,
    images: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    *,
    max_detections: int | None = None,
) -> dict[str, Any]:
    """11-point average precision of D detections.

    The detections of a class over all images are taken by falling score, equal scores in the order given. Each takes
    the ground truth of its class and image with the largest IoU (the first of several). Below the threshold it is a
    false positive; if that ground truth is difficult (or a crowd region), it does not count at all; if an earlier
    detection had it, it is a false positive, else a true positive. AP is the mean over the recalls 0, 0.1 .. 1 of
    the largest precision at that recall or a higher one. Recalls are compared exactly: tp / G >= k / 10.

    Args:
        dataset: the ground truth.
        images: int64 (D,), position of the image in `dataset.records`.
        boxes: float64 (D, 4), x1 y1 x2 y2 in pixels of the file.
        scores: float64 (D,).
        labels: int64 (D,), 0 .. K-1.
        max_detections: the best-scored of each image and class that count; None: all.

    Returns:
        "AP50", "AP55" .. "AP95": the means over the classes that have ground truth which is not difficult; "AP": the
        mean of these ten; "per_class": {name: AP50}. None where there is no ground truth.
    """
    table = np.full((len(PERCENTS), dataset.num_classes), np.nan)
    truth = _ground_truth(dataset)
    for k in range(dataset.num_classes):
        chosen, counted = labels == k, truth["labels"] == k
        table[:, k] = _class_ap(
            images[chosen], boxes[chosen], scores[chosen], truth["images"][counted], truth["boxes"][counted],
            truth["ignored"][counted], max_detections,
        )  # fmt: skip
    means = [float(row[~np.isnan(row)].mean()) if (~np.isnan(row)).any() else None for row in table]
    result: dict[str, Any] = {"AP": None if None in means else float(np.mean(means))}
    result.update({f"AP{percent}": mean for percent, mean in zip(PERCENTS, means, strict=True)})
    result["per_class"] = {
        name: None if np.isnan(table[0, k]) else float(table[0, k]) for k, name in enumerate(dataset.classes)
    }
    return result


def _ground_truth(dataset: Dataset) -> dict[str, np.ndarray]:
    """All boxes of all images; `images` rises."""
    records = dataset.records
    counts = [len(record.labels) for record in records]
    none = np.zeros(0)
    return {
        "images": np.repeat(np.arange(len(records)), counts),
        "boxes": np.concatenate([none.reshape(0, 4), *(record.boxes for record in records)]).astype(np.float64),
        "labels": np.concatenate([none, *(record.labels for record in records)]).astype(np.int64),
        "ignored": ~np.concatenate([none, *(record.trainable for record in records)]).astype(bool),
    }


def _class_ap(
    images: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
    truth_images: np.ndarray,
    truth_boxes: np.ndarray,
    ignored: np.ndarray,
    max_detections: int | None,
) -> np.ndarray:
    """AP (10,) of one class, by threshold; NaN without ground truth."""
    total = int((~ignored).sum())
    if total == 0:
        return np.full(len(PERCENTS), np.nan)
    order = np.argsort(-scores, kind="stable")
    if max_detections is not None:
        order = order[_rank_in_image(images[order]) < max_detections]
    best, overlap = _best_truth(images[order], boxes[order], truth_images, truth_boxes)
    result = np.zeros(len(PERCENTS))
    for t, percent in enumerate(PERCENTS):
        hit = overlap >= percent / 100
        counts = ~(hit & ignored[best])
        positive = np.zeros(len(order), dtype=bool)
        rows = np.flatnonzero(hit & counts)
        # The first of those that chose the same ground truth.
        positive[rows[np.unique(best[rows], return_index=True)[1]]] = True
        result[t] = _eleven_points(positive[counts], total)
    return result


def _rank_in_image(images: np.ndarray) -> np.ndarray:
    """For each detection, how many of its image come before it."""
    grouped = np.argsort(images, kind="stable")
    ordered = images[grouped]
    first = np.searchsorted(ordered, ordered, side="left")
    rank = np.empty(len(images), dtype=np.int64)
    rank[grouped] = np.arange(len(images)) - first
    return rank


def _best_truth(
    images: np.ndarray, boxes: np.ndarray, truth_images: np.ndarray, truth_boxes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Index (D,) of the ground truth of the same image with the largest IoU, the first of several, and that IoU.

    An image without ground truth gives index 0 and IoU -1.
    """
    best, overlap = np.zeros(len(images), dtype=np.int64), np.full(len(images), -1.0)
    start = np.searchsorted(truth_images, images, side="left")
    count = np.searchsorted(truth_images, images, side="right") - start
    rows = np.flatnonzero(count)
    if len(rows) == 0:
        return best, overlap
    start, count = start[rows], count[rows]
    # All pairs of a detection and a ground truth of its image, one detection's after another's.
    first = np.cumsum(count) - count
    inner = np.arange(int(count.sum())) - np.repeat(first, count)
    mine, other = boxes[np.repeat(rows, count)], truth_boxes[np.repeat(start, count) + inner]
    extent = np.minimum(mine[:, 2:], other[:, 2:]) - np.maximum(mine[:, :2], other[:, :2])
    inter = extent.clip(min=0).prod(axis=1)
    # A detection without extent has area 0, also an inverted one.
    area = (mine[:, 2:] - mine[:, :2]).clip(min=0).prod(axis=1) + (other[:, 2:] - other[:, :2]).prod(axis=1)
    iou = inter / (area - inter)
    top = np.maximum.reduceat(iou, first)
    place = np.where(iou == np.repeat(top, count), inner, len(truth_images))
    best[rows], overlap[rows] = start + np.minimum.reduceat(place, first), top
    return best, overlap


def _eleven_points(positive: np.ndarray, total: int) -> float:
    """AP of a ranking: bool (D,), true positives among what counts, best score first; `total` ground truths."""
    if len(positive) == 0:
        return 0.0
    hits = np.cumsum(positive)
    precision = hits / np.arange(1, len(positive) + 1)
    # The largest precision from here on.
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    # Where recall k / 10 is reached first; hits rise, so that is a search.
    places = np.searchsorted(hits * 10, np.arange(11) * total, side="left")
    return float(np.where(places < len(hits), envelope[np.minimum(places, len(hits) - 1)], 0.0).sum() / 11)
