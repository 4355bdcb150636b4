"""Every CUDA kernel over emulated threads under AddressSanitizer and UndefinedBehaviorSanitizer, in several orders."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulation
import pytest

from ioubal_kernels import ops

HERE = Path(__file__).parent
SEEDS = (1, 2, 3, 4, 5)
SHAPES = 60  # of every family, at least
FAMILIES = (
    *("rows", "spanning rows", "single rows", "planes", "detection rows", "deltas"),
    *("softmax", "wide softmax", "smooth L1", "boxes", "matching", "fovea"),
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sanitized() -> dict[str, str]:
    """The environment of a process that runs the sanitized library."""
    reason = emulation.unavailable() or ops.load_error("cpu")
    if reason:
        pytest.skip(reason)
    try:
        environment = emulation.environment("asan")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    emulation.build("asan")
    return environment


def sweep(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, HERE / "sweep.py", emulation.build("asan"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("kind", ("read", "write"))
def test_an_access_out_of_bounds_is_found(sanitized: dict[str, str], kind: str) -> None:
    """The test of the test: one element past the end of a tensor ends the process."""
    done = sweep(sanitized, 0, "--probe", kind)
    assert done.returncode != 0 and "not found" not in done.stdout
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr and "boxes_kernel" in done.stderr, done.stderr


def test_every_kernel_in_every_order(sanitized: dict[str, str]) -> None:
    """Each family over at least 60 shapes and in 5 orders of the threads, every element against the float64 oracle."""
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda seed: sweep(sanitized, seed, "--most", SHAPES), SEEDS))
    for seed, done in zip(SEEDS, runs, strict=True):
        assert done.returncode == 0, f"seed {seed}: {done.stderr[-4000:]}"
        counts = json.loads(done.stdout.splitlines()[-1])
        assert all(counts[family] >= SHAPES for family in FAMILIES), counts


@pytest.mark.parametrize("file", ("test_hostile_inputs.py", "test_launchers.py"))
def test_the_quick_tests_sanitized(sanitized: dict[str, str], file: str) -> None:
    """Hostile values and backward passes touch no memory that is not theirs."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / file]
    done = subprocess.run(command, env=sanitized, capture_output=True, text=True, timeout=600, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-4000:]
