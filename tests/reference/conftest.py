"""The backends that these tests run on."""

import pytest

from ioubal_kernels import backends

BACKENDS = ("reference", "cpu")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; skipped, with the reason, where it is not built."""
    reason = backends.unavailable_reason(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param
