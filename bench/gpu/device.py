"""What the GPU programs share: the refusal without a GPU, facts of the device, reports that are whole or absent."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ioubal_kernels import backends

from .. import timing
from .arch import no_gpu_reason, refusal

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


BACKENDS = ("cuda", "triton")


def refuse_without_gpu(program: str, backend: str = "cuda") -> bool:
    """Whether there is no GPU or no such backend to run on it; says so in one line."""
    reason = no_gpu_reason() or backends.unavailable_reason(backend)
    if reason:
        print(refusal(program, reason), file=sys.stderr)
    return reason is not None


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


def facts(device: str) -> dict[str, Any]:
    """What the results depend on, for "cuda" or, in a dry run, "cpu"."""
    common = {**timing.versions(), "cuda": torch.version.cuda}
    if device == "cpu":
        return {**common, "device": timing.cpu_model(), "dry_run": True}
    properties = torch.cuda.get_device_properties(0)
    return {
        **common,
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        **smi(),
        "dry_run": False,
    }


def slug(name: str) -> str:
    """A device's name as part of a file's: "NVIDIA H200" is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def without_folders(value: Any) -> Any:
    """A report's texts with the names of files only: the folders are this machine's affair."""
    if isinstance(value, str):
        return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", value)
    if isinstance(value, dict):
        return {key: without_folders(each) for key, each in value.items()}
    return [without_folders(each) for each in value] if isinstance(value, (list, tuple)) else value


def write_report(path: Path, report: dict[str, Any]) -> None:
    """The whole report or the old file: a killed program leaves no half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(without_folders(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(beside, path)
