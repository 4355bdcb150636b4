"""Interleaved timing of several paths in one run, and the rows that are kept of it."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .neighbour import Neighbour

RESULTS = Path(__file__).resolve().parent / "results"
FORMAT = 2  # of the rows; readers leave out those of another one
LEAST_ROUNDS = 3
Row = dict[str, Any]
Clock = Callable[[Callable[[int], Any], int], float]  # (call, number of the round) -> seconds of one call
TRIES = 20  # of a call that a neighbour disturbs


@dataclass
class TimedPath:
    """One path: `prepare` runs before `call` in every round, untimed; both get the round's number, to rotate inputs."""

    call: Callable[[int], Any]
    facts: Row = field(default_factory=dict)
    prepare: Callable[[int], Any] | None = None
    disturbed: int = 0  # rounds whose call shared the core, however often it was repeated


def wall_seconds(call: Callable[[int], Any], number: int) -> float:
    """Seconds of one call on the host's clock."""
    start = time.perf_counter()
    call(number)
    return time.perf_counter() - start


def sample(path: TimedPath, number: int, clock: Clock, neighbour: Neighbour | None, tries: int) -> float:
    """Seconds of one call, the first of at most `tries` before and after which the core is not shared, or the last."""
    for _ in range(tries):
        if path.prepare is not None:
            path.prepare(number)
        idle = neighbour is None or neighbour.wait()
        elapsed = clock(path.call, number)
        if neighbour is None or (idle and neighbour.is_idle()):
            return elapsed
    path.disturbed += 1
    return elapsed


def race(
    paths: dict[str, TimedPath],
    rounds: int,
    clock: Clock = wall_seconds,
    seconds: float | None = None,
    neighbour: Neighbour | None = None,
) -> dict[str, list[float]]:
    """Seconds of every path in every round, interleaved, by `clock(call, number)`. Round 0 warms up, untold.

    seconds: a path that takes so long that its rounds would exceed this drops out early, after LEAST_ROUNDS at least.
    neighbour: calls that it disturbs are repeated, as often as `seconds` and TRIES allow.
    """
    times: dict[str, list[float]] = {name: [] for name in paths}
    allowed, tries = dict.fromkeys(paths, rounds), dict.fromkeys(paths, TRIES)
    for number in range(rounds + 1):
        for name, path in paths.items():
            if number > allowed[name]:
                continue
            elapsed = sample(path, number, clock, neighbour if number else None, tries[name])
            if number:
                times[name].append(elapsed)
            elif seconds is not None:
                calls = int(seconds / max(elapsed, 1e-9))
                allowed[name] = min(rounds, max(LEAST_ROUNDS, calls))
                tries[name] = max(1, min(TRIES, calls // allowed[name]))
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
