"""Cityscapes as it is on disk: leftImg8bit/SPLIT/CITY/ with the images, gtFine/SPLIT/CITY/ with the labels.

Boxes are those of each instance's visible pixels, from *_gtFine_instanceIds.png or, where that file is missing, from
*_gtFine_polygons.json painted in the way the data set's own scripts (cityscapesScripts, json2instanceImg) make
the former from the latter.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, UnidentifiedImageError

from .coco import read_json
from .files import MAX_PIXELS, FileGuard, image_size, unsafe_name
from .records import DataError, Dataset, ImageRecord, make_record

SPLITS = ("train", "val", "test")

CLASS_IDS = {
    "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
"""The evaluated classes that have instances, in label order, with the data set's own ids."""

LABEL_IDS = {
    "unlabeled": 0, "ego vehicle": 1, "rectification border": 2, "out of roi": 3, "static": 4, "dynamic": 5,
    "ground": 6, "road": 7, "sidewalk": 8, "parking": 9, "rail track": 10, "building": 11, "wall": 12, "fence": 13,
    "guard rail": 14, "bridge": 15, "tunnel": 16, "pole": 17, "polegroup": 18, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, **CLASS_IDS, "caravan": 29, "trailer": 30,
    "license plate": -1,
}  # fmt: skip
"""Every label that a polygon may have; a negative one is not painted."""

_WITH_INSTANCES = range(24, 34)
_MAX_INSTANCES = 1000
_IMAGE_END = "_leftImg8bit.png"
_MASK_END = "_gtFine_instanceIds.png"
_POLYGON_END = "_gtFine_polygons.json"
_LABEL_OF = np.full(65536, -1, dtype=np.int64)
for _label, _id in enumerate(CLASS_IDS.values()):
    _LABEL_OF[_id] = _label
    _LABEL_OF[_id * 1000 : (_id + 1) * 1000] = _label


@dataclass
class MaskBoxes:
    """The objects of one label image, sorted by id.

    Attributes:
        boxes: float32 (G, 4), x1 y1 x2 y2: first column, first row, last column + 1, last row + 1 of the pixels.
        labels: int64 (G,), index into `CLASS_IDS`.
        iscrowd: bool (G,), regions of several objects (ids below 1000).
        areas: float32 (G,), numbers of pixels.
        size: width, height of the label image.
    """

    boxes: np.ndarray
    labels: np.ndarray
    iscrowd: np.ndarray
    areas: np.ndarray
    size: tuple[int, int]


def find_cityscapes_splits(root: str) -> tuple[str, ...]:
    """The splits in `root`: those of train, val and test that leftImg8bit/ has a folder for."""
    return tuple(split for split in SPLITS if os.path.isdir(os.path.join(root, "leftImg8bit", split)))


def has_labels(root: str, split: str) -> bool:
    """Whether a split has annotations; those of the test split are dummies and never count."""
    return split != "test" and os.path.isdir(os.path.join(root, "gtFine", split))


def mask_boxes(ids: np.ndarray) -> MaskBoxes:
    """The boxes of an instance image, integers (H, W): class id, or class id * 1000 + number of the instance.

    Raises:
        DataError: a value that is neither.
    """
    height, width = ids.shape
    flat = np.ascontiguousarray(ids).reshape(-1)
    # Runs of one value within a row: a hundredth of the pixels, and all that the boxes and areas depend on.
    change = np.empty(flat.size + 1, dtype=bool)
    np.not_equal(flat[1:], flat[:-1], out=change[1:-1])
    change[:-1:width] = True
    change[-1] = True
    edges = np.flatnonzero(change)
    starts, lengths = edges[:-1], np.diff(edges)
    values = flat[starts].astype(np.int64)
    class_part = np.where(values >= 1000, values // 1000, values)
    wrong = (class_part < 0) | (class_part > 33) | ((values >= 1000) & (class_part < _WITH_INSTANCES.start))
    if wrong.any():
        raise DataError(
            "expected pixels of 0 .. 33 (class ids) or 24000 .. 33999 (class id * 1000 + instance), "
            f"got {int(values[wrong][0])}"
        )
    chosen = _LABEL_OF[values] >= 0
    found, which = np.unique(values[chosen], return_inverse=True)
    y, x = np.divmod(starts[chosen], width)
    lengths = lengths[chosen]
    low = np.full((len(found), 2), max(width, height), dtype=np.int64)
    high = np.zeros((len(found), 2), dtype=np.int64)
    np.minimum.at(low[:, 0], which, x)
    np.minimum.at(low[:, 1], which, y)
    np.maximum.at(high[:, 0], which, x + lengths)
    np.maximum.at(high[:, 1], which, y + 1)
    return MaskBoxes(
        np.concatenate((low, high), axis=1).astype(np.float32),
        _LABEL_OF[found],
        found < 1000,
        np.bincount(which, weights=lengths, minlength=len(found)).astype(np.float32),
        (width, height),
    )


def read_mask(path: str, max_pixels: int = MAX_PIXELS) -> MaskBoxes:
    """The objects of a 16-bit *_gtFine_instanceIds.png.

    Raises:
        DataError: naming the file: not a PNG, not 16-bit grey, truncated, too many pixels, unknown ids.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(f"expected at most {max_pixels} pixels, got {width} x {height} = {width * height}")
            # Pillow before 10 opens 16-bit grey as "I", and so do some files written as such.
            if not image.mode.startswith("I"):
                raise DataError(f"expected a 16-bit grey PNG, got mode {image.mode}")
            return mask_boxes(np.asarray(image))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: expected a PNG file, got something else") from None
    except Image.DecompressionBombError:
        raise DataError(f"{path}: expected at most {max_pixels} pixels, got far more") from None
    except Exception as error:
        # Pillow raises many types (OSError, SyntaxError, struct.error, ValueError) for broken files.
        raise DataError(f"{path}: it cannot be decoded: {error}") from None


def read_polygons(path: str, max_pixels: int = MAX_PIXELS) -> MaskBoxes:
    """The objects of a *_gtFine_polygons.json: polygons painted in file order, later ones over earlier ones.

    Instances of a class are numbered in file order; "cargroup" and so on are regions of several objects.

    Raises:
        DataError: all problems of the file.
    """
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("objects"), list):
        raise DataError(f"{path}: expected an object with imgWidth, imgHeight and the list objects")
    width, height = data.get("imgWidth"), data.get("imgHeight")
    for name, value in (("imgWidth", width), ("imgHeight", height)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1_000_000:
            raise DataError(f"{path}: {name}: expected a positive integer, got {value!r}")
    if width * height > max_pixels:
        raise DataError(f"{path}: expected at most {max_pixels} pixels, got {width} x {height} = {width * height}")
    problems: list[str] = []
    counts: dict[int, int] = {}
    canvas = Image.new("I", (width, height), 0)
    draw = ImageDraw.Draw(canvas)
    for k, item in enumerate(data["objects"]):
        where = f"{path}: objects[{k}]"
        if not isinstance(item, dict):
            problems.append(f"{where}: expected an object, got {type(item).__name__}")
            continue
        if item.get("deleted"):
            continue
        value = _paint_value(item.get("label"), counts)
        points = _points(item.get("polygon"))
        if value is None:
            problems.append(f"{where}: label: expected one of the data set's, got {item.get('label')!r}")
        elif points is None:
            problems.append(f"{where}: polygon: expected at least two points [x, y] of finite numbers")
        elif value >= 34 and value % 1000 == _MAX_INSTANCES - 1 and counts[value // 1000] > _MAX_INSTANCES:
            problems.append(f"{where}: expected at most {_MAX_INSTANCES} objects of a class")
        elif value >= 0:
            draw.polygon(points, fill=value)
    if problems:
        raise DataError(path, problems)
    return mask_boxes(np.asarray(canvas))


def _paint_value(label: object, counts: dict[int, int]) -> int | None:
    """The pixel value of a polygon; None for a label that does not exist."""
    if not isinstance(label, str):
        return None
    group = label not in LABEL_IDS and label.endswith("group")
    number = LABEL_IDS.get(label.removesuffix("group") if group else label)
    if number is None:
        return None
    if group or number not in _WITH_INSTANCES:
        return number
    counts[number] = counts.get(number, 0) + 1
    return number * 1000 + min(counts[number], _MAX_INSTANCES) - 1


def _points(polygon: object) -> list[tuple[float, float]] | None:
    if not isinstance(polygon, list) or len(polygon) < 2:
        return None
    result = []
    for point in polygon:
        if not isinstance(point, list) or len(point) != 2:
            return None
        for value in point:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e6:
                return None
        result.append((point[0], point[1]))
    return result if all(math.isfinite(value) for point in result for value in point) else None


def load_cityscapes(root: str, split: str, allow_symlinks: bool = False) -> Dataset:
    """A split of Cityscapes. Image files are not opened, except those of the unlabelled test split for their size.

    Classes are the eight of `CLASS_IDS`, `category_ids` their ids. Boxes and areas are those of the visible pixels;
    ids below 1000 are regions of several objects, flagged `iscrowd`, one box an id. The label files are decoded in
    threads. An image's name is CITY_SEQUENCE_FRAME.

    Raises:
        DataError: all problems, the first 20 shown.
    """
    problems: list[str] = []
    images = _files(root, "leftImg8bit", split, (_IMAGE_END,), problems)
    labelled = split != "test"
    labels: dict[str, str] = {}
    if labelled and not os.path.isdir(os.path.join(root, "gtFine", split)):
        raise DataError(f"{root}: Cityscapes, split {split!r}: the folder gtFine/{split} does not exist")
    if labelled:
        # Masks last, so that they win over polygons.
        for end in (_POLYGON_END, _MASK_END):
            labels.update(_files(root, "gtFine", split, (end,), problems))
        for key in sorted(labels.keys() - images.keys()):
            problems.append(f"{labels[key]}: its image leftImg8bit/{split}/{key}{_IMAGE_END} does not exist")
        for key in sorted(images.keys() - labels.keys()):
            problems.append(
                f"{images[key]}: no label file: expected gtFine/{split}/{key}{_MASK_END} or ...{_POLYGON_END}"
            )
    if not images:
        problems.append(f"expected images leftImg8bit/{split}/CITY/*{_IMAGE_END}, got none")
    guard = FileGuard(root, allow_symlinks)
    records: list[ImageRecord] = []
    keys = sorted(images)

    def read(key: str) -> MaskBoxes | DataError:
        if labelled:
            return _guarded(labels[key], guard, "", _read_labels)
        return _guarded(images[key], guard, "image ", _read_size)

    wanted = [key for key in keys if not labelled or key in labels]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for key, result in zip(wanted, pool.map(read, wanted), strict=True):
            if isinstance(result, DataError):
                problems += result.problems or [str(result)]
            else:
                records.append(_record(len(records) + 1, key, images[key], result))
    if problems:
        raise DataError(f"{root}: Cityscapes, split {split!r}", problems)
    classes, ids = tuple(CLASS_IDS), tuple(CLASS_IDS.values())
    return Dataset(root, "cityscapes", split, classes, ids, records, labelled=labelled)


def _files(root: str, kind: str, split: str, ends: tuple[str, ...], problems: list[str]) -> dict[str, str]:
    """Paths by CITY/STEM of the files in root/kind/split/CITY that end in one of `ends`."""
    result: dict[str, str] = {}
    folder = os.path.join(root, kind, split)
    try:
        for city in sorted(os.listdir(folder)):
            path = os.path.join(folder, city)
            if city.startswith(".") or not os.path.isdir(path):
                continue
            for name in sorted(os.listdir(path)):
                end = next((end for end in ends if name.endswith(end)), None)
                # "._NAME" are leavings of macOS archives.
                if end is None or name.startswith("."):
                    continue
                reason = unsafe_name(f"{city}/{name}")
                if reason:
                    problems.append(f"{os.path.join(path, name)!r} is refused: {reason}")
                else:
                    result[f"{city}/{name.removesuffix(end)}"] = os.path.join(path, name)
    except OSError as error:
        problems.append(f"{error.filename}: cannot be read: {error.strerror or error}")
    return result


def _guarded(path: str, guard: FileGuard, what: str, read: Callable[[str], MaskBoxes]) -> MaskBoxes | DataError:
    """What `read` finds in a file, or why it may or can not: a value, since every file is looked at."""
    reason = guard.problem(path)
    if reason:
        return DataError(f"{what}{path}: {reason}")
    try:
        return read(path)
    except DataError as error:
        return error


def _read_labels(path: str) -> MaskBoxes:
    return read_mask(path) if path.endswith(_MASK_END) else read_polygons(path)


def _read_size(path: str) -> MaskBoxes:
    """No boxes, and the size of an image without labels."""
    none = np.zeros(0, dtype=np.float32)
    return MaskBoxes(none.reshape(0, 4), none.astype(np.int64), none.astype(bool), none, image_size(path))


def _record(number: int, key: str, path: str, found: MaskBoxes) -> ImageRecord:
    name = key.partition("/")[2]
    return make_record(
        id=number, name=name, path=path, width=found.size[0], height=found.size[1], boxes=found.boxes,
        labels=found.labels, iscrowd=found.iscrowd, areas=found.areas, source_id=name,
    )  # fmt: skip
