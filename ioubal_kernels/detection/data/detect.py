"""Which dataset is in a folder: its format, classes and splits, found from what is on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from .records import Dataset


@dataclass
class DatasetPair:
    """The two splits of a training run; `evaluation` is None when the dataset has no annotated split besides the training one."""

    training: Dataset
    evaluation: Dataset | None


def load_dataset(
    root: str | os.PathLike[str],
    split: str | None = None,
    kind: str = "auto",
    *,
    role: str = "train",
    classes: Sequence[str] | None = None,
    check_files: bool = True,
    allow_symlinks: bool = False,
) -> Dataset:
    """One split of the dataset in `root` (COCO JSON, Pascal VOC folder, or the synthetic set, which is COCO JSON).

    Args:
        root: the dataset's folder.
        split: a split's name; None takes the default one for `role`.
        kind: "auto", "coco" or "voc".
        role: "train" or "eval": which default split to take. Training: `trainval` if there is an annotated `test`, else `train`.
            Evaluation: `test` if annotated, else `val`.
        classes: fix the class order (a checkpoint's); the dataset may not have a class that is missing here.
        check_files: check every image file's existence, type and header size now (`quick_check`).
        allow_symlinks: accept image files that are links to outside `root`.

    Raises:
        DataError: everything found wrong, listed.
    """
    raise NotImplementedError


def load_pair(
    root: str | os.PathLike[str],
    train_split: str | None = None,
    eval_split: str | None = None,
    kind: str = "auto",
    *,
    check_files: bool = True,
    allow_symlinks: bool = False,
) -> DatasetPair:
    """The training and the evaluation split, with the same classes in the same order. Arguments as in `load_dataset`."""
    raise NotImplementedError


def describe(*datasets: Dataset | None) -> str:
    """Lines for people: format, classes, splits with image and box counts, what was dropped."""
    raise NotImplementedError
