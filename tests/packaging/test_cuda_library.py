"""The CUDA library that was built here, without a GPU: it loads, is complete, its machine code is what it should be.

Skipped where it cannot be built (no nvcc, torch without CUDA) or was switched off; where nvcc is, its absence fails.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import ioubal_kernels
from ioubal_kernels import doctor
from ioubal_kernels.ops import library

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(ioubal_kernels.__file__).parent / "_ioubal_cuda.so"
INFO = library.build_info().get("cuda", {})


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    if torch.version.cuda is None:
        pytest.skip("torch here is not a CUDA build")
    if "_BUILD_CUDA=0" in (INFO.get("reason") or ""):
        pytest.skip(INFO["reason"])
    if not LIBRARY.is_file():
        if doctor.nvcc().startswith("not found"):
            pytest.skip("no nvcc here")
        pytest.fail(f"nvcc is here, but the CUDA library was not built: {INFO.get('reason')}")


PROBE = """
import json, sys
import torch
import ioubal_kernels
from ioubal_kernels import backends
from ioubal_kernels.ops import library
names = [schema.split("(")[0].replace("OVERLOAD", library.OVERLOAD["cuda"]) for schema in library.SCHEMAS]
kernels = {n: torch._C._dispatch_has_kernel_for_dispatch_key(f"ioubal::{n}", "CUDA") for n in names}
found = dict(error=library.load_error("cuda"), kernels=kernels, reason=backends.unavailable_reason("cuda"))
json.dump(found, open(sys.argv[1], "w"))
"""


def test_loads_without_a_gpu_and_is_complete(building: ModuleType, tmp_path: Path) -> None:
    """Every op has a CUDA kernel; the backend says that nothing but the GPU is missing."""
    out = tmp_path / "found.json"
    place = str(LIBRARY.parent.parent)
    building.run([sys.executable, "-c", PROBE, out], tmp_path, PYTHONPATH=place, CUDA_VISIBLE_DEVICES="")
    found = json.loads(out.read_text())
    assert found["error"] is None
    assert found["reason"].startswith("built, but no GPU usable here")
    assert [name for name, there in found["kernels"].items() if not there] == []


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_brings_its_own_cuda_runtime() -> None:
    """The runtime is inside, and hidden: neither needed from elsewhere nor in the way of another copy."""
    dynamic = subprocess.run(["readelf", "-d", LIBRARY], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert [name for name in needed if name.startswith(("libcudart", "libcuda.", "libc10_cuda", "libpython"))] == []
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= set(needed)
    symbols = subprocess.run(
        ["readelf", "-W", "--dyn-syms", LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    assert not re.search(r" cuda[A-Z]\w+$", symbols, re.MULTILINE)


def test_no_warnings_in_the_build() -> None:
    """Neither of the compilers nor of ptxas (spills, local memory): their reports are kept beside the objects."""
    folder = ROOT / "build" / INFO.get("folder", "none")
    if not folder.is_dir():
        pytest.skip("built elsewhere")
    found = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        text = (folder / f"{source.stem}.ptxas.txt").read_text(encoding="utf-8")
        assert "ptxas info" in text
        found += [line for line in text.splitlines() if re.search(r"warning|error|Potential Performance Loss", line)]
    assert found == []


def test_architectures(cuda_code: ModuleType) -> None:
    """Code for each architecture that the build says, and for no other: linking must not add its default."""
    listed = "".join(
        cuda_code.output_of([cuda_code.find_tool("cuobjdump"), option, str(LIBRARY)]) for option in ("-lelf", "-lptx")
    )
    machine = set(re.findall(r"\.(sm_\d+[af]?)\.cubin", listed))
    virtual = {f"compute_{number}" for number in re.findall(r"\.sm_(\d+[af]?)\.ptx", listed)}
    assert machine | virtual == set(INFO["architectures"])


@pytest.mark.slow
def test_machine_code_holds_its_budget(cuda_code: ModuleType) -> None:
    """What `make cuda-code` checks; `python tools/cuda_code.py --write` after a change that is meant."""
    table, budget = cuda_code.read(LIBRARY), cuda_code.load_budget()
    found = cuda_code.violations(table, budget, INFO.get("nvcc"))
    assert found == [], "\n".join(found)
