"""The built-in synthetic detection set: image files plus COCO JSON."""

from __future__ import annotations

import os
from collections.abc import Callable


def make_synthetic(
    out_dir: str | os.PathLike[str],
    train: int = 1500,
    val: int = 300,
    size: int = 128,
    classes: int = 4,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Make the set in `out_dir` (or reuse it when it was made with the same parameters); returns the absolute path.

    `progress(done, total)` is called in this process as images are finished.
    """
    raise NotImplementedError
