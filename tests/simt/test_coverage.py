"""The lines of the CUDA kernels that the tests over emulated threads run, by gcov."""

from __future__ import annotations

import collections
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import emulation
import pytest

from ioubal_kernels import ops

HERE = Path(__file__).parent
LEAST = 0.98

pytestmark = pytest.mark.slow


def gcov_program() -> str | None:
    """Of the compiler's own version: g++-12 writes what gcov-12 reads."""
    path = Path(emulation.compiler()[0])
    return shutil.which(
        str(path.with_name(path.name.replace("g++", "gcov"))) if path.parent.name else path.name.replace("g++", "gcov")
    )


def lines_run(folder: Path, gcov: str) -> dict[Path, dict[int, int]]:
    """How often each line with code ran, over all templates and objects."""
    runs: dict[Path, dict[int, int]] = collections.defaultdict(lambda: collections.defaultdict(int))
    objects = sorted(folder.glob("*.gcda"))
    assert objects, f"nothing was counted in {folder}"
    for counted in objects:
        done = subprocess.run([gcov, "--json-format", "--stdout", counted], capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stderr
        for line in filter(None, done.stdout.splitlines()):
            for file in json.loads(line)["files"]:
                path = Path(file["file"]).resolve()
                if path.suffix == ".cuh" and path.is_relative_to(emulation.CSRC / "cuda"):
                    for entry in file["lines"]:
                        runs[path][entry["line_number"]] += entry["count"]
    return runs


def test_line_coverage_of_the_kernels() -> None:
    """At least 98 % of the lines of csrc/cuda/*.cuh that hold code run; the others are listed."""
    gcov = gcov_program()
    reason = emulation.unavailable() or ops.load_error("cpu") or (None if gcov else "gcov is absent")
    if reason:
        pytest.skip(reason)
    library = emulation.build("coverage")
    for stale in library.parent.glob("*.gcda"):
        os.remove(stale)
    environment = emulation.environment("coverage")
    tests = ("test_launchers.py", "test_hostile_inputs.py", "test_matching.py")
    for command in (
        [sys.executable, HERE / "sweep.py", library, "0", "--reduced"],
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(HERE / name for name in tests)],
    ):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=600, cwd=HERE.parents[1]
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    runs = lines_run(library.parent, gcov)
    expected = {path.resolve() for path in (emulation.CSRC / "cuda").glob("*.cuh")}
    assert expected - set(runs) == set(), "no line of these was compiled"
    counts = [count for lines in runs.values() for count in lines.values()]
    missing = [
        f"{path.name}:{number}: {path.read_text(encoding='utf-8').splitlines()[number - 1].strip()}"
        for path, lines in sorted(runs.items())
        for number, count in sorted(lines.items())
        if count == 0
    ]
    share = 1 - len(missing) / len(counts)
    print(f"{share:.2%} of {len(counts)} lines")
    assert share >= LEAST, f"{share:.2%} of {len(counts)} lines; not run:\n" + "\n".join(missing)
