"""Helpers of the packaging tests: a copy of the sources to build in, runs that show all their output when they fail."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCES = {".git", ".venv", "build", "dist", "runs", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}
BUILT = {"_build_info.json"}


def copy_sources(target: Path) -> Path:
    """The checkout as git sees it, new files that are not ignored included; without git, all but what was built."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0 and listed.stdout:
        names = [Path(name) for name in listed.stdout.split("\0") if name]
    else:
        names = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
        names = [name for name in names if not (NOT_SOURCES & set(name.parts)) and name.suffix != ".so"]
    for name in names:
        source = ROOT / name
        if source.is_file() and name.name not in BUILT:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    return target


def run(
    command: list[object], cwd: Path, expect: int | None = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command with `environment` added to a clean one; fail with all its output unless it exits with `expect`.

    Without the CUDA library, which takes minutes to build, unless IOUBAL_BUILD_CUDA asks for it.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("IOUBAL_", "MAKE", "MFLAGS", "CUDA_", "NVCC_", "TORCH_CUDA_"))
    }
    for name in ("CXX", "CPPFLAGS", "CXXFLAGS", "LDFLAGS", "PYTHONPATH", "PYTEST_ADDOPTS"):
        inherited.pop(name, None)
    everything = {**inherited, "IOUBAL_BUILD_CUDA": "0", **environment}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=everything, capture_output=True, text=True)
    if expect is not None and done.returncode != expect:
        raise AssertionError(f"exit status {done.returncode}: {command}\n{done.stdout}\n{done.stderr}")
    return done
