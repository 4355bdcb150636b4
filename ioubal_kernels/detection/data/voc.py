"""Pascal VOC folders as they are on disk: Annotations/, JPEGImages/, ImageSets/Main/, one folder or one per year."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from xml.etree import ElementTree
from xml.parsers import expat

from .files import FileGuard, image_size, unsafe_name
from .records import BadImageError, DataError, Dataset, ImageRecord, Notes, clip_box, make_record

ALL = "all"
"""The name of the only split of a folder that has no ImageSets/Main."""

MAX_XML_BYTES = 16 * 1024 * 1024
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass
class VocObject:
    """One <object>: its class, flags and box as written (xmin ymin xmax ymax, 1-based and inclusive)."""

    name: str
    difficult: bool
    box: tuple[float, float, float, float]


@dataclass
class VocAnnotation:
    """One annotation file; `size` is None where the file does not give it."""

    size: tuple[int, int] | None
    objects: list[VocObject]
    problems: list[str] = field(default_factory=list)


@dataclass
class VocFolder:
    """A folder with Annotations/ and JPEGImages/; `splits` maps a split to its image ids in file order."""

    path: str
    year: str
    splits: dict[str, list[str]]
    annotated: set[str]
    images: dict[str, str]
    parsed: dict[str, VocAnnotation] = field(default_factory=dict)
    """Annotation files already read, by path: training and evaluation split need the same ones for the classes."""


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses a DOCTYPE, before any entity of it can be declared."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise DataError("a DOCTYPE is refused (entities are not needed here)")


def find_voc_folders(root: str) -> list[VocFolder]:
    """The VOC folders in `root`: itself, or VOC* in it or in its VOCdevkit, by year."""
    candidates = [(root, "")]
    for parent in (root, os.path.join(root, "VOCdevkit")):
        if os.path.isdir(parent):
            names = sorted(name for name in os.listdir(parent) if name.startswith("VOC") and name != "VOCdevkit")
            candidates += [(os.path.join(parent, name), name) for name in names]
    return [
        _open_folder(path, year)
        for path, year in candidates
        if os.path.isdir(os.path.join(path, "JPEGImages"))
        # Test images come with their list and without annotations.
        and (os.path.isdir(os.path.join(path, "Annotations")) or os.path.isdir(os.path.join(path, "ImageSets", "Main")))
    ]


def _open_folder(path: str, year: str) -> VocFolder:
    annotations = os.path.join(path, "Annotations")
    names = os.listdir(annotations) if os.path.isdir(annotations) else []
    annotated = {name[:-4] for name in names if name.endswith(".xml")}
    images = {}
    for name in sorted(os.listdir(os.path.join(path, "JPEGImages"))):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in _IMAGE_SUFFIXES:
            images.setdefault(stem, name)
    folder = os.path.join(path, "ImageSets", "Main")
    splits = {}
    if os.path.isdir(folder):
        for name in sorted(os.listdir(folder)):
            if name.endswith(".txt"):
                ids = _read_split(os.path.join(folder, name))
                if ids is not None:
                    splits[name[:-4]] = ids
    return VocFolder(path, year, splits or {ALL: sorted(annotated)}, annotated, images)


def _read_split(path: str) -> list[str] | None:
    """The ids of a split file; None for the per-class files (an id and -1, 0 or 1 on each line)."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            rows = [line.split() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list of image ids: {error}") from None
    if rows and all(len(row) == 2 and row[1] in ("-1", "0", "1") for row in rows):
        return None
    problems = [
        f"line {k + 1}: expected one image id, got {' '.join(row)!r}" for k, row in enumerate(rows) if len(row) != 1
    ]
    ids = [row[0] for row in rows]
    for value in dict.fromkeys(ids):
        reason = unsafe_name(value) or ("it contains '/'" if "/" in value else None)
        if reason:
            problems.append(f"image id {value!r} is refused: {reason}")
    seen: set[str] = set()
    for value in ids:
        if value in seen:
            problems.append(f"image id {value!r} is listed twice")
        seen.add(value)
    if problems:
        raise DataError(path, problems)
    return ids


def _is_annotated(folder: VocFolder, split: str) -> bool:
    """Whether a split of one year has annotations.

    Of test images a few may have some all the same (those of VOC 2012's person layout task), hence half. Any other
    split with one annotation counts, so that missing files are found.
    """
    ids = folder.splits[split]
    found = sum(value in folder.annotated for value in ids)
    return 2 * found >= len(ids) > 0 if "test" in split else found > 0


def voc_splits(folders: list[VocFolder]) -> dict[str, bool]:
    """Every split's name and whether it has annotations. With several years also `VOC2007/trainval` and so on."""
    result: dict[str, bool] = {}
    for folder in folders:
        for split in folder.splits:
            has = _is_annotated(folder, split)
            result[split] = result.get(split, False) or has
            if len(folders) > 1:
                result[f"{folder.year}/{split}"] = has
    return result


def read_annotation(path: str) -> VocAnnotation:
    """One VOC annotation file. Problems inside a well-formed file are collected in `problems`.

    Raises:
        DataError: the file cannot be read or is not XML, or has a DOCTYPE.
    """
    if expat.version_info < (2, 4, 1):
        raise DataError(
            f"{path}: refused: this Python's expat {expat.EXPAT_VERSION} is older than 2.4.1 (entity expansion)"
        )
    try:
        if os.path.getsize(path) > MAX_XML_BYTES:
            raise DataError(f"{path}: the file has {os.path.getsize(path)} bytes, the limit is {MAX_XML_BYTES}")
        root = ElementTree.parse(path, parser=ElementTree.XMLParser(target=_NoDoctype())).getroot()
    except DataError as error:
        raise DataError(f"{path}: {error}" if path not in str(error) else str(error)) from None
    except ElementTree.ParseError as error:
        raise DataError(f"{path}: not valid XML: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, LookupError, RecursionError) as error:
        # An unknown or broken encoding declaration.
        raise DataError(f"{path}: not usable: {error}") from None
    if root.tag != "annotation":
        raise DataError(f"{path}: expected the element <annotation> at the top, got <{root.tag}>")
    result = VocAnnotation(None, [])
    result.size = _read_size(root, path, result.problems)
    for k, element in enumerate(root.findall("object")):
        item = _read_object(element, f"{path}: object {k + 1}", result.problems)
        if item is not None:
            result.objects.append(item)
    return result


def _read_size(root: ElementTree.Element, path: str, problems: list[str]) -> tuple[int, int] | None:
    if root.find("size") is None:
        return None
    values = []
    for key in ("width", "height"):
        number = _number(root.findtext(f"size/{key}"))
        if number is None or number < 0 or number != int(number):
            problems.append(f"{path}: size: {key}: expected a positive integer, got {root.findtext(f'size/{key}')!r}")
            return None
        values.append(int(number))
    # Some tools write 0 x 0 for "unknown".
    return (values[0], values[1]) if values != [0, 0] else None


def _read_object(element: ElementTree.Element, where: str, problems: list[str]) -> VocObject | None:
    before = len(problems)
    name = (element.findtext("name") or "").strip()
    if not name:
        problems.append(f"{where}: <name> is missing or empty")
    difficult = (element.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        problems.append(f"{where}: difficult: expected 0 or 1, got {difficult!r}")
    values = []
    if element.find("bndbox") is None:
        problems.append(f"{where}: <bndbox> is missing")
    else:
        for key in ("xmin", "ymin", "xmax", "ymax"):
            text = element.findtext(f"bndbox/{key}")
            number = _number(text)
            if number is None:
                problems.append(f"{where}: bndbox: {key}: expected a finite number, got {text!r}")
            else:
                values.append(number)
    if len(values) == 4 and (values[2] < values[0] or values[3] < values[1]):
        problems.append(f"{where}: bndbox: expected xmin <= xmax and ymin <= ymax, got {values}")
    if len(problems) > before:
        return None
    return VocObject(name, difficult == "1", (values[0], values[1], values[2], values[3]))


def _number(text: str | None) -> float | None:
    """A finite number from text such as "12" or "12.5"; None for anything else."""
    try:
        value = float(text) if text is not None and "_" not in text else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def load_voc(
    root: str,
    folders: list[VocFolder],
    split: str,
    classes: tuple[str, ...] | None = None,
    allow_symlinks: bool = False,
) -> Dataset:
    """A split of one or several VOC folders; `A+B` joins splits. Image files are not opened, except where a size is
    missing.

    The classes are those found in all annotation files, whatever split they belong to. A test split of which no year
    has annotations is unlabelled: its images' sizes are read from their headers. x1 = xmin - 1 and y1 = ymin -
    1, so that areas equal the devkit's; a box of a single point as written is dropped and noted. Difficult objects
    stay, flagged. The image belongs to the id of the split file; `<filename>` is not used.

    Raises:
        DataError: all problems, the first 20 shown.
    """
    parsed: dict[str, VocAnnotation] = {}
    problems: list[str] = []
    guard = FileGuard(root, allow_symlinks)
    for folder in folders:
        for value in sorted(folder.annotated):
            path = os.path.join(folder.path, "Annotations", value + ".xml")
            reason = guard.problem(path)
            if reason:
                problems.append(f"{path}: {reason}")
                continue
            try:
                if path not in folder.parsed:
                    folder.parsed[path] = read_annotation(path)
                parsed[path] = folder.parsed[path]
            except DataError as error:
                problems.append(str(error))
    wanted, labelled = _select(folders, split)
    if not wanted:
        problems.append(f"split {split!r}: expected at least one image, got none")
    for path in parsed:
        problems += parsed[path].problems
    if classes is None:
        # Sorted; for VOC itself this is the devkit's order.
        classes = tuple(sorted({item.name for annotation in parsed.values() for item in annotation.objects}))
    notes = Notes()
    records: list[ImageRecord] = []
    several = len(folders) > 1
    for folder, value in wanted:
        path = os.path.join(folder.path, "Annotations", value + ".xml")
        name = f"{folder.year}/{value}" if several else value
        if not labelled:
            record = _bare_record(len(records) + 1, name, value, folder, guard, problems)
            if record is not None:
                records.append(record)
            continue
        if value not in folder.annotated:
            problems.append(f"split {split!r}: {path}: the annotation file does not exist")
            continue
        if path in parsed:
            record = _record(len(records) + 1, name, value, folder, parsed[path], classes, notes, problems)
            if record is not None:
                records.append(record)
    if not classes and not problems:
        problems.append("expected at least one object in the annotation files, got none")
    if problems:
        raise DataError(f"{root}: Pascal VOC annotations", problems)
    return Dataset(root, "voc", split, classes, classes, records, notes, labelled=labelled)


def _select(folders: list[VocFolder], split: str) -> tuple[list[tuple[VocFolder, str]], bool]:
    """The (folder, image id) pairs of a split or of several joined by '+', and whether they have annotations.

    A year without annotations is left out, unless the split has none in any year: of a test split these are images to
    detect on, of any other one annotations that are missing.
    """
    result: dict[tuple[str, str], tuple[VocFolder, str]] = {}
    bare: dict[tuple[str, str], tuple[VocFolder, str]] = {}
    missing: dict[tuple[str, str], tuple[VocFolder, str]] = {}
    for part in split.split("+"):
        found = False
        for folder in folders:
            name = part.removeprefix(folder.year + "/") if folder.year else part
            ids = folder.splits.get(name)
            if ids is None or ("/" in part and name == part):
                continue
            found = True
            pairs = {(folder.path, value): (folder, value) for value in ids}
            if _is_annotated(folder, name):
                result.update(pairs)
            else:
                (bare if "test" in name else missing).update(pairs)
        if not found:
            raise DataError(f"split {part!r} does not exist: expected one of {', '.join(voc_splits(folders))}")
    return list((result or bare or missing).values()), bool(result) or not bare


def _image_path(folder: VocFolder, value: str) -> str:
    return os.path.join(folder.path, "JPEGImages", folder.images.get(value, value + ".jpg"))


def _bare_record(
    number: int, name: str, value: str, folder: VocFolder, guard: FileGuard, problems: list[str]
) -> ImageRecord | None:
    """The record of an image without annotations."""
    path = _image_path(folder, value)
    reason = guard.problem(path)
    if reason:
        problems.append(f"image {path}: {reason}")
        return None
    try:
        width, height = image_size(path)
    except BadImageError as error:
        problems.append(str(error))
        return None
    return make_record(
        id=number, name=name, path=path, width=width, height=height, boxes=[], labels=[], source_id=value
    )


def _record(
    number: int,
    name: str,
    value: str,
    folder: VocFolder,
    annotation: VocAnnotation,
    classes: tuple[str, ...],
    notes: Notes,
    problems: list[str],
) -> ImageRecord | None:
    path = _image_path(folder, value)
    if annotation.size is None:
        try:
            width, height = image_size(path)
        except BadImageError as error:
            problems.append(str(error))
            return None
    else:
        width, height = annotation.size
    boxes, labels, difficult = [], [], []
    for item in annotation.objects:
        if item.name not in classes:
            unknown = f"unknown class {item.name!r}: expected one of {', '.join(classes)}"
            if not any(problem.endswith(unknown) for problem in problems):  # once, however many boxes have it
                problems.append(f"image {name}: {unknown}")
            continue
        xmin, ymin, xmax, ymax = item.box
        # A single row or column is a box, one pixel wide. A single point is a click that was to become one.
        empty = xmax == xmin and ymax == ymin
        box = (xmin, ymin, xmin, ymin) if empty else (xmin - 1, ymin - 1, xmax, ymax)
        clipped = clip_box(box, width, height, notes, name)
        if clipped is not None:
            boxes.append(clipped)
            labels.append(classes.index(item.name))
            difficult.append(item.difficult)
    return make_record(
        id=number, name=name, path=path, width=width, height=height, boxes=boxes, labels=labels, difficult=difficult,
        source_id=value,
    )  # fmt: skip
