"""What a figure depends on: versions, commit, device, clock, threads, allocator."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import ioubal_kernels as ik
from ioubal_kernels.doctor import cpu_model, cpuinfo
from ioubal_kernels.ops.library import BEST_ISA, limit_isa

ROOT = Path(__file__).resolve().parent.parent
ISA_NAMES = {0: "portable", 2: "AVX2", 4: "AVX-512", 5: "AVX-512 BF16", 6: "AVX-512, Zen 5"}
SMI_FIELDS = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "max_sm_clock_mhz": "clocks.max.sm",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
    "utilization_percent": "utilization.gpu",
}
MOMENTARY = ("sm_clock_mhz", "memory_clock_mhz", "power_w", "temperature_c", "utilization_percent")
RESTARTED = "_IOUBAL_BENCH_RESTARTED"
# Freed memory stays with the process: without these two, page faults on fresh tensors drown what is measured.
WARM_HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "68719476736"}


def cache_bytes() -> int:
    """Size of the largest cache of a core, or 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if found:
            sizes.append(int(found[1]) << (10 if found[2] == "K" else 20))
    return max(sizes, default=32 << 20)


def commit() -> str:
    """The checkout's commit, '+' when it has changes. Outside a checkout what IOUBAL_COMMIT says, or 'unknown'."""

    def run(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = ("csrc", "ioubal_kernels", "triton_kernels", "bench/*.py")
        dirty = run("status", "--porcelain", "--untracked-files=no", "--", *changed)
        return run("rev-parse", "--short", "HEAD") + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("IOUBAL_COMMIT", "unknown")


def versions() -> dict[str, Any]:
    """When, and of what, on any device."""
    return {
        "run": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "version": ik.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def smi(*names: str) -> dict[str, Any]:
    """Figures by nvidia-smi, those of `names` or all; {} without it. A field it does not know is left out."""
    if shutil.which("nvidia-smi") is None:
        return {}
    wanted = {name: SMI_FIELDS[name] for name in names or SMI_FIELDS}
    query = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(wanted.values())}", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [text.strip() for text in asked.stdout.strip().split(",")]
    if asked.returncode or len(values) != len(wanted):
        return {}
    found = {}
    for name, text in zip(wanted, values, strict=True):
        number = re.fullmatch(r"\d+(\.\d+)?", text) and name != "driver"
        if not text.startswith("["):  # "[N/A]", "[Not Supported]"
            found[name] = float(text) if number else text
    return found


def heap() -> str:
    """Warm when freed memory stays with the process, default otherwise."""
    return "warm" if all(os.environ.get(name) == value for name, value in WARM_HEAP.items()) else "default"


def restart_with_heap(wanted: str) -> None:
    """On Linux starts this program again, with the heap as wanted: glibc reads its settings once."""
    if not sys.platform.startswith("linux") or heap() == wanted:
        return
    if os.environ.get(RESTARTED):
        return  # something else sets them: the rows say what it was
    environment = {name: value for name, value in os.environ.items() if name not in WARM_HEAP}
    environment |= {RESTARTED: "1", **(WARM_HEAP if wanted == "warm" else {})}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def cpu_facts() -> dict[str, Any]:
    """What a figure depends on, on a CPU."""
    facts: dict[str, Any] = {
        **versions(),
        "device": cpu_model(),
        "isa": ISA_NAMES[limit_isa(BEST_ISA)],
        "threads": torch.get_num_threads(),
        "heap": heap(),
        "cache_mib": round(cache_bytes() / 2**20, 1),
    }
    clock = cpuinfo().get("cpu MHz")
    return {**facts, "cpu_mhz": float(clock)} if clock else facts


def allocator() -> str:
    """How torch's CUDA allocator is set up."""
    return os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or "default"


def gpu_facts() -> dict[str, Any]:
    """What a figure depends on, on the first GPU; the clocks of the moment are `MOMENTARY`."""
    properties = torch.cuda.get_device_properties(0)
    return {
        **versions(),
        "cuda": torch.version.cuda,
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "cpu": cpu_model(),
        "allocator": allocator(),
        **smi(),
    }


def slug(name: str) -> str:
    """A device's name as part of a file's: "NVIDIA H200" is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"
