"""The training's figures for TensorBoard, on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import UsageError

FOLDER = "tensorboard"


class FigureWriter:
    """Writes scalars to RUN/tensorboard; nothing when `run` is None. A context manager: what is left is written at its
    end.

    Raises:
        UsageError: the package tensorboard is not installed.
    """

    def __init__(self, run: Path | None) -> None:
        self._writer: Any = None
        if run is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                f"train.tensorboard: needs the package tensorboard: pip install tensorboard ({error})"
            ) from None
        self._writer = SummaryWriter(str(run / FOLDER))

    def write(self, step: int, figures: dict[str, float | None]) -> None:
        """Scalars at an optimisation step; those that do not exist (None) are left out."""
        if self._writer is not None:
            for name, value in figures.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step)

    def __enter__(self) -> FigureWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._writer is not None:
            self._writer.close()
