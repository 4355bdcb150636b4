"""These tests need the compiled CPU library; each runs on every instruction set of this CPU."""

import pytest

from ioubal_kernels import ops
from ioubal_kernels.ops.library import limit_isa

NEEDED = ops.load_error("cpu")


def pytest_collection_modifyitems(items):
    if NEEDED:
        for item in items:
            if "tests/ops" in str(item.path).replace("\\", "/"):
                item.add_marker(pytest.mark.skip(reason=NEEDED))


@pytest.fixture(autouse=True)
def best_isa():
    """Leaves the best instruction set selected, whatever a test chose."""
    yield
    if not NEEDED:
        limit_isa(5)
