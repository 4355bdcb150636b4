"""The backends that these tests run on."""

from collections.abc import Iterator

import pytest
import torch

from ioubal_kernels import backends

BACKENDS = ("reference", "cpu")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; skipped, with the reason, where it is not built."""
    reason = backends.unavailable_reason(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: waking other threads costs more than the work, most of all beside other test processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
