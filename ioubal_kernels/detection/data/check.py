"""Checks of a dataset: a quick one at start-up, a full one that opens every image."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .detect import Layout, default_split, describe, find_layout, load_dataset
from .files import MAX_PIXELS, FileGuard, decode_rgb, exif_orientation, file_problems
from .records import TURNED, BadImageError, DataError, Dataset, ImageRecord, format_problems

NEAR_DUPLICATE_IOU = 0.8
EXTREME_RATIO = 20.0


@dataclass
class CheckReport:
    """What `check_dataset` found: `ok` is False if there are problems, `text` is for people, `stats` is JSON data."""

    ok: bool
    problems: list[str]
    warnings: list[str]
    stats: dict[str, Any] = field(default_factory=dict)
    text: str = ""


def quick_check(dataset: Dataset, *, max_pixels: int = MAX_PIXELS, allow_symlinks: bool = False) -> None:
    """Every image file exists, is a regular JPEG, PNG or WebP file and has the annotated size; nothing is decoded.

    Raises:
        DataError: all findings, the first 20 shown.
    """
    problems = file_problems(dataset.records, dataset.root, max_pixels=max_pixels, allow_symlinks=allow_symlinks)
    if problems:
        raise DataError(f"dataset {dataset.root}, split {dataset.split!r}: image files", problems)


def check_dataset(
    root: str | os.PathLike[str],
    kind: str = "auto",
    *,
    splits: tuple[str, ...] | None = None,
    max_pixels: int = MAX_PIXELS,
    allow_symlinks: bool = False,
    workers: int | None = None,
) -> CheckReport:
    """The full check of `ioubal data check`: annotations of every split, every image decoded, statistics, duplicates.

    Problems: whatever would stop a training run. Warnings: near-duplicate boxes (same class, IoU >= 0.8), the same
    picture twice in a split or in splits that share no image names (train and val), images with an orientation tag,
    classes without boxes, boxes to train on with a side below 1 pixel, of the whole image, or more than 20 times as
    long as wide.

    Args:
        root, kind, allow_symlinks: as in `load_dataset`.
        splits: only these; None takes all, except test splits without annotations.
        max_pixels: refuse larger images.
        workers: threads for decoding; None takes one per CPU.

    Raises:
        DataError: there is no dataset in `root`, or no such split.
    """
    layout = find_layout(root, kind)
    unknown = [split for split in splits or () if split not in layout.splits]
    if unknown:
        raise DataError(
            f"dataset {layout.root}: splits: expected some of {', '.join(layout.splits)}, got {', '.join(unknown)}"
        )
    problems: list[str] = []
    warnings: list[str] = []
    datasets: list[Dataset] = []
    for split in splits or layout.splits:
        try:
            # Test annotations are often not public; any other split without them is a problem.
            if splits is None and "test" in split and not layout.annotated(split):
                warnings.append(f"split {split}: it has no annotations and was not checked")
                continue
            datasets.append(load_dataset(root, split, kind, check_files=False, allow_symlinks=allow_symlinks))
        except DataError as error:
            found = [f"{error.what}: {problem}" for problem in error.problems] or [str(error)]
            # Splits share files (a VOC folder's annotations): the same finding counts once.
            problems = list(dict.fromkeys(problems + found))
    if len({dataset.classes for dataset in datasets}) > 1:
        names = "; ".join(f"{dataset.split}: {', '.join(dataset.classes)}" for dataset in datasets)
        warnings.append(f"the splits have different classes: {names}")
    problems += _training_problems(layout, datasets)
    digests = _check_images(datasets, max_pixels, allow_symlinks, workers, problems, warnings)
    warnings += _same_pictures(datasets, digests)
    stats = {}
    for dataset in datasets:
        stats[dataset.split] = statistics(dataset)
        warnings += _annotation_warnings(dataset, stats[dataset.split])
    text = _text(layout.root, datasets, stats, problems, warnings)
    return CheckReport(not problems, problems, warnings, stats, text)


def _training_problems(layout: Layout, datasets: list[Dataset]) -> list[str]:
    """What keeps training, by default, from using splits that are all right in themselves."""
    by_split = {dataset.split: dataset for dataset in datasets}
    training, evaluation = (by_split.get(default_split(layout, role) or "") for role in ("train", "eval"))
    if training is None:
        return []
    problems = []
    if not training.num_train_boxes:
        problems.append(f"split {training.split}: it has no box to train on")
    extra = [] if evaluation is None else [name for name in evaluation.classes if name not in training.classes]
    if extra:
        problems.append(f"split {evaluation.split}: classes that {training.split} does not have: {', '.join(extra)}")
    return problems


def _check_images(
    datasets: list[Dataset],
    max_pixels: int,
    allow_symlinks: bool,
    workers: int | None,
    problems: list[str],
    warnings: list[str],
) -> dict[str, str]:
    """Decodes every image once; returns the SHA-256 of the files that are all right, by path."""
    records = {record.path: record for dataset in datasets for record in dataset.records}
    guards = {record.path: dataset.root for dataset in datasets for record in dataset.records}
    guard_of = {root: FileGuard(root, allow_symlinks) for root in set(guards.values())}

    def one(record: ImageRecord) -> tuple[str, str | None, str | None, int]:
        reason = guard_of[guards[record.path]].problem(record.path)
        if reason:
            return record.path, None, f"image {record.path}: {reason}", 1
        try:
            decode_rgb(record, max_pixels)
            with open(record.path, "rb") as file:
                digest = (
                    hashlib.file_digest(file, "sha256")
                    if hasattr(hashlib, "file_digest")
                    else hashlib.sha256(file.read())
                )
            return record.path, digest.hexdigest(), None, exif_orientation(record.path, max_pixels)
        except BadImageError as error:
            return record.path, None, str(error), 1
        except OSError as error:
            return record.path, None, f"image {record.path}: cannot be read: {error.strerror or error}", 1

    digests: dict[str, str] = {}
    turned: list[str] = []
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for path, digest, problem, orientation in pool.map(one, records.values()):
            if problem is not None:
                problems.append(problem)
            if digest is not None:
                digests[path] = digest
            if orientation != 1:
                turned.append(records[path].name)
    if turned:
        warnings.append(f"{TURNED}: {len(turned)} ({_some(turned)})")
    return digests


def _same_pictures(datasets: list[Dataset], digests: dict[str, str]) -> list[str]:
    """Files with equal content under different names, and files that two unrelated splits share."""
    splits_of: dict[str, list[tuple[str, str]]] = {}
    for dataset in datasets:
        for record in dataset.records:
            if record.path in digests:
                splits_of.setdefault(digests[record.path], []).append((dataset.split, record.name))
    nested = _nested_splits(datasets)
    inside: list[str] = []
    across: list[str] = []
    for found in splits_of.values():
        for split in dict.fromkeys(split for split, _ in found):
            names = [name for other, name in found if other == split]
            if len(names) > 1:
                inside.append(f"{split}: {' = '.join(names[:3])}")
        for k, (split, name) in enumerate(found):
            for other, other_name in found[k + 1 :]:
                if split != other and frozenset((split, other)) not in nested:
                    across.append(f"{split}: {name} = {other}: {other_name}")
    result = []
    if inside:
        result.append(f"pictures that occur more than once in a split: {len(inside)} ({_some(inside)})")
    if across:
        result.append(f"pictures in two splits that should have none in common: {len(across)} ({_some(across)})")
    return result


def _nested_splits(datasets: list[Dataset]) -> set[frozenset[str]]:
    """Pairs of splits of which one is meant to hold the other, as trainval holds train."""
    paths = {dataset.split: {record.path for record in dataset.records} for dataset in datasets}
    return {
        frozenset((a, b)) for a in paths for b in paths if a != b and (paths[a] <= paths[b] or paths[b] <= paths[a])
    }


def _annotation_warnings(dataset: Dataset, stats: dict[str, Any]) -> list[str]:
    result = [f"split {dataset.split}: {line}" for line in dataset.notes.lines()]
    pairs = [(record.name, count) for record in dataset.records if (count := near_duplicates(record))]
    if pairs:
        total = sum(count for _, count in pairs)
        result.append(
            f"split {dataset.split}: near-duplicate box pairs: {total} ({_some([name for name, _ in pairs])})"
        )
    for what, count_of in _SUSPICIOUS.items():
        found = {record.name: count for record in dataset.records if (count := count_of(record))}
        if found:
            result.append(f"split {dataset.split}: {what}: {sum(found.values())} ({_some(list(found))})")
    if not dataset.labelled:
        return result
    missing = [name for name, count in stats["boxes_by_class"].items() if count == 0]
    if missing:
        result.append(f"split {dataset.split}: classes without boxes: {', '.join(missing)}")
    return result


def _sides(record: ImageRecord) -> tuple[np.ndarray, np.ndarray]:
    """float64 (G',) widths and heights of the boxes to train on."""
    boxes = record.train_boxes.astype(np.float64)
    return boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]


def tiny_boxes(record: ImageRecord) -> int:
    """Boxes to train on with a side below one pixel of the file."""
    width, height = _sides(record)
    return int((np.minimum(width, height) < 1).sum())


def whole_image_boxes(record: ImageRecord) -> int:
    """Boxes to train on that are the whole image."""
    width, height = _sides(record)
    return int(((width >= record.width) & (height >= record.height)).sum())


def extreme_boxes(record: ImageRecord) -> int:
    """Boxes to train on of which one side is more than 20 times the other."""
    width, height = _sides(record)
    return int((np.maximum(width, height) > EXTREME_RATIO * np.minimum(width, height)).sum())


_SUSPICIOUS = {
    "boxes with a side below 1 pixel": tiny_boxes,
    "boxes that are the whole image": whole_image_boxes,
    f"boxes more than {EXTREME_RATIO:g} times as long as wide": extreme_boxes,
}


def near_duplicates(record: ImageRecord, threshold: float = NEAR_DUPLICATE_IOU) -> int:
    """Pairs of an image's boxes of the same class with an IoU of at least `threshold`."""
    boxes, labels = record.train_boxes.astype(np.float64), record.train_labels
    if len(boxes) < 2:
        return 0
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    inter = (high - low).clip(min=0).prod(axis=2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    iou = inter / (area[:, None] + area[None, :] - inter)
    return int(np.triu((iou >= threshold) & (labels[:, None] == labels[None, :]), 1).sum())


def statistics(dataset: Dataset) -> dict[str, Any]:
    """Counts and quantiles of one split, plain JSON data; sizes in pixels of the files."""
    boxes = dataset.all_boxes()
    sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1)) if len(boxes) else np.zeros(0)
    per_image = [int(record.trainable.sum()) for record in dataset.records]
    counts = Counter(int(label) for record in dataset.records for label in record.train_labels)
    levels = (0.0, 0.1, 0.5, 0.9, 1.0)
    return {
        "images": len(dataset),
        "boxes": dataset.num_boxes,
        "train_boxes": dataset.num_train_boxes,
        "boxes_by_class": {name: counts.get(k, 0) for k, name in enumerate(dataset.classes)},
        "boxes_per_image": {f"{level:g}": float(np.quantile(per_image, level)) for level in levels}
        if per_image
        else {},
        "box_side": {f"{level:g}": round(float(np.quantile(sides, level)), 2) for level in levels}
        if len(sides)
        else {},
        "image_sizes": {
            f"{width}x{height}": count
            for (width, height), count in Counter((r.width, r.height) for r in dataset.records).most_common(5)
        },
        "images_without_boxes": sum(1 for count in per_image if count == 0),
        "notes": dataset.notes.counts(),
    }


def _some(names: list[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


def _text(root: str, datasets: list[Dataset], stats: dict[str, Any], problems: list[str], warnings: list[str]) -> str:
    lines = [describe(*datasets)] if datasets else [f"dataset  {root}"]
    for split, values in stats.items():
        if values["box_side"]:
            sides = ", ".join(f"{value:g}" for value in values["box_side"].values())
            lines.append(f"{split}: box side (square root of the area), pixels, at 0, 10, 50, 90, 100 %: {sides}")
        lines.append(f"{split}: boxes by class: " + ", ".join(f"{k} {v}" for k, v in values["boxes_by_class"].items()))
    if warnings:
        lines.append(format_problems("warnings", warnings).replace("problem", "warning", 1))
    lines.append(format_problems("problems", problems) if problems else "no problems")
    return "\n".join(lines)
