"""How setup.py chooses and builds the CUDA library. A script stands for both compilers, so that each build is quick."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DEFAULT = ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_120"]
BUILD = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]


class Checkout:
    """A copy of the build with one source per library, a torch that is nothing but a version, and stub compilers."""

    def __init__(self, building: ModuleType, folder: Path) -> None:
        self.run, self.folder, self.tools = building.run, folder / "the checkout", folder / "tools"
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "ioubal_kernels/_version.py"):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(building.ROOT / name, self.folder / name)
        (self.folder / "ioubal_kernels" / "__init__.py").touch()
        for name in ("csrc/cpu/one.cpp", "csrc/cpu/header.h", "csrc/cuda/one.cu", "csrc/cuda/header.h"):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).touch()
        for name in ("nvcc", "c++"):
            (self.tools / "bin").mkdir(parents=True, exist_ok=True)
            shutil.copy2(Path(__file__).with_name("stub_compiler.sh"), self.tools / "bin" / name)
            (self.tools / "bin" / name).chmod(0o755)
        self.torch("2.11.0+cu130", "'13.0'")

    def torch(self, version: str, cuda: str) -> None:
        (self.tools / "torch").mkdir(exist_ok=True)
        (self.tools / "torch" / "__init__.py").touch()
        (self.tools / "torch" / "version.py").write_text(
            f"__version__ = '{version}'\ncuda: Optional[str] = {cuda}\ngit_version = '70d9'\n"
        )

    def build(self, expect: int = 0, command: list[object] = BUILD, **environment: str) -> str:
        """Everything that the build prints."""
        stubs = {
            "IOUBAL_BUILD_CUDA": "auto",
            "CUDA_HOME": str(self.tools),
            "CXX": f"'{self.tools / 'bin' / 'c++'}'",
            "PYTHONPATH": str(self.tools),
            "STUB_LOG": str(self.tools / "log"),
        }
        done = self.run(command, self.folder, expect=expect, **{**stubs, **environment})
        return done.stdout + done.stderr

    def calls(self, name: str) -> list[str]:
        """The command lines of a compiler, the latest build's last."""
        start = str(self.tools / "bin" / name)
        return [line for line in (self.tools / "log").read_text().splitlines() if line.startswith(start)]

    def info(self) -> dict[str, Any]:
        return json.loads((self.folder / "ioubal_kernels" / "_build_info.json").read_text())

    def libraries(self) -> set[str]:
        return {path.name for path in (self.folder / "ioubal_kernels").glob("*.so")}


@pytest.fixture
def checkout(building: ModuleType, tmp_path: Path) -> Checkout:
    return Checkout(building, tmp_path)


def test_both_libraries_by_default(checkout: Checkout) -> None:
    """For all architectures, PTX of the newest; on the console the compiler's warnings, its report in a file."""
    shown = checkout.build()
    assert checkout.libraries() == {"_ioubal_cpu.so", "_ioubal_cuda.so"}
    info = checkout.info()["cuda"]
    assert info["built"] is True and info["reason"] is None and info["nvcc"] == "13.0"
    assert info["architectures"] == DEFAULT
    compiled, linked = checkout.calls("nvcc")
    for name in DEFAULT:
        assert f"-gencode=arch=compute_{name.split('_')[1]},code={name}" in compiled.split()
    for flag in ("-O3", "-std=c++17", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Icsrc"):
        assert flag in compiled.split()
    assert f"-ccbin={checkout.tools / 'bin' / 'c++'}" in compiled
    assert f"-isystem {checkout.tools / 'torch' / 'include'}" in compiled
    assert "-cudart=static" in compiled.split() and "-cudart=static" in linked.split()
    assert "ptxas warning : stub warning" in shown and "ptxas info" not in shown and "stack frame" not in shown
    (report,) = (checkout.folder / "build" / info["folder"]).glob("*.ptxas.txt")
    assert report.name == "one.ptxas.txt" and len(report.read_text().splitlines()) == 3


def test_only_what_changed_is_compiled(checkout: Checkout) -> None:
    checkout.build()
    library = checkout.folder / "ioubal_kernels" / "_ioubal_cuda.so"
    before, count = library.stat().st_mtime_ns, len(checkout.calls("nvcc"))
    assert "CUDA library: up to date" in checkout.build()
    assert library.stat().st_mtime_ns == before and len(checkout.calls("nvcc")) == count
    os.utime(checkout.folder / "csrc" / "cuda" / "header.h")
    shown = checkout.build()
    assert "CUDA library: 1 of 1 sources compiled" in shown and "CPU library: up to date" in shown
    assert library.stat().st_mtime_ns > before


def test_another_flag_another_folder(checkout: Checkout) -> None:
    """Also where nvcc takes it from the environment by itself; MAX_JOBS is no such flag."""
    folders = []
    for environment in ({}, {"MAX_JOBS": "7"}, {"TORCH_CUDA_ARCH_LIST": "9.0"}, {"NVCC_APPEND_FLAGS": "-lineinfo"}):
        checkout.build(**environment)
        folders.append(checkout.info()["cuda"]["folder"])
    assert folders[0] == folders[1] and len(set(folders)) == 3
    assert (checkout.folder / "build" / folders[0]).is_dir()


def test_cores_are_shared_out(checkout: Checkout) -> None:
    """Fewer sources than cores: each call of nvcc compiles several architectures at a time."""
    (checkout.folder / "csrc" / "cuda" / "two.cu").touch()
    checkout.build(MAX_JOBS="6")
    assert [line for line in checkout.calls("nvcc")[:2] if "--threads=3" not in line.split()] == []


def test_flags_for_the_host_compiler(checkout: Checkout) -> None:
    checkout.build(CPPFLAGS="-DONE=1", CXXFLAGS="-g1", LDFLAGS="-Wl,-z,now")
    compiled, linked = (line.split() for line in checkout.calls("nvcc"))
    assert "-Xcompiler=-DONE=1" in compiled and "-Xcompiler=-g1" in compiled
    assert r"-Xcompiler=-Wl\,-z\,now" in linked


def test_off(checkout: Checkout) -> None:
    """The library of an earlier build goes."""
    checkout.build()
    shown = checkout.build(IOUBAL_BUILD_CUDA="0")
    assert "NOTE: no CUDA library: IOUBAL_BUILD_CUDA=0 was set" in shown
    assert checkout.libraries() == {"_ioubal_cpu.so"}
    assert checkout.info()["cuda"] == {"built": False, "reason": "IOUBAL_BUILD_CUDA=0 was set"}


ABSENT = {
    "no nvcc": ({"CUDA_HOME": "/nonexistent"}, r"no nvcc found \(CUDA_HOME=/nonexistent\)"),
    "nvcc of another CUDA": ({"STUB_RELEASE": "12.6"}, r"\S+nvcc is of CUDA 12\.6, torch 2\.11\.0\+cu130 of CUDA 13"),
    "unknown architecture": ({"TORCH_CUDA_ARCH_LIST": "6.0"}, r"nvcc cannot compile for sm_60 \(TORCH_CUDA_ARCH_LIST"),
    "only unknown ones": ({"STUB_CODES": "sm_150"}, r"nvcc cannot compile for sm_75, only for sm_150"),
    "broken source": (
        {"STUB_BROKEN": "csrc/cuda/one.cu"},
        r"compiling csrc/cuda/one\.cu failed: .*\"nonsense\" is undef",
    ),
}


@pytest.mark.parametrize("case", ABSENT)
def test_what_prevents_it(checkout: Checkout, case: str) -> None:
    """By default the CPU library all the same, and the reason; an error where the library is required."""
    environment, words = ABSENT[case]
    shown = checkout.build(**environment)
    assert re.search(f"NOTE: no CUDA library: {words}", shown), shown
    assert checkout.libraries() == {"_ioubal_cpu.so"}
    info = checkout.info()
    assert info["cpu"]["built"] and not info["cuda"]["built"] and re.match(words, info["cuda"]["reason"])
    shown = checkout.build(expect=1, IOUBAL_BUILD_CUDA="1", **environment)
    assert re.search(f"the CUDA library cannot be built: {words}.*IOUBAL_BUILD_CUDA=1 makes this an error", shown), (
        shown
    )


def test_torch_without_cuda(checkout: Checkout) -> None:
    checkout.torch("2.11.0+cpu", "None")
    assert "NOTE: no CUDA library: torch 2.11.0+cpu is not a CUDA build" in checkout.build()
    assert checkout.libraries() == {"_ioubal_cpu.so"}


def test_nonsense_is_an_error(checkout: Checkout) -> None:
    shown = checkout.build(expect=1, IOUBAL_BUILD_CUDA="yes")
    assert "IOUBAL_BUILD_CUDA: expected auto, 0 or 1, got 'yes'" in shown
    for text in ("9,0", "sm_90", "9.0+ptx", "8.0;hopper", ";"):
        shown = checkout.build(expect=1, TORCH_CUDA_ARCH_LIST=text)
        assert f"TORCH_CUDA_ARCH_LIST: expected versions such as '9.0' or '8.0;9.0+PTX', got {text!r}" in shown
        assert "Traceback" not in shown


LISTS = {
    "9.0": ["sm_90"],
    "8.0;9.0+PTX": ["sm_80", "sm_90", "compute_90"],
    "8.0 8.6+PTX 9.0a": ["sm_80", "sm_86", "sm_90a", "compute_86"],
    "Turing;12.0": ["sm_75", "sm_120", "compute_75"],
}


@pytest.mark.parametrize("text", LISTS)
def test_architecture_lists(checkout: Checkout, text: str) -> None:
    """As torch reads them."""
    checkout.build(IOUBAL_BUILD_CPU="0", TORCH_CUDA_ARCH_LIST=text)
    assert checkout.info()["cuda"]["architectures"] == LISTS[text]


def test_older_nvcc_leaves_the_newest_architectures_out(checkout: Checkout) -> None:
    checkout.torch("2.11.0+cu126", "'12.6'")
    checkout.build(IOUBAL_BUILD_CPU="0", STUB_RELEASE="12.4", STUB_CODES="sm_70\nsm_75\nsm_80\nsm_90")
    assert checkout.info()["cuda"]["architectures"] == ["sm_75", "sm_80", "sm_90", "compute_90"]


def test_a_wheel_has_what_was_built(checkout: Checkout, tmp_path: Path) -> None:
    """The platform's tag with one library or two; pure Python with neither, whatever earlier builds left."""
    for cpu, cuda in (("1", "1"), ("0", "1"), ("1", "0"), ("0", "0")):
        folder = tmp_path / f"wheel-{cpu}{cuda}"
        command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", folder]
        checkout.build(command=command, IOUBAL_BUILD_CPU=cpu, IOUBAL_BUILD_CUDA=cuda)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as opened:
            found = {name.split("/")[1] for name in opened.namelist() if name.endswith(".so")}
        wanted = [("_ioubal_cpu.so", cpu), ("_ioubal_cuda.so", cuda)]
        assert found == {name for name, built in wanted if built == "1"}
        assert wheel.name.endswith("-py3-none-any.whl") == (not found)
