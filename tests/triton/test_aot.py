"""Machine code of every Triton kernel, compiled without a GPU: registers, spills, wide accesses."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

AOT = Path(__file__).with_name("aot.py")
BUDGET = Path(__file__).with_name("triton_budget.json")
ROOT = AOT.parents[2]
CAPABILITIES = (80, 90, 100)
DTYPES = ("float32", "bfloat16", "float16")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not sys.platform.startswith("linux"),
    reason="triton compiles on Linux",
)


def gate(*arguments: str) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(ROOT / "build" / "triton-cache")}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(AOT), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=1800,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert "kernels within the budget" in done.stdout


def run(code: str) -> None:
    """In a process that may import aot."""
    environment = {**os.environ, "PYTHONPATH": str(AOT.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("case", ("detection flat", "detection nchw"))
def test_the_fused_loss_keeps_its_budget(case: str) -> None:
    gate("--capability", "90", "--dtype", "bfloat16", "--case", case)


@pytest.mark.parametrize("rule", ("retinanet", "ssd"))
def test_matching_keeps_its_budget_and_contracts_nothing(rule: str) -> None:
    gate("--capability", "90", "--dtype", "float32", "--case", f"matching {rule}")


def test_the_gate_sees_a_contraction() -> None:
    """Without the option that forbids it, the compiler does contract these kernels' multiply-adds."""
    code = """
import aot
from ioubal_kernels.triton_kernels import _launch
_launch.EXACT.clear()
found = aot.compile_all(90, ["float32"], ["matching retinanet"])
inexact = {name.split(": ")[1]: got["inexact"] for name, got in found.items()}
assert inexact["match_kernel #1"] and inexact["match_best_kernel #1"] and inexact["match_fovea_kernel #1"], inexact
"""
    run(code)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_keeps_its_budget(capability: int) -> None:
    """For every dtype; of Hopper every variant, of the others as few as launch every kernel."""
    core = () if capability == 90 or os.environ.get("IOUBAL_ALL") else ("--core",)
    gate("--capability", str(capability), *core)


def test_the_budget_names_every_architecture_and_dtype() -> None:
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))
    heads = {" ".join(name.split()[:2]) for name in budget}
    assert heads == {f"sm_{capability} {dtype}" for capability in CAPABILITIES for dtype in DTYPES}


def test_the_core_launches_every_kernel() -> None:
    code = """
import aot
found = {}
for name in aot.read_budget():
    head, kernel = name.split(": ")
    found.setdefault(head.split(" ", 2)[2], set()).add(kernel.split(" #")[0])
assert set.union(*found.values()) == set.union(*(found[case] for case in aot.CORE)) and len(aot.CORE) < len(found)
"""
    run(code)


def test_the_passes_over_the_logits_read_and_write_16_bytes() -> None:
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))
    for name, (registers, loads, stores) in budget.items():
        assert registers <= 255
        if "dense_kernel #1" in name and "misaligned" not in name:  # there a gradient's phase is not the logits'
            assert loads > 0 and stores > 0, name


def test_the_gate_finds_what_it_should() -> None:
    code = """
import aot
good = {"registers": 40, "stack": 0, "local": 0, "wide_loads": 4, "wide_stores": 2, "float_atomics": 0,
        "inexact": 7}
budget = {"k: k #1": [40, 4, 2], "k: match_kernel #1": [40, 4, 2]}
assert aot.breaches({"k: k #1": good}, budget) == []
assert len(aot.breaches({"k: match_kernel #1": good}, budget)) == 1
for name, value in (("registers", 41), ("stack", 8), ("local", 1), ("wide_loads", 3), ("wide_stores", 0)):
    assert len(aot.breaches({"k: k #1": {**good, name: value}}, budget)) == 1, name
assert len(aot.breaches({"new: k #1": good}, budget)) == 1
for code in ("fma.rn.f32 %r1", "mul.f32 %r1", "add.ftz.f32 %r1", "div.full.f32 %r1", "sub.f64 %rd1", "max.ftz.f32 %r1"):
    assert aot.INEXACT.search(code), code
for code in ("mul.rn.f32 %r1", "div.rn.f32 %r1", "max.f32 %r1", "mad.lo.s32 %r1", "add.s32 %r1",
             "mul.wide.s32 %r1", "cvt.rpi.ftz.f32.f32 %r1"):
    assert not aot.INEXACT.search(code), code
for code in ("@%p1 ld.global.v4.b32 { %r1", "st.global.cs.v2.b64 [ %rd1", "ld.global.L1::evict_last.v8.b16 {"):
    assert aot.WIDE.search(code), code
for code in ("ld.global.v2.b32 {", "ld.global.b64 %rd1", "ld.shared.v4.b32 {", "st.shared.v4.b32 ["):
    assert not aot.WIDE.search(code), code
"""
    run(code)
