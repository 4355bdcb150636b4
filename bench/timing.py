"""Interleaved timing of several paths in one run, and the rows that are kept of it."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
FORMAT = 2  # of the rows; readers leave out those of another one
LEAST_ROUNDS = 3
Row = dict[str, Any]
Clock = Callable[[Callable[[int], Any], int], float]  # (call, number of the round) -> seconds of one call


@dataclass
class TimedPath:
    """One path: `prepare` runs before `call` in every round, untimed; both get the round's number, to rotate inputs."""

    call: Callable[[int], Any]
    facts: Row = field(default_factory=dict)
    prepare: Callable[[int], Any] | None = None


def wall_seconds(call: Callable[[int], Any], number: int) -> float:
    """Seconds of one call on the host's clock."""
    start = time.perf_counter()
    call(number)
    return time.perf_counter() - start


def race(
    paths: dict[str, TimedPath], rounds: int, clock: Clock = wall_seconds, seconds: float | None = None
) -> dict[str, list[float]]:
    """Seconds of every path in every round, interleaved, by `clock(call, number)`. Round 0 warms up, untold.

    seconds: a path that takes so long that its rounds would exceed this drops out early, after LEAST_ROUNDS at least.
    """
    times: dict[str, list[float]] = {name: [] for name in paths}
    allowed = dict.fromkeys(paths, rounds)
    for number in range(rounds + 1):
        for name, path in paths.items():
            if number > allowed[name]:
                continue
            if path.prepare is not None:
                path.prepare(number)
            elapsed = clock(path.call, number)
            if number:
                times[name].append(elapsed)
            elif seconds is not None:
                allowed[name] = min(rounds, max(LEAST_ROUNDS, int(seconds / max(elapsed, 1e-9))))
    return times


def quantiles(samples: list[float]) -> dict[str, float]:
    """Fastest, 20 %, median and 80 % quantile in milliseconds."""
    ordered = sorted(samples)
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3  # noqa: E731
    return {
        "min_ms": ordered[0] * 1e3,
        "q20_ms": at(0.2),
        "median_ms": statistics.median(ordered) * 1e3,
        "q80_ms": at(0.8),
    }


def append_rows(name: str, rows: list[Row], folder: Path | None = None) -> Path:
    """Adds rows to <folder>/<name>.jsonl, each line whole; the folder is RESULTS unless given."""
    folder = RESULTS if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    with path.open("a", encoding="utf-8") as file:
        file.write(lines)
    return path


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, of today's format.

    Raises ValueError naming file and line where one is no JSON object.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path.name}, line {number}: expected a JSON object, got {type(row).__name__}")
        if row.get("format") == FORMAT:
            rows.append(row)
    return rows
