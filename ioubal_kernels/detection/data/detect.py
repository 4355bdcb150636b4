"""Which dataset is in a folder: its format, classes and splits, found from what is on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .cityscapes import find_cityscapes_splits, has_labels, load_cityscapes
from .coco import coco_annotated, find_coco_splits, load_coco
from .files import file_problems
from .records import DataError, Dataset
from .voc import VocFolder, find_voc_folders, load_voc, voc_splits

KINDS = ("auto", "coco", "voc", "cityscapes")
_NAMES = {"coco": "COCO JSON", "voc": "Pascal VOC", "cityscapes": "Cityscapes"}


@dataclass
class DatasetPair:
    """The two splits of a training run; `evaluation` is None if no other split is annotated."""

    training: Dataset
    evaluation: Dataset | None

    def fingerprints(self) -> dict[str, str | None]:
        """`Dataset.fingerprint` of both, as logs and checkpoints call them: "data", "eval_data"."""
        return {
            "data": self.training.fingerprint(),
            "eval_data": None if self.evaluation is None else self.evaluation.fingerprint(),
        }


@dataclass
class Layout:
    """What was found in a folder: `kind` is "coco", "voc" or "cityscapes", `splits` the names of all splits."""

    root: str
    kind: str
    splits: tuple[str, ...]
    coco_files: dict[str, str] = field(default_factory=dict)
    voc_folders: list[VocFolder] = field(default_factory=list)

    def annotated(self, split: str) -> bool:
        """Whether the split has annotations (a COCO file is read for that)."""
        if self.kind == "voc":
            return voc_splits(self.voc_folders)[split]
        if self.kind == "cityscapes":
            return has_labels(self.root, split)
        return coco_annotated(split, self.coco_files[split])

    def named(self, wanted: str) -> str | None:
        """The split called `wanted`, or like it with a year (train2017), or by its other usual name (valid)."""
        other = {"val": ("valid", "validation"), "train": ("training",)}.get(wanted, ())
        for name in (wanted, *other):
            if name in self.splits:
                return name
        dated = [name for name in self.splits if any(_is_dated(name, start) for start in (wanted, *other))]
        return dated[0] if len(dated) == 1 else None


def _is_dated(name: str, start: str) -> bool:
    rest = name.removeprefix(start).lstrip("_-")
    return name.startswith(start) and rest.isdigit()


def find_layout(root: str | os.PathLike[str], kind: str = "auto") -> Layout:
    """Looks for a dataset in `root`.

    Raises:
        DataError: no such folder, nothing known in it, or several formats with kind "auto".
    """
    if kind not in KINDS:
        raise DataError(f"load_dataset: kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    path = os.path.abspath(os.fspath(root))
    if not os.path.isdir(path):
        what = "a file" if os.path.exists(path) else "nothing"
        raise DataError(f"dataset {path}: expected a folder, found {what}")
    try:
        coco = find_coco_splits(path) if kind in ("auto", "coco") else {}
        voc = find_voc_folders(path) if kind in ("auto", "voc") else []
        cityscapes = find_cityscapes_splits(path) if kind in ("auto", "cityscapes") else ()
    except OSError as error:
        raise DataError(f"dataset {path}: cannot be read: {error.strerror or error}") from None
    here = [name for name, found in (("coco", coco), ("voc", voc), ("cityscapes", cityscapes)) if found]
    if len(here) > 1:
        raise DataError(
            f"dataset {path}: several formats are here, {' and '.join(_NAMES[name] for name in here)}: name the kind, "
            + " or ".join(here)
        )
    if coco:
        return Layout(path, "coco", tuple(coco), coco_files=coco)
    if voc:
        return Layout(path, "voc", tuple(voc_splits(voc)), voc_folders=voc)
    if cityscapes:
        return Layout(path, "cityscapes", cityscapes)
    raise DataError(
        f"dataset {path}: no dataset found: expected annotations/instances_SPLIT.json, SPLIT/_annotations.coco.json "
        "(COCO), or Annotations/ with JPEGImages/, also in VOCdevkit/VOC* (Pascal VOC), or "
        "leftImg8bit/SPLIT/ with gtFine/SPLIT/ (Cityscapes); "
        f"the folder has {_listing(path)}"
    )


def _listing(path: str) -> str:
    names = sorted(os.listdir(path))
    return (", ".join(names[:8]) + (" ..." if len(names) > 8 else "")) if names else "nothing in it"


def default_split(layout: Layout, role: str) -> str | None:
    """The split for a role. Training: `trainval` if a separate `test` has annotations, else `train`, else the only
    annotated split there is. Evaluation: `test` if it has annotations, else `val`; None when there is neither.
    """
    test = layout.named("test")
    if test is not None and not layout.annotated(test):
        test = None
    if role == "eval":
        return test or layout.named("val")
    trainval = layout.named("trainval")
    if trainval is not None and test is not None:
        return trainval
    train = layout.named("train")
    if train is not None:
        return train
    if trainval is not None:
        return trainval
    only = layout.splits[0] if len(layout.splits) == 1 else None
    return only if only is not None and layout.annotated(only) else None


def load_dataset(
    root: str | os.PathLike[str],
    split: str | None = None,
    kind: str = "auto",
    *,
    role: str = "train",
    classes: Sequence[str] | None = None,
    category_ids: Sequence[int | str] | None = None,
    check_files: bool = True,
    allow_symlinks: bool = False,
) -> Dataset:
    """One split of the dataset in `root`: COCO JSON (the synthetic set is that too), Pascal VOC folder or Cityscapes.

    Args:
        root: the dataset's folder.
        split: a split's name (VOC: `A+B` joins splits, `VOC2007/test` is one year's); None takes the default one for
            `role`.
        kind: "auto", "coco", "voc" or "cityscapes".
        role: "train" or "eval": which default split to take. Training: `trainval` if there is an annotated `test`,
            else `train`. Evaluation: `test` if annotated, else `val`.
        classes: fix the class order (a checkpoint's); the dataset may not have a class that is missing here.
        category_ids: of `classes`, for those that the annotation files do not name.
        check_files: check every image file's existence, type and header size now (`quick_check`), and note orientation
            tags.
        allow_symlinks: accept image files that are links to outside `root`.

    A test split without annotations can be loaded by its name; the result's `labelled` is False.

    Raises:
        DataError: everything found wrong, listed.
    """
    if category_ids is not None and len(category_ids) != len(classes or ()):
        count = len(classes or ())
        raise DataError(
            f"load_dataset: category_ids: expected one for each of {count} classes, got {len(category_ids)}"
        )
    return _load(find_layout(root, kind), split, role, classes, check_files, allow_symlinks, category_ids)


def load_pair(
    root: str | os.PathLike[str],
    train_split: str | None = None,
    eval_split: str | None = None,
    kind: str = "auto",
    *,
    check_files: bool = True,
    allow_symlinks: bool = False,
) -> DatasetPair:
    """The training and the evaluation split, with the same classes in the same order. Arguments as in `load_dataset`.

    Raises:
        DataError: everything found wrong; also when both are the same split, or one has no annotations.
    """
    layout = find_layout(root, kind)
    train_split = train_split or default_split(layout, "train")
    if eval_split is None:
        eval_split = default_split(layout, "eval")
        eval_split = None if eval_split == train_split else eval_split
    elif eval_split == train_split:
        raise DataError(f"dataset {layout.root}: training and evaluation split are the same: {train_split!r}")
    training = _load(layout, train_split, "train", None, check_files, allow_symlinks)
    _require_labels(training)
    if eval_split is None:
        return DatasetPair(training, None)
    evaluation = _load(layout, eval_split, "eval", training.classes, check_files, allow_symlinks)
    _require_labels(evaluation)
    return DatasetPair(training, evaluation)


def _require_labels(dataset: Dataset) -> None:
    if not dataset.labelled:
        raise DataError(
            f"dataset {dataset.root}: split {dataset.split!r} has no annotations: expected an annotated one to train "
            "on and to measure AP with (ioubal eval --save-results writes detections on it)"
        )


def _load(
    layout: Layout,
    split: str | None,
    role: str,
    classes: Sequence[str] | None,
    check_files: bool,
    allow_symlinks: bool,
    category_ids: Sequence[int | str] | None = None,
) -> Dataset:
    if role not in ("train", "eval"):
        raise DataError(f"load_dataset: role: expected train or eval, got {role!r}")
    names = ", ".join(layout.splits)
    if split is None:
        split = default_split(layout, role)
        if split is None:
            raise DataError(f"dataset {layout.root}: no default split for {role}: name one of {names}")
    order = tuple(classes) if classes is not None else None
    if layout.kind == "voc":
        dataset = load_voc(layout.root, layout.voc_folders, split, order, allow_symlinks)
    else:
        if split not in layout.splits:
            raise DataError(f"dataset {layout.root}: split {split!r} does not exist: expected one of {names}")
        if layout.kind == "cityscapes":
            dataset = load_cityscapes(layout.root, split, allow_symlinks)
        else:
            ids = category_ids or range(1, len(order or ()) + 1)
            categories = list(zip(ids, order, strict=True)) if order else None
            dataset = load_coco(layout.root, split, layout.coco_files[split], categories)
        dataset = dataset if order is None else reorder_classes(dataset, order, category_ids)
    dataset.splits = layout.splits
    if check_files:
        problems = file_problems(dataset.records, layout.root, allow_symlinks=allow_symlinks, notes=dataset.notes)
        if problems:
            raise DataError(f"dataset {layout.root}, split {split!r}: image files", problems)
    return dataset


def reorder_classes(
    dataset: Dataset, classes: tuple[str, ...], category_ids: Sequence[int | str] | None = None
) -> Dataset:
    """The same dataset with labels in the order of `classes`. A class that it lacks gets its id in `category_ids`, or
    its name where the dataset has that id for another class.

    Raises:
        DataError: a class of the dataset is missing in `classes`.
    """
    if dataset.classes == classes:
        return dataset
    unknown = [name for name in dataset.classes if name not in classes]
    if unknown:
        raise DataError(
            f"dataset {dataset.root}, split {dataset.split!r}: classes: expected only {', '.join(classes)}; "
            f"got also {', '.join(unknown)}"
        )
    to_new = np.array([classes.index(name) for name in dataset.classes], dtype=np.int64)
    id_of = dict(zip(dataset.classes, dataset.category_ids))
    records = [replace(record, labels=to_new[record.labels]) for record in dataset.records]
    taken = set(dataset.category_ids)
    given = {name: key for name, key in zip(classes, category_ids or ()) if key not in taken}
    ids = tuple(id_of.get(name, given.get(name, name)) for name in classes)
    return replace(dataset, classes=classes, category_ids=ids, records=records)


def describe(*datasets: Dataset | None) -> str:
    """Lines for people: format, classes, splits with image and box counts, what was dropped."""
    given = [dataset for dataset in datasets if dataset is not None]
    if not given:
        return "no dataset"
    first = given[0]
    name = _NAMES[first.format]
    shown = ", ".join(first.classes[:20]) + (", ..." if first.num_classes > 20 else "")
    lines = [
        f"dataset  {first.root}",
        f"format   {name}; splits found: {', '.join(first.splits or (first.split,))}",
        f"classes  {first.num_classes}: {shown}",
    ]
    for dataset in given:
        if not dataset.labelled:
            lines.append(f"split    {dataset.split}: {len(dataset)} images without annotations")
            continue
        ignored = dataset.num_boxes - dataset.num_train_boxes
        extra = f" ({ignored} of them crowd or difficult: not trained on, ignored in evaluation)" if ignored else ""
        bare = sum(1 for record in dataset.records if not record.trainable.any())
        extra += f"; images without boxes: {bare}" if bare else ""
        lines.append(f"split    {dataset.split}: {len(dataset)} images, {dataset.num_boxes} boxes{extra}")
        lines += [f"         {line}" for line in dataset.notes.lines()]
        lines += [f"         warning: {line}" for line in dataset.doubts()]
    if len(given) == 1 and len(datasets) > 1:
        lines.append("split    none to evaluate on")
    return "\n".join(lines)
