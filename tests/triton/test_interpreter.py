"""The kernels in Triton's interpreter: the public functions with backend="triton" on CPU tensors, in processes of their
own. Every tensor ends at a page that must not be touched; what is not written is NaN."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Selections within interpreted/ and the least number of cases: quick ones, then the rest of the detection loss.
QUICK = {
    "detection": ("test_detection.py", "parity and not (nchw and fovea) or nothing_there or bitwise", 50),
    "focal": ("test_flat.py", "focal or addresses", 150),
    "other flat losses, boxes": ("test_flat.py", "not (focal or addresses)", 100),
    "hostile": ("test_hostile.py", "not extreme", 47),
    "matching": ("test_matching.py", "not drawn_batches", 70),
}
SLOW = {
    "extreme logits": ("test_hostile.py", "extreme", 24),
    "matching": ("test_matching.py", "drawn_batches", 40),
    "detection": ("test_detection.py", "not (parity or nothing_there or bitwise) or nchw and fovea", 59),
}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=1200)


def check(file: str, selection: str, least: int) -> None:
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore", "-k", selection)
    done = run("-m", "pytest", *options, str(HERE / "interpreted" / file))
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= least, done.stdout[-500:]


@pytest.mark.parametrize("name", QUICK)
def test_parity(name: str) -> None:
    check(*QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_parity(name: str) -> None:
    check(*SLOW[name])


PROBE = """
import torch, guarded, interpreter
import triton, triton.language as tl

interpreter.install()

@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)

x, y = guarded.storage(100, torch.float32, 0), guarded.storage(100, torch.float32, 0)
copy[(1,)](x, y, 100, 128)
print("within bounds", flush=True)
copy[(1,)]({arguments}, 101, 128)
print("not noticed")
"""


@pytest.mark.parametrize("arguments", ("x, torch.zeros(101)", "torch.zeros(101), y"), ids=("read", "write"))
def test_an_access_out_of_bounds_is_a_crash(arguments: str, tmp_path: Path) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE.format(arguments=arguments), encoding="utf-8")
    done = run(str(probe))
    assert done.returncode < 0 and "within bounds" in done.stdout and "not noticed" not in done.stdout, done.stderr


def test_the_interpreter_is_taken_by_name_only() -> None:
    """CPU tensors are not sent to an interpreter unasked; without it the backend takes CUDA tensors only."""
    code = (
        "import torch\nfrom ioubal_kernels import backends\nfor name in (None, 'triton'):\n"
        "    print(backends.choose('op', name, torch.device('cpu'), False).__name__)\n"
    )
    done = run("-c", code)
    automatic, named = done.stdout.split()
    assert not automatic.endswith("with_triton") and named == "ioubal_kernels.ops.with_triton", done.stderr
