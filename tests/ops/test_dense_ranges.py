"""What a chunk of logits is found to be decides how the dense pass computes it on the CPU, never what comes out."""

import pytest
import torch
from dense_focal import background_focal

from ioubal_kernels.ops import library

ENTRIES = 2048  # several chunks of every instruction set
INFINITY = float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GAMMAS = (0.0, 1.0, 2.0, 1.5, 7.0)


def logits(dtype):
    x = torch.empty(ENTRIES, 1).normal_(-4.6, 2.0, generator=torch.Generator().manual_seed(0))
    return x.clamp(max=-0.01).to(dtype)


def nan_with_a_sign(dtype):
    bits = {
        torch.float32: (torch.int32, -0x400000),
        torch.bfloat16: (torch.int16, -64),
        torch.float16: (torch.int16, -512),
    }
    container, pattern = bits[dtype]
    return torch.tensor(pattern, dtype=container).view(dtype)


# Among others: just below zero, far below it and beyond the exponential's range, above it, near overflow, no numbers.
@pytest.mark.parametrize("value", (-0.0, -20.0, -90.0, -INFINITY, 0.5, 60.0, 1e30, INFINITY, float("nan")))
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_logit_has_the_same_gradient_beside_any_other(dtype, gamma, value):
    x = logits(dtype)
    for variant in library.cpu_variants(dtype):
        _, alone = background_focal(x, gamma)
        for place in (0, 517, ENTRIES - 1):
            mixed = x.clone()
            mixed[place] = value
            _, beside = background_focal(mixed, gamma)
            beside[place] = alone[place]
            assert torch.equal(beside, alone), f"{variant}: entries beside {value} at {place}"


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_behind_a_larger_logit_is_met(dtype, gamma):
    """As an integer a NaN with a sign lies below a positive number in the same lane of another line of the chunk."""
    line = 64 // dtype.itemsize
    x = logits(dtype)
    for variant in library.cpu_variants(dtype):
        _, alone = background_focal(x, gamma)
        for distance in (line, -line, 3 * line):
            bad = x.clone()
            bad[517], bad[517 + distance] = nan_with_a_sign(dtype), 0.5
            loss, grad = background_focal(bad, gamma)
            assert loss.isnan() and grad[517].isnan(), f"{variant}: {distance} entries from a positive logit"
            grad[517], grad[517 + distance] = alone[517], alone[517 + distance]
            assert torch.equal(grad, alone), variant
