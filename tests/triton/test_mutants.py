"""Seeded faults in the Triton kernels: every one must be noticed by a few problems in the interpreter."""

import os

import pytest
import triton_mutants as mutants

pytestmark = pytest.mark.slow
GROUPS = 4  # one test each, so that processes share them
EVERY = 1 if os.environ.get("IOUBAL_ALL") else 3  # neighbours in the list are faults of one place


def test_the_unchanged_kernels_pass() -> None:
    assert mutants.survives(None)


@pytest.mark.parametrize("group", range(GROUPS))
def test_every_mutant_dies(group: int) -> None:
    alive = mutants.survivors(mutants.MUTANTS[::EVERY][group::GROUPS])
    assert not alive, f"not noticed: {alive}"


def test_there_are_mutants_of_every_file() -> None:
    files = {path.name for path in mutants.KERNELS.glob("*.py")} - {
        "__init__.py",
        "registry.py",
        "detection.py",
        "boxes.py",
    }
    assert {mutant.file for mutant in mutants.MUTANTS} == files and len(mutants.MUTANTS[::EVERY]) >= 40
    for mutant in mutants.MUTANTS:
        assert mutant.text in (mutants.KERNELS / mutant.file).read_text(encoding="utf-8"), mutant
