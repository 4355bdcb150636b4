"""Installs ONE wheel into fresh environments of several Pythons and torch versions; tools/wheel_smoke.py runs in each.

    python tools/wheel_matrix.py [--python 3.10 3.11 ...] [--torch 2.11 2.13 newest] [--strict]

A cell is passed, failed, or not run, with the reason: an interpreter that is not here, a torch without a build for it.
One environment exists at a time. torch comes from its index of CPU builds where that can be reached, else from pip's
own index, as a CUDA build, which imports only beside NVIDIA's libraries: these do not depend on the Python, so the
cells of one torch share one folder of them. Triton is left out: nothing here runs on a GPU. Exit status 1: a cell
failed, or none passed; with --strict also if one was not run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = ("2.11", "2.13", "newest")
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
GPU_ONLY = ("nvidia-", "cuda-", "triton")  # what begins so is not needed to import a CPU build
NO_BUILD = ("no matching distribution", "could not find a version")
SPACE_GB = 8.0  # one environment (2), one folder of NVIDIA's libraries (4), pip at work

# Run by the new environment's Python: torch's requirements that hold there, in two groups.
REQUIREMENTS = """
import json, sys
from importlib import metadata
from pip._vendor.packaging.requirements import Requirement
listed = [Requirement(text) for text in metadata.requires("torch") or []]
held = [each for each in listed if each.marker is None or each.marker.evaluate({"extra": ""})]
for each in held:
    each.marker = None
print(json.dumps({"version": metadata.version("torch"), "requires": [str(each) for each in held]}))
"""


@dataclass
class Cell:
    """One Python with one torch, and what came of it."""

    python: str
    torch: str  # as asked for
    result: str = "not run"  # or "passed", "failed"
    reason: str = ""  # for what is not passed
    found: dict = field(default_factory=dict)  # the smoke test's report
    seconds: float = 0.0


class NotRun(Exception):
    """The cell cannot be tried here; the message says why."""


class Failed(Exception):
    """The wheel failed in this cell; the message says how."""


def find_python(version: str) -> str | None:
    """An interpreter of this version: on PATH, in pyenv's folder, or one that uv knows."""
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    candidates = [shutil.which(f"python{version}")]
    candidates += sorted(map(str, root.glob(f"versions/{version}.*/bin/python")), reverse=True)
    if shutil.which("uv"):
        asked = subprocess.run(["uv", "python", "find", "--no-project", version], capture_output=True, text=True)
        candidates.append(asked.stdout.strip() if asked.returncode == 0 else None)
    code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    for path in filter(None, candidates):  # a pyenv shim of a version that is not selected is on PATH and fails
        try:
            asked = subprocess.run([path, "-c", code], capture_output=True, text=True, timeout=30)
        except OSError:
            continue
        if asked.returncode == 0 and asked.stdout.strip() == version:
            return path
    return None


def reachable(index: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(index + "/torch/", method="HEAD"), timeout=10):
            return True
    except (urllib.error.URLError, OSError):
        return False


def run(command: list[object], cwd: Path) -> subprocess.CompletedProcess[str]:
    """In a clean environment: neither a build option nor a module path of the caller's reaches the cell."""
    dropped = ("IOUBAL_", "PYTHON", "CUDA_", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    clean.update(OMP_NUM_THREADS="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
    return subprocess.run([str(part) for part in command], cwd=cwd, env=clean, capture_output=True, text=True)


def tail(done: subprocess.CompletedProcess[str], lines: int = 6) -> str:
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return " | ".join(line.strip() for line in said[-lines:])


class Matrix:
    """The cells, one after another, in one working folder."""

    def __init__(self, wheel: Path, work: Path, index: str | None) -> None:
        self.wheel, self.work, self.index = wheel, work, index
        self.env = work / "env"

    def try_cell(self, cell: Cell) -> None:
        """Fill in what comes of it. The environment is gone afterwards."""
        began = time.monotonic()
        try:
            cell.found = self.cell(cell)
            cell.result = "passed"
        except NotRun as error:
            cell.result, cell.reason = "not run", str(error)
        except Failed as error:
            cell.result, cell.reason = "failed", str(error)
        finally:
            shutil.rmtree(self.env, ignore_errors=True)
        cell.seconds = round(time.monotonic() - began, 1)

    def cell(self, cell: Cell) -> dict:
        interpreter = find_python(cell.python)
        if interpreter is None:
            raise NotRun(f"no Python {cell.python} with venv found (PATH, PYENV_ROOT, uv)")
        shutil.rmtree(self.env, ignore_errors=True)
        self.work.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.work).free / 1e9
        if free < SPACE_GB:
            raise NotRun(f"{free:.1f} GB of disk free, {SPACE_GB:.0f} needed")
        made = run([interpreter, "-m", "venv", self.env], self.work)
        if made.returncode != 0:
            raise NotRun(f"no environment could be made: {tail(made)}")
        self.install_torch(cell.torch)
        installed = self.pip("--no-deps", self.wheel)
        if installed.returncode != 0:
            raise Failed(f"the wheel does not install: {tail(installed)}")
        done = run([self.env / "bin" / "python", "-I", ROOT / "tools" / "wheel_smoke.py"], self.work)
        if done.returncode != 0:
            raise Failed(tail(done, lines=12))
        return json.loads(done.stdout.splitlines()[-1])

    def pip(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return run([self.env / "bin" / "python", "-m", "pip", "install", "-q", "--no-compile", *arguments], self.work)

    def install_torch(self, wanted: str) -> None:
        """torch itself, then what it requires."""
        index = ["-i", self.index] if self.index else []
        done = self.pip("--no-deps", *index, "torch" if wanted == "newest" else f"torch=={wanted}.*")
        if done.returncode != 0:
            none = any(text in (done.stdout + done.stderr).lower() for text in NO_BUILD)
            raise NotRun("torch has no build for it" if none else f"torch could not be installed: {tail(done)}")
        asked = run([self.env / "bin" / "python", "-c", REQUIREMENTS], self.work)
        if asked.returncode != 0:
            raise NotRun(f"torch's requirements could not be read: {tail(asked)}")
        requires = json.loads(asked.stdout)["requires"]
        plain = [each for each in requires if not each.startswith(GPU_ONLY)]
        done = self.pip("numpy", *plain)
        if done.returncode != 0:
            raise NotRun(f"torch's requirements could not be installed: {tail(done)}")
        # cuda-bindings is for Python code that calls CUDA, and is built for each Python.
        libraries = [each for each in requires if each.startswith(("nvidia-", "cuda-toolkit"))]
        if libraries:
            (self.site_packages() / "nvidia").symlink_to(self.nvidia_libraries(libraries))

    def site_packages(self) -> Path:
        (found,) = self.env.glob("lib/python*/site-packages")
        return found

    def nvidia_libraries(self, requirements: list[str]) -> Path:
        """The folder of these packages' files; any other one is removed first, it belongs to another torch."""
        name = f"nvidia-{hashlib.sha256(json.dumps(sorted(requirements)).encode()).hexdigest()[:12]}"
        shared = self.work / name
        if not shared.exists():
            self.remove_libraries()
            aside = self.work / f"{name}.partial"
            done = self.pip("--target", aside, *requirements)
            if done.returncode != 0:
                raise NotRun(f"NVIDIA's libraries could not be installed: {tail(done)}")
            aside.rename(shared)
        return shared / "nvidia"

    def remove_libraries(self) -> None:
        for old in self.work.glob("nvidia-*"):
            shutil.rmtree(old)


def table(cells: list[Cell]) -> str:
    """Rows are Pythons, columns torch versions; below it the reason for each cell that is not passed."""
    pythons, torches = (list(dict.fromkeys(getattr(cell, name) for cell in cells)) for name in ("python", "torch"))
    by_place = {(cell.python, cell.torch): cell for cell in cells}

    def shown(cell: Cell | None) -> str:
        if cell is None:
            return ""
        return f"{cell.result} ({cell.found['torch']})" if cell.found else cell.result

    lines = ["| Python | " + " | ".join(f"torch {name}" for name in torches) + " |", "|---" * (len(torches) + 1) + "|"]
    for python in pythons:
        lines.append(f"| {python} | " + " | ".join(shown(by_place.get((python, torch))) for torch in torches) + " |")
    counts = {result: sum(cell.result == result for cell in cells) for result in ("passed", "failed", "not run")}
    lines += ["", ", ".join(f"{count} {result}" for result, count in counts.items())]
    lines += [f"Python {c.python}, torch {c.torch}: {c.result}: {c.reason}" for c in cells if c.result != "passed"]
    return "\n".join(lines)


def verdict(cells: list[Cell], strict: bool) -> int:
    results = [cell.result for cell in cells]
    return int("failed" in results or "passed" not in results or (strict and "not run" in results))


def write(path: Path, wheel: Path, cells: list[Cell]) -> None:
    report = {
        "wheel": wheel.name,
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "cells": [asdict(cell) for cell in cells],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="default: the one in dist/")
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="X.Y")
    parser.add_argument("--torch", nargs="+", default=TORCHES, metavar="X.Y|newest")
    parser.add_argument("--index", default=CPU_BUILDS, help="torch's CPU builds; not reached: pip's own index")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "wheel-matrix", help="emptied at the end")
    parser.add_argument("--json", type=Path, default=ROOT / "dist" / "wheel-matrix.json", help="the results")
    parser.add_argument("--strict", action="store_true", help="a cell that is not run is an error")
    options = parser.parse_args(arguments)
    wheels = [options.wheel] if options.wheel else sorted((ROOT / "dist").glob("ioubal_kernels-*.whl"))
    if len(wheels) != 1 or not wheels[0].is_file():
        parser.error(f"expected one wheel, found {[str(path) for path in wheels]}; `make wheel` builds it into dist/")
    wheel = wheels[0].absolute()
    index = options.index if reachable(options.index) else None
    print(f"{wheel.name}; torch from {index or 'the index that pip is configured for'}", flush=True)
    matrix = Matrix(wheel, options.work.absolute(), index)
    cells = [Cell(python, torch) for torch in options.torch for python in options.python]  # torch by torch: see above
    try:
        for cell in cells:
            matrix.try_cell(cell)
            write(options.json, wheel, cells)  # what was found before an interruption is kept
            note = cell.reason or f"torch {cell.found['torch']}, Python {cell.found['python']}"
            print(f"Python {cell.python}, torch {cell.torch}: {cell.result}, {cell.seconds:.0f} s: {note}", flush=True)
    finally:
        shutil.rmtree(matrix.work, ignore_errors=True)
    print("\n" + table(cells))
    return verdict(cells, options.strict)


if __name__ == "__main__":
    sys.exit(main())
