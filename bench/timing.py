"""Interleaved timing of several paths in one run, and a description of the machine they ran on."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import ioubal_kernels as ik
from ioubal_kernels.ops.library import limit_isa

RESULTS = Path(__file__).resolve().parent / "results"
ISA_NAMES = {0: "portable", 2: "AVX2", 4: "AVX-512", 5: "AVX-512 BF16"}


@dataclass
class TimedPath:
    """One path: `prepare` runs before `call` in every round, untimed; both get the round's number, to rotate inputs."""

    call: Callable[[int], Any]
    facts: dict[str, Any]
    prepare: Callable[[int], Any] | None = None


def wall_seconds(call: Callable[[int], Any], number: int) -> float:
    """Seconds of one call on the host's clock."""
    start = time.perf_counter()
    call(number)
    return time.perf_counter() - start


def race(
    paths: dict[str, TimedPath], rounds: int, clock: Callable[[Callable[[int], Any], int], float] = wall_seconds
) -> dict[str, list[float]]:
    """Seconds of every path in every round, interleaved, by `clock(call, number)`. Round 0 warms up, untold."""
    times: dict[str, list[float]] = {name: [] for name in paths}
    for number in range(rounds + 1):
        for name, path in paths.items():
            if path.prepare is not None:
                path.prepare(number)
            elapsed = clock(path.call, number)
            if number:
                times[name].append(elapsed)
    return times


def quantiles(samples: list[float]) -> dict[str, float]:
    """Fastest, median and 80 % quantile in milliseconds."""
    ordered = sorted(samples)
    late = ordered[min(len(ordered) - 1, int(0.8 * len(ordered)))]
    return {"min_ms": ordered[0] * 1e3, "median_ms": statistics.median(ordered) * 1e3, "q80_ms": late * 1e3}


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, '+' when it has changes. Outside a checkout what IOUBAL_COMMIT says, or 'unknown'."""
    root = RESULTS.parent.parent

    def run(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        dirty = run("status", "--porcelain", "--untracked-files=no", "--", "csrc", "ioubal_kernels", "bench/*.py")
        return run("rev-parse", "--short", "HEAD") + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("IOUBAL_COMMIT", "unknown")


def versions() -> dict[str, Any]:
    """When, and of what, on any device."""
    return {
        "run": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "version": ik.__version__,
        "torch": torch.__version__,
    }


def machine() -> dict[str, Any]:
    """What a figure depends on, on a CPU."""
    return {
        **versions(),
        "device": cpu_model(),
        "best_isa": ISA_NAMES[limit_isa(5)],
        "threads": torch.get_num_threads(),
        "heap": "warm" if os.environ.get("MALLOC_MMAP_MAX_") == "0" else "default",
    }


def append_rows(name: str, rows: list[dict[str, Any]], folder: Path = RESULTS) -> Path:
    """Adds rows to <folder>/<name>.jsonl."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.jsonl"
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row, allow_nan=False) + "\n")
    return path
