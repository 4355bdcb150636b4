"""Wrong versions of the CUDA kernels are noticed by the sweep over shapes and orders of the threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulation
import mutants
import pytest

from ioubal_kernels import ops

HERE = Path(__file__).parent
LEAST = 0.95
PROCESSES = 2
EVERY = 1 if os.environ.get("IOUBAL_ALL") else 3  # neighbours in the table are faults of one line

pytestmark = pytest.mark.slow


def test_mutants_are_noticed(tmp_path: Path) -> None:
    """At least 95 % of every third entry of the table, 40 or more; the survivors are listed."""
    reason = emulation.unavailable() or ops.load_error("cpu")
    if reason:
        pytest.skip(reason)
    mutants.write_sources(tmp_path / "csrc")
    library = emulation.build("mutants", tmp_path / "csrc")

    def share(first: int) -> dict[str, str | None]:
        command = [sys.executable, HERE / "mutant_runs.py", library, str(first), str(EVERY * PROCESSES)]
        done = subprocess.run(
            command, env=emulation.environment("mutants"), capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(PROCESSES) as pool:
        firsts = range(1, 1 + EVERY * PROCESSES, EVERY)
        results = {number: how for part in pool.map(share, firsts) for number, how in part.items()}
    unchanged = results.pop("0")
    assert unchanged is None, f"no mutant, and yet: {unchanged}"
    assert len(results) == len(mutants.TABLE[::EVERY]) >= 40
    survivors = [mutants.TABLE[int(number) - 1] for number, how in results.items() if how is None]
    listed = "\n".join(f"{m.file}: {m.context} -> {m.new}: {m.why}" for m in survivors)
    print(f"{len(results) - len(survivors)} of {len(results)} mutants noticed\n{listed}")
    assert len(results) - len(survivors) >= LEAST * len(results), listed
