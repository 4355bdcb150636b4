"""The training's figures for TensorBoard, on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import UsageError

FOLDER = "tensorboard"


class FigureWriter:
    """Writes scalars to RUN/tensorboard; nothing when `run` is None. A context manager: what is left is written at its
    end. From its first step on, what an interrupted run wrote to the same folder counts no longer.

    Raises:
        UsageError: the package tensorboard is not installed.
    """

    def __init__(self, run: Path | None) -> None:
        self._writer: Any = None
        self._folder = None if run is None else str(run / FOLDER)
        if run is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                f"train.tensorboard: needs the package tensorboard: pip install tensorboard ({error})"
            ) from None
        self._make = SummaryWriter

    def write(self, step: int, figures: dict[str, float | None]) -> None:
        """Scalars at an optimisation step; those that do not exist (None) are left out."""
        if self._folder is not None:
            if self._writer is None:
                self._writer = self._make(self._folder, purge_step=step)
            for name, value in figures.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step)

    def __enter__(self) -> FigureWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._writer is not None:
            self._writer.close()
