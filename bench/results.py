"""Stored rows: which file, which row."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import timing
from .measure import MEASURED
from .timing import Row

# What tells two rows apart that measure different things.
IDENTITY = ("device", "name", "path", "phase", "backend", "isa", "gamma", "threads", "heap")
Key = tuple[Any, ...]


def key_of(row: Row) -> Key:
    return tuple(row.get(field) for field in IDENTITY)


def load(folder: Path | None = None) -> list[Row]:
    """Every row of a folder's files, oldest run first. Raises ValueError where a file is not what it should be."""
    folder = timing.RESULTS if folder is None else folder
    rows = [row for path in sorted(folder.glob("*.jsonl")) for row in timing.read_rows(path)]
    return sorted(rows, key=lambda row: row["run"])


def counts(row: Row) -> bool:
    """Whether a row holds figures: it was measured, and not in a dry run."""
    return row.get("result") == MEASURED and not row.get("dry_run")


def newest(rows: Iterable[Row]) -> dict[Key, Row]:
    """The newest row of each key, of those that count."""
    return {key_of(row): row for row in rows if counts(row)}


class Stored:
    """The newest rows of one device, by what they measure."""

    def __init__(self, rows: Iterable[Row], device: str, others: Iterable[Stored] = ()) -> None:
        self.device, self.others = device, list(others)
        self.every_run = [row for row in rows if counts(row) and row["device"] == device]
        self.rows = list(newest(self.every_run).values())
        self.gpu = any("capability" in row for row in self.rows)

    def find(self, name: str, path: str, phase: str = "forward + backward", **wanted: Any) -> Row | None:
        """The row of a case's path: on a CPU that of one thread, a warm heap and the best instruction set; of ours on a
        GPU that of the CUDA kernels before Triton's. The newest of several, or that of one `run`.
        """
        usual: Row = {} if self.gpu else {"threads": 1, "heap": "warm"}
        wanted = {**usual, **wanted}
        found = [
            row
            for row in (self.every_run if "run" in wanted else self.rows)
            if (row["name"], row["path"], row["phase"]) == (name, path, phase)
            and all(row.get(field) == value for field, value in wanted.items())
        ]
        return max(found, key=lambda row: (row.get("backend") != "triton", row["run"]), default=None)


def devices(rows: Iterable[Row], gpu: bool) -> list[str]:
    """Devices with measured rows, the one with most of them first."""
    found = collections.Counter(row["device"] for row in newest(rows).values() if ("capability" in row) == gpu)
    return [device for device, _ in found.most_common()]


def by_device(folder: Path | None = None) -> dict[bool, Stored]:
    """Of a folder's rows those of the GPU (True) and of the processor (False) with most of them; with the `others`."""
    rows = load(folder)
    found = {}
    for gpu in (False, True):
        first, *rest = devices(rows, gpu) or [""]
        found[gpu] = Stored(rows, first, [Stored(rows, device) for device in rest])
    return found
