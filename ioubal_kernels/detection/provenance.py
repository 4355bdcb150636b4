"""Where a run comes from: the command, versions, the machine, the weights it starts with."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import sys
from typing import Any

import torch
import torchvision
from torch import nn

from .._version import __version__
from ..doctor import cpu_model


def provenance(device: torch.device) -> dict[str, Any]:
    """The command line as typed, versions, and the names of the processor and the GPU."""
    return {
        "command": command_line(),
        "versions": versions(),
        "machine": machine(device),
    }


def command_line() -> str:
    """The command that started this process, quoted for a shell; the program's name without its folder."""
    name = os.path.basename(sys.argv[0])
    program = ["python", "-m", "ioubal_kernels"] if name == "__main__.py" else [name]
    return shlex.join([*program, *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Of this package and of what decides its results."""
    return {
        "ioubal_kernels": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }


def machine(device: torch.device) -> dict[str, str]:
    """The processor's name, and the GPU's where there is one."""
    try:
        names = {"cpu": cpu_model()}
    except OSError:
        names = {"cpu": platform.processor() or platform.machine()}
    if device.type == "cuda":
        names["gpu"] = torch.cuda.get_device_name(device)
    return names


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, shortened: equal for runs with the same initialisation."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
