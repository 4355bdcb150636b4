"""Average precision by pycocotools, read where the paper reads it: AP50, 60, 70, 75, 80, 90, by size and by class; for
Pascal VOC also its own 11-point metric.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data import BadImageError, Dataset, to_coco_dict
from .errors import UsageError
from .progress import Reporter
from .voc_metric import voc07_metrics

THRESHOLDS = tuple(round(0.5 + 0.05 * t, 2) for t in range(10))
MAIN_METRICS = ("AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90", "APs", "APm", "APl")
_AREAS = {"all": 0, "small": 1, "medium": 2, "large": 3}


@dataclass
class ImageDetections:
    """Detections of one image in the pixels of its file.

    Attributes:
        image_id: `ImageRecord.id`.
        boxes: float (D, 4), x1 y1 x2 y2.
        scores: float (D,).
        labels: int (D,), 0 .. K-1.
    """

    image_id: int
    boxes: Tensor
    scores: Tensor
    labels: Tensor


def evaluate_detections(
    dataset: Dataset,
    detections: Iterable[ImageDetections],
    *,
    max_detections: int | None = None,
    voc07: bool | None = None,
) -> dict[str, Any]:
    """COCO metrics of detections on a dataset.

    Args:
        dataset: ground truth; crowd regions and VOC's difficult boxes are ignored.
        detections: at most one entry per image counts: a second one for the same image (a distributed sampler pads with
            repeated images) is dropped. Images without an entry count as images without detections.
        max_detections: of an image and class, the best-scored, that count. None: 100 as COCO has it, however many a
            model leaves, and all for VOC's metric.
        voc07: also the 11-point metric of Pascal VOC 2007; None: for Pascal VOC folders.

    Returns:
        MAIN_METRICS as floats in [0, 1] (None where there is no ground truth to measure on), "AR", "thresholds"
        {"0.50": AP}, "per_class" {name: {AP, AP50, AP75, boxes}}, and the counts "images", "boxes", "detections". With
        `voc07` also "VOC07", the dict of `voc07_metrics`.

    Raises:
        UsageError: the dataset has no annotations; NaN or infinite boxes or scores, unknown images or labels, wrong
            shapes.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not dataset.labelled:
        raise UsageError(
            f"evaluate_detections: dataset: expected annotations to measure with, split {dataset.split!r} of "
            f"{dataset.root} has none"
        )
    results = _as_coco_results(dataset, detections)
    truth_dict = to_coco_dict(dataset)
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        truth.dataset = truth_dict
        truth.createIndex()
        # Not loadRes: it fails with an IndexError when there are no detections at all.
        found.dataset = {"images": truth_dict["images"], "categories": truth_dict["categories"], "annotations": results}
        found.createIndex()
        coco_eval = COCOeval(truth, found, "bbox")
        coco_eval.params.maxDets = [100 if max_detections is None else max_detections]
        coco_eval.evaluate()
        coco_eval.accumulate()
    precision, recall = coco_eval.eval["precision"], coco_eval.eval["recall"]
    metrics: dict[str, Any] = {"AP": _mean(precision[:, :, :, 0, -1])}
    for percent in (50, 60, 70, 75, 80, 90):
        # By index: the list of thresholds holds 0.8999999999999999, so that looking for 0.9 in it finds nothing.
        metrics[f"AP{percent}"] = _mean(precision[(percent - 50) // 5, :, :, 0, -1])
    for area in ("small", "medium", "large"):
        metrics[f"AP{area[0]}"] = _mean(precision[:, :, :, _AREAS[area], -1])
    metrics["AR"] = _mean(recall[:, :, 0, -1])
    metrics["thresholds"] = {f"{t:.2f}": _mean(precision[i, :, :, 0, -1]) for i, t in enumerate(THRESHOLDS)}
    counted = [a for a in truth_dict["annotations"] if not a["iscrowd"]]
    metrics["per_class"] = {
        name: {
            "AP": _mean(precision[:, :, k, 0, -1]),
            "AP50": _mean(precision[0, :, k, 0, -1]),
            "AP75": _mean(precision[5, :, k, 0, -1]),
            "boxes": sum(a["category_id"] == k + 1 for a in counted),
        }
        for k, name in enumerate(dataset.classes)
    }
    metrics.update(images=len(dataset), boxes=len(counted), detections=len(results))
    if voc07 if voc07 is not None else dataset.format == "voc":
        metrics["VOC07"] = _voc07(dataset, results, max_detections)
    return metrics


def _voc07(dataset: Dataset, results: list[dict[str, Any]], max_detections: int | None) -> dict[str, Any]:
    # The devkit's stable sort sees detections in the order of the images.
    position = {record.id: k for k, record in enumerate(dataset.records)}
    count = len(results)
    images = np.fromiter((position[item["image_id"]] for item in results), np.int64, count)
    boxes = np.array([item["bbox"] for item in results], np.float64).reshape(count, 4)
    boxes[:, 2:] += boxes[:, :2]
    return voc07_metrics(
        dataset,
        images,
        boxes,
        np.fromiter((item["score"] for item in results), np.float64, count),
        np.fromiter((item["category_id"] - 1 for item in results), np.int64, count),
        max_detections=max_detections,
    )


def without_unread(
    dataset: Dataset, detections: Sequence[ImageDetections], limit: float, reporter: Reporter
) -> Dataset:
    """The images that could be read: those with an entry, even one without boxes. The others (data.on_bad_image: skip)
    are no misses of the model; they are named.

    Args:
        limit: data.bad_image_limit, the share of images that may be missing.

    Raises:
        BadImageError: more are.
    """
    found = {item.image_id for item in detections}
    names = [record.name for record in dataset.records if record.id not in found]
    if not names:
        return dataset
    allowed = dataset.most_bad_images(limit)
    if len(names) > allowed:
        raise BadImageError(
            f"evaluation: expected at most {allowed} bad images of {len(dataset)} with on_bad_image='skip'", names
        )
    reporter.warn(f"{len(names)} of {len(dataset)} images could not be read and are left out: {', '.join(names[:20])}")
    return replace(dataset, records=[record for record in dataset.records if record.id in found])


def _mean(values: np.ndarray) -> float | None:
    """Mean of the entries that exist; pycocotools marks what has no ground truth by -1."""
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else None


def once_an_image(
    op: str, dataset: Dataset, detections: Iterable[ImageDetections]
) -> Iterator[tuple[str, ImageDetections]]:
    """The first entry of each image, with the words that an error about it begins with.

    Raises:
        UsageError: an image that the dataset does not have.
    """
    known = {record.id for record in dataset.records}
    seen: set[int] = set()
    for item in detections:
        where = f"{op}: image {item.image_id}"
        if item.image_id not in known:
            raise UsageError(f"{where}: expected an image of split {dataset.split!r}, got an id that is not in it")
        if item.image_id not in seen:
            seen.add(item.image_id)
            yield where, item


def _as_coco_results(dataset: Dataset, detections: Iterable[ImageDetections]) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for where, item in once_an_image("evaluate_detections", dataset, detections):
        count = item.scores.shape[0]
        if item.boxes.shape != (count, 4) or item.scores.ndim != 1 or item.labels.shape != (count,):
            raise UsageError(
                f"{where}: expected boxes (D, 4), scores (D,), labels (D,), got {tuple(item.boxes.shape)}, "
                f"{tuple(item.scores.shape)}, {tuple(item.labels.shape)}"
            )
        for name, values in (("boxes", item.boxes), ("scores", item.scores)):
            if not torch.isfinite(values).all():
                # pycocotools would take a NaN score for the best of all.
                raise UsageError(f"{where}: {name}: expected finite numbers, got NaN or infinity")
        labels = item.labels.tolist()
        if any(not 0 <= label < dataset.num_classes for label in labels):
            raise UsageError(
                f"{where}: labels: expected 0 .. {dataset.num_classes - 1}, got {min(labels)} .. {max(labels)}"
            )
        for (x1, y1, x2, y2), score, label in zip(
            item.boxes.double().tolist(), item.scores.tolist(), labels, strict=True
        ):
            results.append(
                {
                    "id": len(results) + 1,
                    "image_id": item.image_id,
                    "category_id": label + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "score": score,
                    "iscrowd": 0,
                }
            )
    return results


def percent(value: float | None) -> str:
    """A metric for people: 0.5 as "50.0", None as "-"."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"
