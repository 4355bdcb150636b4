"""What the GPU programs share: the refusal without a GPU, reports that are whole or absent."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from ioubal_kernels import backends

from .. import machine
from .arch import no_gpu_reason, refusal

BACKENDS = ("cuda", "triton")


def refuse_without_gpu(program: str, backend: str = "cuda") -> bool:
    """Whether there is no GPU or no such backend to run on it; says so in one line."""
    reason = no_gpu_reason() or backends.unavailable_reason(backend)
    if reason:
        print(refusal(program, reason), file=sys.stderr)
    return reason is not None


def facts(device: str) -> dict[str, Any]:
    """What the results depend on, for "cuda" or, in a dry run, "cpu"."""
    found = machine.gpu_facts() if device == "cuda" else machine.cpu_facts()
    return {**found, "dry_run": device == "cpu"}


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
