"""Checks of a dataset: a quick one at start-up, a full one that opens every image."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from .records import Dataset


@dataclass
class CheckReport:
    """What `check_dataset` found: `ok` is False when there are problems; `text` is for people; `stats` is plain JSON data."""

    ok: bool
    problems: list[str]
    warnings: list[str]
    stats: dict[str, Any] = field(default_factory=dict)
    text: str = ""


def quick_check(dataset: Dataset, *, max_pixels: int = 100_000_000, allow_symlinks: bool = False) -> None:
    """Every image file exists, is a regular JPEG, PNG or WebP file and has the annotated size; headers only, nothing decoded.

    Raises:
        DataError: all findings, the first 20 shown.
    """
    raise NotImplementedError


def check_dataset(
    root: str | os.PathLike[str],
    kind: str = "auto",
    *,
    splits: tuple[str, ...] | None = None,
    max_pixels: int = 100_000_000,
    allow_symlinks: bool = False,
    workers: int | None = None,
) -> CheckReport:
    """The full check of `ioubal data check`: annotations of every split, every image decoded, statistics, duplicates."""
    raise NotImplementedError
