"""A part of the sweep over shapes, in this process; all of it runs under sanitizers (test_sanitized.py)."""

import pytest
import sweep


@pytest.mark.parametrize("seed", (0, 1))
def test_a_part_of_every_family(kernels, monkeypatch, seed):
    """Every kernel, the box ops and the edges among them, in two orders of the threads, against the float64 oracle."""
    monkeypatch.setenv("IOUBAL_CHECK", "0")
    kernels.seed(seed)
    counts = sweep.run_all(reduced=True)
    assert min(counts.values()) >= 3
