"""These tests need the compiled CPU library; each runs on every instruction set of this CPU."""

import emulation
import pytest
import torch

from ioubal_kernels import ops
from ioubal_kernels.ops.library import BEST_ISA, limit_isa, limit_table

NEEDED = ops.load_error("cpu")
EMULATED = "cuda (emulated)"


def pytest_collection_modifyitems(config, items):
    if NEEDED:
        for item in items:
            if "tests/ops" in str(item.path).replace("\\", "/"):
                item.add_marker(pytest.mark.skip(reason=NEEDED))
    # CUDA has no float64.
    impossible = [item for item in items if _is_emulated_float64(item)]
    if impossible:
        config.hook.pytest_deselected(items=impossible)
        items[:] = [item for item in items if not _is_emulated_float64(item)]


def _is_emulated_float64(item):
    given = getattr(getattr(item, "callspec", None), "params", {})
    return given.get("kernels") == EMULATED and given.get("dtype") is torch.float64


@pytest.fixture(params=("cpu", EMULATED))
def kernels(request):
    """What backend="cpu" runs: the C++ library, or the CUDA kernels, launchers included, over emulated threads."""
    if request.param == "cpu":
        yield
        return
    reason = emulation.unavailable()
    if reason is not None:
        pytest.skip(reason)
    with emulation.emulated(emulation.build()) as kernels:
        yield kernels


@pytest.fixture(autouse=True)
def process_settings():
    """Leaves the best instruction set selected and torch's threads as they were, whatever a test chose."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if not NEEDED:
        limit_isa(BEST_ISA)
        limit_table(-1)
