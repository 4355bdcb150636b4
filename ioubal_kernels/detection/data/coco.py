"""COCO JSON annotation files, read strictly: whatever is not as the format says is listed, nothing is guessed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from typing import Any

from .files import unsafe_name
from .records import DataError, Dataset, ImageRecord, Notes, clip_box, make_record

MAX_JSON_BYTES = 4 * 1024**3

_IGNORED_PREFIXES = ("captions_", "person_keypoints_", "stuff_", "panoptic_", "image_info_")
_UNLABELLED_PREFIX = "image_info_"
_INT64 = 2**63


def find_coco_splits(root: str) -> dict[str, str]:
    """The annotation files in `root` by split name.

    Known layouts: `annotations/instances_SPLIT.json` (files for captions, key points and so on are passed over),
    `annotations/SPLIT.json`, and `SPLIT/_annotations.coco.json` with the images beside it. Also
    `annotations/image_info_SPLIT.json`, the lists of test images without annotations.
    """
    splits: dict[str, str] = {}
    folder = os.path.join(root, "annotations")
    if os.path.isdir(folder):
        names = sorted(name for name in os.listdir(folder) if name.endswith(".json"))
        instances = [name for name in names if name.startswith("instances_")]
        for name in instances or [name for name in names if not name.startswith(_IGNORED_PREFIXES)]:
            splits[name.removesuffix(".json").removeprefix("instances_")] = os.path.join(folder, name)
        for name in names:
            split = name.removesuffix(".json").removeprefix(_UNLABELLED_PREFIX)
            if name.startswith(_UNLABELLED_PREFIX) and split not in splits:
                splits[split] = os.path.join(folder, name)
    if not splits and os.path.isdir(root):
        for name in sorted(os.listdir(root)):
            path = os.path.join(root, name, "_annotations.coco.json")
            if os.path.isfile(path):
                splits[name] = path
    return splits


def coco_annotated(split: str, annotation_file: str) -> bool:
    """Whether a file holds annotations; that of a list of images is told by its name, others are read."""
    if _is_image_list(annotation_file):
        return False
    data = read_json(annotation_file)
    return isinstance(data, dict) and bool(data.get("annotations"))


def _is_image_list(annotation_file: str) -> bool:
    return os.path.basename(annotation_file).startswith(_UNLABELLED_PREFIX)


def read_json(path: str) -> Any:
    """A JSON file, strictly: UTF-8, no NaN or Infinity, no repeated keys.

    Raises:
        DataError: naming the file and, for a syntax error, line and column.
    """
    try:
        size = os.path.getsize(path)
        if size > MAX_JSON_BYTES:
            raise DataError(f"{path}: the file has {size} bytes, the limit is {MAX_JSON_BYTES}")
        with open(path, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8 text, got byte 0x{error.object[error.start]:02x} at {error.start}"
        ) from None
    if not text.strip():
        raise DataError(f"{path}: expected JSON, the file is empty")

    def refuse(constant: str) -> None:
        raise DataError(f"{path}: expected numbers that are finite, got {constant}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            repeated = next(key for key in keys if keys.count(key) > 1)
            raise DataError(f"{path}: the key {repeated!r} occurs twice in one object")
        # Outlines are most of a COCO file and not needed for boxes; a third of the memory is left.
        result.pop("segmentation", None)
        return result

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{path}: not usable: it is nested too deeply") from None
    except DataError:
        raise
    except ValueError as error:
        # Numbers with thousands of digits.
        raise DataError(f"{path}: not usable: {error}") from None


def _is_id(value: object) -> bool:
    if isinstance(value, bool):
        return False
    return (isinstance(value, int) and -_INT64 <= value < _INT64) or (isinstance(value, str) and value != "")


def _is_number(value: object) -> bool:
    # An integer beyond the range of a double would make float() raise OverflowError.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1e30 if isinstance(value, int) else math.isfinite(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Reader:
    """One pass over one file; collects every problem before it raises."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.notes = Notes()

    def section(self, data: dict[str, Any], key: str) -> list[dict[str, Any]]:
        value = data.get(key)
        if key not in data:
            self.problems.append(f"the key '{key}' is missing")
            return []
        if not isinstance(value, list):
            self.problems.append(f"'{key}': expected a list, got {type(value).__name__}")
            return []
        kept = []
        for k, item in enumerate(value):
            if isinstance(item, dict):
                kept.append(item)
            else:
                self.problems.append(f"{key}[{k}]: expected an object, got {_short(item)}")
        return kept

    def stable_order(self, ids: list[int | str], what: str) -> list[int | str]:
        if len({isinstance(value, str) for value in ids}) > 1:
            self.problems.append(f"{what}: expected all integers or all strings, got a mixture")
            return sorted(ids, key=str)
        return sorted(ids)  # type: ignore[type-var]

    def categories(self, data: dict[str, Any]) -> tuple[list[int | str], list[str]]:
        names: dict[int | str, str] = {}
        seen: dict[str, int | str] = {}
        for k, item in enumerate(self.section(data, "categories")):
            where, key, name = f"categories[{k}]", item.get("id"), item.get("name")
            if not _is_id(key):
                self.problems.append(f"{where}: id: expected an integer or a string, got {_short(key)}")
            elif key in names:
                self.problems.append(f"{where}: id {_short(key)} is used twice")
            elif not isinstance(name, str) or not name.strip():
                self.problems.append(f"category {_short(key)}: name: expected a string, got {_short(name)}")
            elif name in seen:
                self.problems.append(
                    f"category {_short(key)}: the name {name!r} is already that of category {_short(seen[name])}"
                )
            else:
                names[key] = name
                seen[name] = key
        if not names and not self.problems:
            self.problems.append("'categories': expected at least one, got none")
        ids = self.stable_order(list(names), "category ids")
        return ids, [names[key] for key in ids]

    def images(self, data: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
        images: dict[int | str, dict[str, Any]] = {}
        for k, item in enumerate(self.section(data, "images")):
            key = item.get("id")
            if not _is_id(key):
                self.problems.append(f"images[{k}]: id: expected an integer or a string, got {_short(key)}")
                continue
            where = f"image {_short(key)}"
            if key in images:
                self.problems.append(f"{where}: the id is used twice")
                continue
            images[key] = item
            for side in ("width", "height"):
                value = item.get(side)
                if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1_000_000:
                    self.problems.append(f"{where}: {side}: expected a positive integer, got {_short(value)}")
            reason = unsafe_name(item.get("file_name"))
            if reason:
                self.problems.append(f"{where}: file_name {_short(item.get('file_name'))} is refused: {reason}")
        return images

    def annotations(
        self, data: dict[str, Any], images: dict[int | str, dict[str, Any]], label_of: dict[int | str, int]
    ) -> dict[int | str, list[tuple[Any, ...]]]:
        result: dict[int | str, list[tuple[Any, ...]]] = {key: [] for key in images}
        seen: set[int | str] = set()
        for k, item in enumerate(self.section(data, "annotations")):
            key = item.get("id")
            where = f"annotation {_short(key)}" if key is not None else f"annotations[{k}]"
            before = len(self.problems)
            if key is not None:
                if not _is_id(key):
                    self.problems.append(f"annotations[{k}]: id: expected an integer or a string, got {_short(key)}")
                elif key in seen:
                    self.problems.append(f"{where}: the id is used twice")
                else:
                    seen.add(key)
            image = self._reference(item, "image_id", images, where)
            category = self._reference(item, "category_id", label_of, where)
            box = self._box(item, where)
            crowd = item.get("iscrowd", 0)
            if crowd not in (0, 1):
                self.problems.append(f"{where}: iscrowd: expected 0 or 1, got {_short(crowd)}")
            difficult = item.get("difficult", 0)
            if difficult not in (0, 1):
                self.problems.append(f"{where}: difficult: expected 0 or 1, got {_short(difficult)}")
            area = item.get("area")
            if area is not None and (not _is_number(area) or area < 0):
                self.problems.append(f"{where}: area: expected a number >= 0, got {_short(area)}")
            if len(self.problems) > before or box is None:
                continue
            # The converter marks a difficult box as a crowd as well, for programs that know no other flag.
            result[image].append((box, label_of[category], bool(crowd and not difficult), bool(difficult), area))
        return result

    def _reference(self, item: dict[str, Any], key: str, known: dict[int | str, Any], where: str) -> int | str | None:
        if key not in item:
            self.problems.append(f"{where}: {key} is missing")
            return None
        value = item[key]
        if not _is_id(value):
            self.problems.append(f"{where}: {key}: expected an integer or a string, got {_short(value)}")
            return None
        if value not in known:
            self.problems.append(f"{where}: {key} {_short(value)} is unknown")
            return None
        return value

    def _box(self, item: dict[str, Any], where: str) -> tuple[float, float, float, float] | None:
        if "bbox" not in item:
            self.problems.append(f"{where}: bbox is missing")
            return None
        box = item["bbox"]
        if not isinstance(box, list) or len(box) != 4:
            self.problems.append(f"{where}: bbox: expected [x, y, width, height], got {_short(box)}")
            return None
        if not all(_is_number(value) for value in box):
            self.problems.append(f"{where}: bbox: expected four finite numbers, got {_short(box)}")
            return None
        x, y, w, h = (float(value) for value in box)
        if w < 0 or h < 0:
            self.problems.append(f"{where}: bbox: expected width and height >= 0, got {w:g} x {h:g}")
            return None
        return x, y, x + w, y + h

    def records(
        self,
        images: dict[int | str, dict[str, Any]],
        annotations: dict[int | str, list[tuple[Any, ...]]],
        folder: str,
    ) -> list[ImageRecord]:
        records = []
        # Integer ids are kept for evaluation; strings are numbered in their sorted order.
        for number, key in enumerate(self.stable_order(list(images), "image ids"), start=1):
            item = images[key]
            boxes, labels, crowd, difficult, areas = [], [], [], [], []
            for box, label, is_crowd, is_difficult, area in annotations[key]:
                clipped = clip_box(box, item["width"], item["height"], self.notes, item["file_name"])
                if clipped is None:
                    continue
                boxes.append(clipped)
                labels.append(label)
                crowd.append(is_crowd)
                difficult.append(is_difficult)
                areas.append(float(area) if area is not None else (clipped[2] - clipped[0]) * (clipped[3] - clipped[1]))
            path = os.path.normpath(os.path.join(folder, item["file_name"]))
            records.append(
                make_record(
                    id=key if isinstance(key, int) else number,
                    name=item["file_name"],
                    path=path,
                    width=item["width"],
                    height=item["height"],
                    boxes=boxes,
                    labels=labels,
                    iscrowd=crowd,
                    difficult=difficult,
                    areas=areas,
                    source_id=key,
                )
            )
        return records


def image_folder(root: str, annotation_file: str, split: str, names: Sequence[str]) -> str:
    """The folder the file names of a split are relative to: the first known place that has the first few images.

    Raises:
        DataError: none of the places has any of them.
    """
    if os.path.basename(annotation_file) == "_annotations.coco.json":
        return os.path.dirname(annotation_file)
    plain = os.path.join(root, "images")
    # test-dev2017 is a part of test2017 and has no folder of its own.
    own = dict.fromkeys((split, split.replace("-dev", "")))
    candidates = [os.path.join(folder, name) for name in own for folder in (root, plain)] + [plain, root]
    if not names:
        return candidates[0]
    for folder in candidates:
        if any(os.path.lexists(os.path.join(folder, name)) for name in names[:20]):
            return folder
    raise DataError(
        f"{annotation_file}: none of its images was found: expected {names[0]!r} in one of "
        + ", ".join(os.path.relpath(folder, root) + "/" for folder in candidates)
        + f" of {root}"
    )


def load_coco(
    root: str,
    split: str,
    annotation_file: str,
    categories: Sequence[tuple[int | str, str]] | None = None,
) -> Dataset:
    """One COCO annotation file as a `Dataset`. Image files are not opened here (see `quick_check`).

    Label k is the k-th category id in sorted order. Crowd annotations stay, flagged. Boxes are clipped to the image;
    empty ones and those outside are dropped and noted. `area` defaults to width times height, `iscrowd` to 0. An
    annotation with `"difficult": 1` (see `convert_dataset`) is flagged as such, not as a crowd.

    A file `image_info_SPLIT.json`, or that of a split called test-something without any annotation, gives an
    unlabelled dataset. `categories`, pairs of id and name, stands in where such a file has no "categories".

    Raises:
        DataError: all problems of the file, the first 20 shown.
    """
    data = read_json(annotation_file)
    if not isinstance(data, dict):
        raise DataError(f"{annotation_file}: expected a JSON object at the top, got {type(data).__name__}")
    reader = _Reader()
    labelled = not (_is_image_list(annotation_file) or ("test" in split and not data.get("annotations")))
    if not labelled:
        data = {**data, "annotations": []}
        if not data.get("categories") and categories is not None:
            data["categories"] = [{"id": key, "name": name} for key, name in categories]
    category_ids, classes = reader.categories(data)
    images = reader.images(data)
    label_of = {key: k for k, key in enumerate(category_ids)}
    annotations = reader.annotations(data, images, label_of)
    reader.stable_order(list(images), "image ids")
    if not images and not reader.problems:
        reader.problems.append("'images': expected at least one, got none")
    if reader.problems:
        raise DataError(annotation_file, reader.problems)
    folder = image_folder(root, annotation_file, split, [item["file_name"] for item in images.values()])
    return Dataset(
        root=root,
        format="coco",
        split=split,
        classes=tuple(classes),
        category_ids=tuple(category_ids),
        records=reader.records(images, annotations, folder),
        notes=reader.notes,
        labelled=labelled,
    )
