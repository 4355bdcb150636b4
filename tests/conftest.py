"""The helpers of tests/simt (CUDA kernels, used in tests/ops too), tests/triton and others: test folders are no
packages.
"""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parent / folder) for folder in ("ops", "simt", "triton", "integrations", "docs")]

# Files are handed to the test processes whole: the longest first, or one process works on alone in the end.
LONGEST = (
    *("simt/test_sanitized.py", "triton/test_mutants.py", "simt/test_mutants.py", "triton/test_aot.py"),
    *("detection/test_learning.py", "detection/test_full_size.py", "triton/test_interpreter.py"),
    *("detection/test_processes.py", "simt/test_coverage.py", "experiments/test_commands.py"),
)


def pytest_collection_modifyitems(items):
    def place(item):
        path = Path(item.fspath).as_posix()
        return next((i for i, name in enumerate(LONGEST) if path.endswith(name)), len(LONGEST))

    items.sort(key=place)  # stable: within a file, and among the others, the order stays
