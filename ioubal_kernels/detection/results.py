"""Detections on disk: a COCO result file, which evaluation servers and `pycocotools.coco.COCO.loadRes` take, and a
run's own file of arrays.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .checkpoint import atomic_write, atomic_write_text
from .data import Dataset
from .errors import OutputError, UsageError
from .evaluate import ImageDetections, once_an_image

DETECTIONS_FILE = "detections.npz"


def save_detections(path: Path, detections: Sequence[ImageDetections]) -> None:
    """Write detections as arrays of numbers (compressed): `image_ids` and `counts` by image, `boxes` (D, 4) float32,
    `scores` (D,) float32 and `labels` (D,) int32 of all images in that order.

    Raises:
        OutputError: the file cannot be written; an earlier one is as it was.
    """
    arrays = {
        "image_ids": np.array([item.image_id for item in detections], np.int64),
        "counts": np.array([len(item.scores) for item in detections], np.int64),
        "boxes": np.concatenate([np.zeros((0, 4)), *(item.boxes.numpy() for item in detections)]).astype(np.float32),
        "scores": np.concatenate([np.zeros(0), *(item.scores.numpy() for item in detections)]).astype(np.float32),
        "labels": np.concatenate([np.zeros(0), *(item.labels.numpy() for item in detections)]).astype(np.int32),
    }
    atomic_write(path, lambda file: np.savez_compressed(file, **arrays))


def load_detections(path: Path) -> list[ImageDetections]:
    """What `save_detections` wrote.

    Raises:
        UsageError: it is not there or not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            ids, counts, boxes, scores, labels = (
                found[name] for name in ("image_ids", "counts", "boxes", "scores", "labels")
            )
        if counts.sum() != len(scores) or boxes.shape != (len(scores), 4) or labels.shape != scores.shape:
            raise ValueError("its arrays do not fit together")
        ends = np.cumsum(counts).tolist()
        return [
            ImageDetections(image, *(torch.from_numpy(part[end - count : end]) for part in (boxes, scores, labels)))
            for image, count, end in zip(ids.tolist(), counts.tolist(), ends, strict=True)
        ]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: not the detections of a run: {error}") from error


def coco_results(dataset: Dataset, detections: Iterable[ImageDetections]) -> list[dict[str, Any]]:
    """Detections in the dataset's own ids.

    Args:
        dataset: gives the image ids (`ImageRecord.source_id`) and category ids (`Dataset.category_ids`).
        detections: by image; a second entry for an image is dropped.

    Returns:
        A list of {"image_id", "category_id", "bbox", "score"}; bbox is x, y, width, height in pixels of the file, with
        two decimals, the score has five.

    Raises:
        UsageError: an image or a label that the dataset does not have, NaN or infinite values.
    """
    ids = {record.id: record.source_id for record in dataset.records}
    result = []
    for where, item in once_an_image("coco_results", dataset, detections):
        if not (torch.isfinite(item.boxes).all() and torch.isfinite(item.scores).all()):
            raise UsageError(f"{where}: boxes, scores: expected finite numbers, got NaN or infinity")
        labels = item.labels.tolist()
        if any(not 0 <= label < dataset.num_classes for label in labels):
            raise UsageError(f"{where}: labels: expected 0 .. {dataset.num_classes - 1}, got {labels}")
        for (x1, y1, x2, y2), score, label in zip(
            item.boxes.double().tolist(), item.scores.double().tolist(), labels, strict=True
        ):
            result.append(
                {
                    "image_id": ids[item.image_id],
                    "category_id": dataset.category_ids[label],
                    "bbox": [round(x1, 2), round(y1, 2), round(x2 - x1, 2), round(y2 - y1, 2)],
                    "score": round(score, 5),
                }
            )
    return result


def check_results_path(path: Path) -> None:
    """Fail before hours of inference when the result file could not be written, or would replace anything else.

    Raises:
        OutputError: its folder does not exist, it is a folder, or a file that is no list of results.
    """
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; expected the name of a JSON file")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.exists() and not _holds_results(path):
        raise OutputError(f"cannot write {path}: it exists and holds no COCO results, which alone are replaced")


def _holds_results(path: Path) -> bool:
    """Whether a file begins as `save_coco_results` begins one (or is empty)."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return False
    return start.split() in ([], [b"[]"]) or start.startswith((b'[{"image_id"', b'[{"category_id"'))


def save_coco_results(path: Path, dataset: Dataset, detections: Iterable[ImageDetections]) -> int:
    """Write `coco_results` to `path`, atomically; returns the number of detections.

    Raises:
        UsageError: as `coco_results`.
        OutputError: the file cannot be written; an earlier one is as it was.
    """
    results = coco_results(dataset, detections)
    # One detection a line: as large as without, and readable by line-based tools.
    atomic_write_text(path, "[" + ",\n".join(json.dumps(item, allow_nan=False) for item in results) + "]\n")
    return len(results)
