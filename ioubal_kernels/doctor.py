"""`ioubal doctor`: what this installation has and what it lacks, each with its reason.

Needs only the base install. `collect` and `main` never raise: whatever cannot be found out is reported as such.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
INSTRUCTION_SETS = {
    0: "baseline",
    2: "AVX2",
    4: "AVX-512",
    5: "AVX-512 with BF16",
    6: "AVX-512 with BF16, as on Zen 5",
}  # what torch.ops.ioubal.cpu_isa answers
EXTRAS = {
    "train": ("torchvision", "pycocotools", "typer", "rich", "matplotlib", "yaml", "PIL", "scipy"),
    "test": ("pytest", "xdist", "hypothesis"),
    "lint": ("ruff", "clang_format"),
    "docs": ("material", "mkdocstrings"),
}
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "PIL": "pillow",
    "xdist": "pytest-xdist",
    "clang_format": "clang-format",
    "material": "mkdocs-material",
}
# By default glibc returns big blocks to the system on free, and every step pays for fresh zeroed pages again.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "68719476736"}


def collect() -> dict[str, Any]:
    """Everything `ioubal doctor` prints, as plain values (JSON-serialisable). Never raises."""
    return {
        "ioubal_kernels": attempt(lambda: importlib.import_module("ioubal_kernels._version").__version__),
        "installed in": str(PACKAGE),
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": attempt(platform.platform),
        "torch": attempt(torch_version),
        "cpu": {
            "model": attempt(cpu_model),
            "cores": attempt(lambda: f"{usable_cores()} usable of {os.cpu_count()}"),
            "instruction sets used": attempt(instruction_set),
            "torch threads": attempt(lambda: importlib.import_module("torch").get_num_threads()),
        },
        "cuda": {
            "torch built for": attempt(lambda: importlib.import_module("torch").version.cuda or "no CUDA"),
            "driver": attempt(driver),
            "GPUs": attempt(gpus),
        },
        "backends": attempt(backends),
        "libraries": attempt(libraries),
        "tools": {"C++ compiler": attempt(compiler), "nvcc": attempt(nvcc)},
        "extras": {name: attempt(lambda name=name: extra(name)) for name in EXTRAS},
        "allocator": attempt(allocator),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("IOUBAL_", "OMP_", "MKL_", "KMP_", "TORCH_CUDA", "CUDA_", "NVCC_"))
            or name == "LD_PRELOAD"
        },
    }


def attempt(question: Callable[[], Any]) -> Any:
    """The answer, or what kept us from it: a diagnosis must not die of what it diagnoses."""
    try:
        return question()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def torch_version() -> str:
    torch = importlib.import_module("torch")
    return f"{torch.__version__} ({torch.__file__})"


def cpu_model() -> str:
    """The processor's name. Virtual machines tell "AMD EPYC" of every generation: a name without a number gets one."""
    if sys.platform == "darwin":
        asked = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=10)
        return asked.stdout.strip()
    said = cpuinfo()
    name = said.get("model name") or platform.processor() or platform.machine()
    number = "cpu family" if "AMD" in name else "model"  # Intel's family is always 6
    if any(letter.isdigit() for letter in name) or number not in said:
        return name
    return f"{name}, {number.removeprefix('cpu ')} {said[number]}"


def cpuinfo() -> dict[str, str]:
    """What Linux tells of its first processor; {} elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def instruction_set() -> str:
    """The one the library's dispatch takes here; asking (-1) changes nothing."""
    if not importlib.import_module("ioubal_kernels.ops").available("cpu"):
        return "none, the CPU library is not loaded"
    level = int(importlib.import_module("torch").ops.ioubal.cpu_isa(-1))
    return INSTRUCTION_SETS.get(level, f"level {level}")


def driver() -> str:
    """The newest CUDA that the NVIDIA driver runs. Asking initialises nothing."""
    try:
        loaded = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "not found (no libcuda.so.1)"
    number = ctypes.c_int()
    status = loaded.cuDriverGetVersion(ctypes.byref(number))
    return f"CUDA {number.value // 1000}.{number.value % 1000 // 10}" if status == 0 else f"does not answer ({status})"


def gpus() -> list[str] | str:
    """Each with its architecture, and whether the library that was built here has code for it."""
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return "no GPU usable here"
    built = importlib.import_module("ioubal_kernels.ops.library").build_info().get("cuda", {}).get("architectures", [])
    runs_on = importlib.import_module("ioubal_kernels.backends").runs_on
    shown = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        missing = "" if runs_on(built, capability) else f", but the CUDA library has code for {' '.join(built)} only"
        shown.append(f"{torch.cuda.get_device_name(index)} (sm_{capability[0]}{capability[1]}{missing})")
    return shown


def libraries() -> dict[str, Any]:
    """What the build of this copy says of itself, and what loading said."""
    library = importlib.import_module("ioubal_kernels.ops.library")
    found = {}
    for backend in library.LIBRARIES:
        info = dict(library.build_info().get(backend) or {"built": False, "reason": "no build of this copy has run"})
        if info["built"] or library.available(backend):
            info["loaded"] = library.load_error(backend) or True
        found[backend] = {name: value for name, value in info.items() if value is not None}
    return found


def backends() -> dict[str, str]:
    """Backend name to "available" or the reason why not."""
    module = importlib.import_module("ioubal_kernels.backends")
    found = {}
    for name in module.BACKEND_NAMES:
        reason = module.unavailable_reason(name)
        found[name] = "available" if reason is None else f"not available: {reason}"
    return found


def compiler() -> str:
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return first_line([*command, "--version"])
    return f"not found ({'CXX=' + shlex.join(chosen) if chosen else 'tried c++, g++, clang++'})"


def nvcc() -> str:
    """The one that setup.py would take."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        path = shutil.which(str(Path(home, "bin", "nvcc")))
    else:
        path = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if path is None:
        return f"not found ({f'CUDA_HOME or CUDA_PATH is {home}' if home else 'tried PATH and /usr/local/cuda'})"
    asked = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
    release = [line.strip() for line in asked.stdout.splitlines() if "release" in line]
    return f"{release[0] if release else 'unknown version'} ({path})"


def first_line(command: list[str]) -> str:
    asked = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return f"{(asked.stdout or asked.stderr).strip().splitlines()[0]} ({shutil.which(command[0])})"


def extra(name: str) -> str:
    """Versions of the extra's packages, or the pip line that installs what is missing. Imports none of them."""
    missing = [module for module in EXTRAS[name] if importlib.util.find_spec(module) is None]
    if missing:
        names = ", ".join(DISTRIBUTIONS.get(module, module) for module in missing)
        return f"missing {names}; pip install 'ioubal-kernels[{name}]'"
    names = [DISTRIBUTIONS.get(module, module) for module in EXTRAS[name]]
    return ", ".join(f"{each} {metadata.version(each)}" for each in names)


def allocator() -> str:
    """Whether freed memory stays warm between steps (a cold heap costs about as much as the loss)."""
    preload = os.environ.get("LD_PRELOAD", "")
    other = [name for name in ("tcmalloc", "jemalloc", "mimalloc") if name in preload]
    if other:
        return f"{other[0]} (LD_PRELOAD)"
    if not sys.platform.startswith("linux"):
        return "the system's"
    if all(os.environ.get(name) == value for name, value in ALLOCATOR.items()):
        return "glibc, heap kept warm"
    settings = " ".join(f"{name}={value}" for name, value in ALLOCATOR.items())
    return f"glibc, default settings; for CPU training try: {settings}"


def lines(report: dict[str, Any], indent: str = "") -> list[str]:
    width = max((len(name) for name in report), default=0)
    text = []
    for name, value in report.items():
        if isinstance(value, dict):
            text += [f"{indent}{name}", *lines(value, indent + "  ")] if value else []
        else:
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            text.append(f"{indent}{name:{width}}  {shown}")
    return text


def main() -> int:
    """Print the report as plain text; 0 always: what is missing is reported, not failed on."""
    print("\n".join(lines(collect())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
