"""The CPU library's sources under other compilers than the one at hand."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest


def test_what_gcc_11_lacks_has_a_substitute(building: ModuleType) -> None:
    """Ubuntu 22.04's GCC has no __builtin_shufflevector."""
    sources = (building.ROOT / "csrc" / "cpu").iterdir()
    assert {path.name for path in sources if "__builtin_shufflevector" in path.read_text()} == {"shuffle.h"}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["x86_64-macos", "aarch64-macos"])
def test_clang_compiles_every_source(building: ModuleType, sources: Path, tmp_path: Path, target: str) -> None:
    """For x86-64 and for 64-bit ARM, with macOS's headers: ziglang from PyPI is clang with those of many platforms.

    Compiled and not linked, since torch's libraries are those of this platform; without optimisation, which takes a
    tenth of the time and refuses the same code.
    """
    for built in (sources / "build").glob("cpu-*/*.o"):
        built.unlink()
    shown = building.run(
        [sys.executable, "setup.py", "build_ext"],
        sources,
        CXX=f"'{sys.executable}' -m ziglang c++ -target {target}",
        CXXFLAGS="-O0 -fno-sanitize=all -Wall -Werror",  # zig checks for undefined behaviour unless told not to
        LDFLAGS="--not-an-option",  # so that linking fails at once
        ZIG_GLOBAL_CACHE_DIR=str(tmp_path / "cache"),
        ZIG_LOCAL_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert "linking the CPU library failed" in shown.stdout, shown.stdout + shown.stderr
    compiled = {path.stem for path in (sources / "build").glob("cpu-*/*.o")}
    assert compiled == {path.stem for path in (sources / "csrc" / "cpu").glob("*.cpp")}
