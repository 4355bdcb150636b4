"""The helpers of tests/simt (CUDA kernels, used in tests/ops too), tests/triton and others: test folders are no
packages.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "tests" / folder) for folder in ("ops", "simt", "triton", "integrations", "docs")]

# Files are handed to the test processes whole: the longest first, or one process works on alone in the end.
LONGEST = (
    *("simt/test_sanitized.py", "triton/test_mutants.py", "simt/test_mutants.py", "triton/test_aot.py"),
    *("detection/test_learning.py", "detection/test_full_size.py", "triton/test_interpreter.py"),
    *("detection/test_processes.py", "simt/test_coverage.py", "experiments/test_commands.py"),
)


def pytest_configure():
    """The tests of a clone would pass on the code of another checkout, which is installed in place."""
    for name in ("ioubal_kernels", "ioubal_kernels.bench", "ioubal_kernels.triton_kernels"):
        spec = importlib.util.find_spec(name)  # imports no torch
        home = Path(spec.origin).resolve().parents[1] if spec is not None and spec.origin else ROOT
        if home != ROOT and (home / "pyproject.toml").is_file():  # site-packages has none
            raise pytest.UsageError(
                f"tests: {name}: expected that of {ROOT} (make build) or a wheel's, got that of {home}"
            )


def pytest_collection_modifyitems(items):
    def place(item):
        path = Path(item.fspath).as_posix()
        return next((i for i, name in enumerate(LONGEST) if path.endswith(name)), len(LONGEST))

    items.sort(key=place)  # stable: within a file, and among the others, the order stays
