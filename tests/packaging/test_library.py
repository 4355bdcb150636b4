"""The libraries' binary interface, and the package without them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import ioubal_kernels

PACKAGE = Path(ioubal_kernels.__file__).parent


@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("nm") is None, reason="needs Linux and nm")
@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_library_uses_the_stable_abi_only(name: str) -> None:
    """Of torch it needs C functions only, which keep their meaning over versions; of Python nothing."""
    library = PACKAGE / f"_ioubal_{name}.so"
    if not library.exists():
        pytest.skip(f"the {name.upper()} library is not built here")
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-1].split("@")[0] for line in listed.splitlines()]
    assert [name for name in symbols if re.match(r"(?:aoti_)?torch_", name)]
    assert [name for name in symbols if name.startswith(("Py", "_Py"))] == []
    torch_cpp = [name for name in symbols if re.match(r"_Z\w*?(?:2at|3c10|5torch|5caffe2)", name)]
    assert torch_cpp == [], "C++ symbols of torch are not stable between versions"


FALLBACK_PROBE = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, ioubal_kernels as ik
    quiet = len(caught)
    labels, iou = torch.tensor([0, -1]), torch.tensor([0.5, 0.9])
    values = []
    for _ in range(3):
        logits = torch.linspace(-2, 2, 6).reshape(2, 3).requires_grad_()
        loss = ik.iou_balanced_sigmoid_focal_loss(logits, labels, iou)
        loss.backward()
        values.append([float(loss), logits.grad.tolist()])
    reference = float(ik.iou_balanced_sigmoid_focal_loss(logits.detach(), labels, iou, backend="reference"))
    try:
        ik.iou_balanced_sigmoid_focal_loss(logits, labels, iou, backend="cpu")
        refusal = None
    except RuntimeError as error:
        refusal = str(error)
messages = [str(each.message) for each in caught[quiet:] if "ioubal" in str(each.message)]
found = dict(at_import=quiet, messages=messages, values=values, reference=reference, refusal=refusal)
json.dump(dict(found, file=ik.__file__), open(sys.argv[1], "w"))
"""


def copy_without_library(target: Path, reason: str) -> None:
    shutil.copytree(PACKAGE, target / "ioubal_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    info = {"cpu": {"built": False, "reason": reason}}
    (target / "ioubal_kernels" / "_build_info.json").write_text(json.dumps(info))


def test_without_the_library_one_warning_and_right_numbers(building: ModuleType, tmp_path: Path) -> None:
    """The first fallback call says once why and what to do; backend="cpu" by name is refused with the same reason."""
    copy_without_library(tmp_path, "no C++ compiler found (tried c++, g++ and clang++)")
    out = tmp_path / "found.json"
    building.run([sys.executable, "-c", FALLBACK_PROBE, out], tmp_path, PYTHONPATH=str(tmp_path))
    found = json.loads(out.read_text())
    assert Path(found["file"]).parent.parent == tmp_path
    assert found["at_import"] == 0
    (message,) = found["messages"]
    for text in (message, found["refusal"]):
        assert "pip install --no-build-isolation ." in text
        assert "no C++ compiler found" in text
    assert found["values"][0] == found["values"][1] == found["values"][2]
    assert found["values"][0][0] == found["reference"]


def test_a_library_that_does_not_load_falls_back(building: ModuleType, tmp_path: Path) -> None:
    """A damaged file, or one of another platform: the same warning, with the loader's words."""
    copy_without_library(tmp_path, "")
    (tmp_path / "ioubal_kernels" / "_ioubal_cpu.so").write_bytes(b"not a library")
    out = tmp_path / "found.json"
    building.run([sys.executable, "-c", FALLBACK_PROBE, out], tmp_path, PYTHONPATH=str(tmp_path))
    found = json.loads(out.read_text())
    (message,) = found["messages"]
    assert "_ioubal_cpu.so" in message and "pip install --no-build-isolation ." in message
    assert found["values"][0][0] == found["reference"]


def test_doctor_reports_everything_and_never_fails(building: ModuleType, tmp_path: Path) -> None:
    """Here, and in a copy without library, compiler, CUDA toolkit and extras."""
    from ioubal_kernels import doctor

    report = doctor.collect()
    assert json.loads(json.dumps(report)) == report
    assert {"reference", "cpu"} <= set(report["backends"])
    assert set(report["libraries"]) == {"cpu", "cuda"} and set(report["cuda"]) == {"torch built for", "driver", "GPUs"}
    copy_without_library(tmp_path, "IOUBAL_BUILD_CPU=0 was set")
    shown = building.run(
        [sys.executable, "-m", "ioubal_kernels.doctor"],
        tmp_path,
        PYTHONPATH=str(tmp_path),
        CXX="/nonexistent/c++",
        CUDA_HOME="/nonexistent",
        PATH="/nonexistent",
    ).stdout
    assert re.search(r"^  reference +available$", shown, re.MULTILINE)
    assert re.search(r"^  cpu +not available: .*IOUBAL_BUILD_CPU=0 was set", shown, re.MULTILINE)
    assert re.search(r"^  cuda +not available: ", shown, re.MULTILINE)
    assert "not found (CXX=/nonexistent/c++)" in shown
    assert "not found (CUDA_HOME or CUDA_PATH is /nonexistent)" in shown
    assert str(tmp_path) in shown


RUNS_ON = [
    (["sm_80"], (8, 6), True),
    (["sm_86"], (8, 0), False),
    (["sm_80"], (9, 0), False),
    (["sm_75", "sm_90a"], (9, 0), True),
    (["sm_100a"], (10, 3), False),
    (["sm_120"], (12, 1), True),
    (["sm_90", "compute_90"], (12, 0), True),
    (["sm_120", "compute_120"], (9, 0), False),
    ([], (9, 0), True),
]


@pytest.mark.parametrize(("architectures", "capability", "runs"), RUNS_ON)
def test_which_code_runs_where(architectures: list[str], capability: tuple[int, int], runs: bool) -> None:
    from ioubal_kernels import backends

    assert backends.runs_on(architectures, capability) == runs
