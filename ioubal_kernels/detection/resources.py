"""What a run computes with: device, number format, loader processes, memory, kernels."""

from __future__ import annotations

import os
from pathlib import Path

import torch

import ioubal_kernels as ik

from .architectures import MODELS
from .config import Config
from .data import Dataset, TransformConfig
from .errors import UsageError
from .processes import launched_as

NATIVE_BF16_FLAGS = ("amx_bf16", "avx512_bf16")
CACHE_LIMIT_BYTES = 512 << 20


def resolve_device(name: str) -> torch.device:
    """ "auto" (a GPU, else the CPU), "cpu", "cuda" or "cuda:N". Under torchrun "auto" and "cuda" are the GPU of the
    process's number on its machine.
    """
    _, processes, local_rank = launched_as()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise UsageError(f"train.device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if not torch.cuda.is_available():
        raise UsageError(f"train.device: {name} was asked for, but torch {torch.__version__} finds no CUDA device")
    number = int(index or local_rank)
    if index and processes > 1:
        raise UsageError(
            f"train.device: {name} was asked for, but each of {processes} processes needs its own: use cuda"
        )
    if number >= torch.cuda.device_count():
        raise UsageError(f"train.device: {name} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", number)


def cpu_has_native_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; without that, bfloat16 is several times slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return any(flag in flags for flag in NATIVE_BF16_FLAGS)


def resolve_amp(mode: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype, or None for float32. `mode` is "auto", "off" or "bf16"."""
    if mode == "off":
        return None
    if mode == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return torch.bfloat16 if cpu_has_native_bf16() else None


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_workers(setting: int | str, device: torch.device) -> int:
    """Loader processes. On the CPU they share the cores with the training, which one process keeps fed."""
    if setting != "auto":
        return int(setting)
    cores = available_cores()
    if device.type == "cuda":
        return min(8, max(1, cores - 1))
    return 1 if cores > 1 else 0


def transform_config(config: Config) -> TransformConfig:
    """The loader's view of the configuration."""
    data = config.data
    return TransformConfig(
        size=data.image_size,
        # SSD's default boxes are shares of the whole input: 300 px padded to 320 would be another detector.
        size_divisor=1 if MODELS[config.model.name].family == "ssd" else 32,
        short_side=data.short_side,
        long_side=data.long_side,
        keep_ratio=data.keep_ratio,
        hflip=data.hflip,
        vflip=data.vflip,
        zoom=data.zoom,
        jitter=data.jitter,
        min_visible=data.min_visible,
        short_side_range=data.short_side_range,
        zoom_out=data.zoom_out,
        iou_crop=data.iou_crop,
        photometric=data.photometric,
        mean=data.mean,
        std=data.std,
    )


def choose_cache(setting: str, dataset: Dataset, config: Config) -> str:
    """ "ram" if the split's images, as the loader keeps them, take at most 512 MiB as bytes, else "none"."""
    if setting != "auto":
        return setting
    data = config.data
    height, width = data.image_size or (data.short_side, data.long_side)
    stored = 3 * height * width * len(dataset)
    if transform_config(config).changes_file:  # training keeps the files' own pixels
        stored = max(stored, sum(3 * record.width * record.height for record in dataset.records))
    return "ram" if stored <= CACHE_LIMIT_BYTES else "none"


def check_backend(name: str, device: torch.device) -> None:
    """Fail now rather than at the first step when a backend asked for by name is not there.

    Raises:
        UsageError: with the backend's own reason.
    """
    if name == "auto":
        return
    empty = torch.zeros(0, 1, device=device)
    try:
        ik.iou_balanced_sigmoid_focal_loss(
            empty, torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, device=device), backend=name
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise UsageError(f"loss.backend: {name} cannot be used on {device}: {error}") from error
