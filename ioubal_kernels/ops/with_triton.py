"""The same functions as this package's, run by the Triton kernels: their registration, and why they may be absent.

Triton is imported at the first use only: it is slow to import, and may be missing or broken.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import boxes, detection, flat, library, matching, workspace

__all__ = [
    "check_labels",
    "check_matched_idxs",
    "cross_entropy",
    "decode_boxes",
    "delta_iou",
    "detection_loss",
    "encode_boxes",
    "match_anchors",
    "match_fovea",
    "paired_box_iou",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
    "unavailable",
]
_KERNELS = "ioubal_kernels.triton_kernels"
_NEEDED = (3, 6)  # what torch 2.11 brings
_CAPABILITY = (8, 0)  # bfloat16 instructions
# What triton.knobs takes for true. Its interpreter runs the kernels on CPU tensors, for tests.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

check_labels = reference.check_labels
check_matched_idxs = reference.check_matched_idxs


def sigmoid_focal_loss(*args: Any, **kwargs: Any) -> Tensor:
    return flat.sigmoid_focal_loss(*args, backend="triton", **kwargs)


def cross_entropy(*args: Any, **kwargs: Any) -> Tensor:
    return flat.cross_entropy(*args, backend="triton", **kwargs)


def smooth_l1_loss(*args: Any, **kwargs: Any) -> Tensor:
    return flat.smooth_l1_loss(*args, backend="triton", **kwargs)


def detection_loss(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return detection.detection_loss(*args, backend="triton", **kwargs)


def decode_boxes(*args: Any, **kwargs: Any) -> Tensor:
    return boxes.decode_boxes(*args, backend="triton", **kwargs)


def encode_boxes(*args: Any, **kwargs: Any) -> Tensor:
    return boxes.encode_boxes(*args, backend="triton", **kwargs)


def paired_box_iou(*args: Any, **kwargs: Any) -> Tensor:
    return boxes.paired_box_iou(*args, backend="triton", **kwargs)


def delta_iou(*args: Any, **kwargs: Any) -> Tensor:
    return boxes.delta_iou(*args, backend="triton", **kwargs)


def match_anchors(*args: Any, **kwargs: Any) -> Tensor:
    return matching.match_anchors(*args, backend="triton", **kwargs)


def match_fovea(*args: Any, **kwargs: Any) -> Tensor:
    return matching.match_fovea(*args, backend="triton", **kwargs)


# ---------------------------------------------------------------------------------------------- availability


@functools.cache
def _import_reason() -> str | None:
    """Why the kernels cannot be imported. A broken package may raise anything."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; torch's CUDA builds for Linux bring it, else try `pip install triton`"
    try:
        version = importlib.import_module("triton").__version__
        if tuple(int(part) for part in version.split(".")[:2]) < _NEEDED:
            return f"triton {version} is too old; `pip install 'triton>={_NEEDED[0]}.{_NEEDED[1]}'`"
        importlib.import_module(_KERNELS + ".registry")
    except Exception as error:
        return f"triton cannot be used ({type(error).__name__}: {error}); reinstall the one that belongs to torch"
    return None


def unavailable() -> str | None:
    """Why the Triton kernels cannot run here and what to do; None if they can."""
    if not _INTERPRETED:
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is not a CUDA build; install one that is"
        if not torch.cuda.is_available():
            return (
                "no GPU usable here: torch.cuda.is_available() is false (no NVIDIA GPU, or no driver for CUDA"
                f" {torch.version.cuda}); use backend='cpu' on CPU tensors"
            )
        try:
            capability = torch.cuda.get_device_capability()
        except (RuntimeError, AssertionError) as error:
            return f"the GPU does not answer ({error})"
        if capability < _CAPABILITY:
            found = ".".join(map(str, capability))
            return f"the GPU's compute capability is {found}, the kernels need 8.0; build the CUDA library instead"
        # Triton compiles its launcher, a small C file, at the first use.
        if not any(shutil.which(name) for name in (os.environ.get("CC") or "cc", "gcc", "clang")):
            return "triton needs a C compiler (tried CC, cc, gcc, clang); install one, or name it in CC"
    return _import_reason()


def choose_plan(**plan: int) -> None:
    """Launches the dense pass as these fields of ``focal_pass.Choice`` say; without any by rule. For measurements."""
    focal_pass = importlib.import_module(_KERNELS + ".focal_pass")
    focal_pass.choice = focal_pass.Choice(**plan)
    workspace.triton_group = 32 if plan.get("vectors") else workspace.TRITON_GROUP  # a vector may be a single logit


# ---------------------------------------------------------------------------------------------- registration


def _kernel(name: str) -> Callable[..., None]:
    def call(*args: Any) -> None:
        importlib.import_module(_KERNELS + ".registry").OPS[name](*args)

    call.__name__ = name
    return call


def _register() -> None:
    for schema in library.SCHEMAS:
        name = schema.split(".")[0]
        key = "CPU" if _INTERPRETED else "CUDA"
        library._library.impl(f"{name}.{library.OVERLOAD['triton']}", _kernel(name), key)


_register()
