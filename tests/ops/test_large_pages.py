"""A large gradient in memory that is there already: its small pages are exchanged for huge ones, and nothing else."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE, COLLAPSE = 14, 25  # MADV_HUGEPAGE, MADV_COLLAPSE

# Prints how many KB of the process lie in huge pages before and after calls that write the same place for some seconds:
# in place, where the logits lie.
PROGRAM = """
import time
import torch
import ioubal_kernels as ik

def huge():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return int(next(line for line in lines if line.startswith("AnonHugePages")).split()[1])

def gradient(x, **options):
    return torch.autograd.grad(ik.iou_balanced_sigmoid_focal_loss(x, labels, iou, backend="cpu", **options), x)[0]

g = torch.Generator().manual_seed(0)
rows = (32 << 20) // 4 // 80
logits = torch.empty(rows, 80).normal_(-4, 1, generator=g)
x = logits.clone().requires_grad_()
labels = torch.where(torch.rand(rows, generator=g) < 0.001, 3, -1)
iou = torch.rand(rows, generator=g)
expected = gradient(logits.clone().requires_grad_())
before, calls, same = huge(), 0, True
end = time.monotonic() + 10
while time.monotonic() < end and huge() < before + 24_000:
    x.data.copy_(logits)
    same = same and torch.equal(gradient(x, inplace=True), expected)
    calls += 1
print(before, huge(), calls, same)
"""


def collapses() -> bool:
    """Whether this system exchanges pages at all."""
    if not sys.platform.startswith("linux") or not SETTING.is_file() or "[never]" in SETTING.read_text():
        return False
    libc, size = ctypes.CDLL(None, use_errno=True), 8 << 20
    memory = ctypes.create_string_buffer(b"\1" * size, size)
    first = -(-ctypes.addressof(memory) // (2 << 20)) * (2 << 20)
    block = ctypes.c_void_p(first), ctypes.c_size_t(4 << 20)
    return libc.madvise(*block, HUGE) == 0 and libc.madvise(*block, COLLAPSE) == 0


@pytest.mark.slow
def test_the_pages_of_a_gradient_that_comes_back_are_exchanged():
    if not collapses():
        pytest.skip("no MADV_COLLAPSE here (Linux 6.1), or huge pages are switched off")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    before, after, calls, same = run.stdout.split()
    assert int(after) >= int(before) + 24_000, f"{before} KB in huge pages, {after} KB after {calls} calls"
    assert same == "True"
