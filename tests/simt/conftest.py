"""The emulated CUDA kernels, for the tests of this folder that ask for them."""

import emulation
import pytest

from ioubal_kernels import ops


@pytest.fixture
def kernels():
    """backend="cpu" runs the CUDA kernels, launchers included, over emulated threads."""
    reason = emulation.unavailable() or ops.load_error("cpu")
    if reason:
        pytest.skip(reason)
    with emulation.emulated(emulation.build()) as kernels:
        yield kernels
