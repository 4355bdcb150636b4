"""The in-memory form of a detection dataset, whatever file format it came from.

Boxes are x1 y1 x2 y2 in pixels of the stored image, clipped to it, never empty. Labels run from 0 to K - 1 in the
order of `Dataset.classes`. Arrays are NumPy: they are small, pickle fast and stay shared between forked loader
workers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MAX_SHOWN = 20
"""How many problems an error message spells out; the rest is counted."""


class DataError(ValueError):
    """Something is wrong with a dataset. `problems` has every single finding, the message shows the first 20.

    Args:
        what: one line: which dataset, file or step.
        problems: the findings, each one naming file, item, expected and got.
    """

    def __init__(self, what: str, problems: Sequence[str] = ()) -> None:
        self.what = what
        self.problems = tuple(problems)
        super().__init__(format_problems(what, self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.problems)


class BadImageError(DataError):
    """An image file that cannot be used: missing, truncated, not an image, too large, or of an unexpected size."""


def format_problems(what: str, problems: Sequence[str]) -> str:
    """The text of a list of problems: the first 20, then how many more."""
    if not problems:
        return what
    count = len(problems)
    lines = [f"{what}: {count} problem{'s' if count > 1 else ''}"]
    lines += [f"  - {problem}" for problem in problems[:MAX_SHOWN]]
    if count > MAX_SHOWN:
        lines.append(f"  ... and {count - MAX_SHOWN} more ({count} in total)")
    return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One image and its annotations.

    Attributes:
        id: integer, unique in the dataset; the image id in `to_coco_dict` and in evaluation.
        name: how the dataset calls it (COCO `file_name`, VOC id).
        path: absolute path of the image file.
        width, height: pixels of the stored image.
        boxes: float32 (G, 4), x1 y1 x2 y2.
        labels: int64 (G,), 0 .. K-1.
        iscrowd: bool (G,), a region of many objects (COCO): not trained on, ignored in evaluation.
        difficult: bool (G,), VOC's flag: not trained on, ignored in evaluation.
        areas: float32 (G,), object area in pixels (COCO `area`, else width times height of the box).
        source_id: the id in the file when it is not `id` itself (string ids), for result files.
    """

    id: int
    name: str
    path: str
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    iscrowd: np.ndarray
    difficult: np.ndarray
    areas: np.ndarray
    source_id: int | str | None = None

    @property
    def trainable(self) -> np.ndarray:
        """bool (G,): the boxes to train on, neither crowd nor difficult."""
        return ~(self.iscrowd | self.difficult)

    @property
    def train_boxes(self) -> np.ndarray:
        """float32 (G', 4): the boxes to train on."""
        return self.boxes[self.trainable]

    @property
    def train_labels(self) -> np.ndarray:
        """int64 (G',): the labels of `train_boxes`."""
        return self.labels[self.trainable]


def make_record(
    *,
    id: int,
    name: str,
    path: str,
    width: int,
    height: int,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    iscrowd: Sequence[bool] | None = None,
    difficult: Sequence[bool] | None = None,
    areas: Sequence[float] | None = None,
    source_id: int | str | None = None,
) -> ImageRecord:
    """An `ImageRecord` from plain lists, with the dtypes it promises; missing flags are False, missing areas w * h."""
    count = len(boxes)
    array = np.asarray(boxes, dtype=np.float32).reshape(count, 4)
    if areas is None:
        areas_array = (array[:, 2] - array[:, 0]) * (array[:, 3] - array[:, 1])
    else:
        areas_array = np.asarray(areas, dtype=np.float32)
    return ImageRecord(
        id=id,
        name=name,
        path=path,
        width=width,
        height=height,
        boxes=array,
        labels=np.asarray(labels, dtype=np.int64).reshape(count),
        iscrowd=np.zeros(count, dtype=bool) if iscrowd is None else np.asarray(iscrowd, dtype=bool),
        difficult=np.zeros(count, dtype=bool) if difficult is None else np.asarray(difficult, dtype=bool),
        areas=areas_array,
        source_id=id if source_id is None else source_id,
    )


@dataclass
class Notes:
    """What a reader changed, left out or did not follow, by reason, with the image each item belongs to."""

    items: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, image: str) -> None:
        self.items.setdefault(reason, []).append(image)

    def count(self, reason: str) -> int:
        return len(self.items.get(reason, ()))

    def counts(self) -> dict[str, int]:
        """How often each reason occurred."""
        return {reason: len(images) for reason, images in self.items.items()}

    def lines(self, shown: int = 5) -> list[str]:
        """One line per reason: the count and the first few images."""
        result = []
        for reason, images in self.items.items():
            distinct = list(dict.fromkeys(images))
            more = f", ... {len(distinct)} images" if len(distinct) > shown else ""
            result.append(f"{reason}: {len(images)} ({', '.join(distinct[:shown])}{more})")
        return result


EMPTY_BOX = "empty boxes dropped"
OUTSIDE_BOX = "boxes outside the image dropped"
CLIPPED_BOX = "boxes clipped to the image"
TURNED = "images with an EXIF orientation tag, which is not applied"


def clip_box(
    box: tuple[float, float, float, float], width: int, height: int, notes: Notes, image: str
) -> tuple[float, float, float, float] | None:
    """The box clipped to its image; None, noted with its reason, when nothing of it is left."""
    x1, y1, x2, y2 = box
    if x2 <= x1 or y2 <= y1:
        notes.add(EMPTY_BOX, image)
        return None
    left, top, right, bottom = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    # The record stores float32: what rounds to an empty box there is empty.
    if np.float32(right) <= np.float32(left) or np.float32(bottom) <= np.float32(top):
        notes.add(OUTSIDE_BOX, image)
        return None
    if (left, top, right, bottom) != box:
        notes.add(CLIPPED_BOX, image)
    return left, top, right, bottom


@dataclass
class Dataset:
    """One split of a dataset.

    Attributes:
        root: absolute path of the dataset's folder.
        format: "coco", "voc" or "cityscapes".
        split: the split's name, as `load_dataset` takes it.
        classes: class names; label k is `classes[k]`.
        category_ids: the ids the files use for them (COCO, Cityscapes: numbers; VOC: the names). Goes into checkpoints.
        records: the images, in a stable order.
        notes: dropped and clipped boxes, orientation tags, with image names.
        splits: names of every split found in the dataset.
        labelled: False where the annotations are not public (test splits): there are images but no boxes, nothing to
            train on or to measure AP with.
    """

    root: str
    format: str
    split: str
    classes: tuple[str, ...]
    category_ids: tuple[int | str, ...]
    records: list[ImageRecord]
    notes: Notes = field(default_factory=Notes)
    splits: tuple[str, ...] = ()
    labelled: bool = True

    def __len__(self) -> int:
        return len(self.records)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.classes)

    @property
    def num_boxes(self) -> int:
        """Usable boxes, crowd and difficult ones included."""
        return sum(len(record.labels) for record in self.records)

    @property
    def num_train_boxes(self) -> int:
        """Boxes to train on."""
        return sum(int(record.trainable.sum()) for record in self.records)

    def most_bad_images(self, share: float) -> int:
        """How many images data.on_bad_image=skip may leave out: this share of them, always at least one."""
        return max(1, int(share * len(self)))

    def all_boxes(self) -> np.ndarray:
        """float32 (sum of G', 4): every box to train on, one array; for anchor statistics."""
        arrays = [record.train_boxes for record in self.records]
        return np.concatenate(arrays) if arrays else np.zeros((0, 4), dtype=np.float32)

    def doubts(self) -> list[str]:
        """What the boxes look like that most of them are not: another convention than the format's."""
        boxes = self.all_boxes()
        kept, lost = len(boxes), self.notes.count(OUTSIDE_BOX)
        form = {"coco": "x, y, width, height", "voc": "xmin, ymin, xmax, ymax"}.get(self.format)
        if form is None or kept + lost < 10:
            return []
        sides = np.minimum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
        if 2 * int((sides < 1).sum()) > kept:
            return ["most boxes are smaller than a pixel: are the coordinates shares of the image? Pixels are expected"]
        if 2 * (self.notes.count(CLIPPED_BOX) + lost) > kept + lost:
            return [f"most boxes reach out of their image: are they {form}, in pixels of the file?"]
        return []

    def fingerprint(self) -> str:
        """SHA-256 of classes, image names, sizes, boxes and labels; tells whether a resumed run sees the same data."""
        digest = hashlib.sha256(json.dumps([list(self.classes), list(self.category_ids)]).encode())
        for record in self.records:
            digest.update(json.dumps([record.id, record.name, record.width, record.height]).encode())
            for array in (record.boxes, record.labels, record.iscrowd, record.difficult):
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def to_coco_dict(dataset: Dataset | Iterable[ImageRecord], classes: Sequence[str] | None = None) -> dict[str, Any]:
    """The ground truth as a COCO-style dict, for `pycocotools.coco.COCO().dataset` (then `createIndex()`).

    Category ids are label + 1, image ids `ImageRecord.id`, annotation ids start at 1 (pycocotools takes 0 for "no
    match"). Crowd regions keep `iscrowd = 1`. A difficult box gets it too: pycocotools derives `ignore` from
    `iscrowd` alone. It then measures such a box by intersection over the detection's area, so it ignores a few more
    detections there than the VOC devkit would.

    Args:
        dataset: a `Dataset`, or image records together with `classes`.
        classes: class names, needed only with records.
    """
    if isinstance(dataset, Dataset):
        records, names = dataset.records, dataset.classes
    elif classes is None:
        raise TypeError("to_coco_dict: classes: expected the class names when image records are passed, got None")
    else:
        records, names = list(dataset), tuple(classes)
    images, annotations = [], []
    for record in records:
        images.append({"id": record.id, "file_name": record.name, "width": record.width, "height": record.height})
        for g in range(len(record.labels)):
            x1, y1, x2, y2 = (float(v) for v in record.boxes[g])
            ignored = bool(record.iscrowd[g] or record.difficult[g])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record.id,
                    "category_id": int(record.labels[g]) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": float(record.areas[g]),
                    "iscrowd": int(ignored),
                    "ignore": int(ignored),
                }
            )
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(names)]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
