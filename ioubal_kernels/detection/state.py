"""What a checkpoint holds: tensors, numbers, strings, lists and dicts, enough to go on as if nothing had happened."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import Config
from .data import TrainLoader
from .ema import ModelEma
from .errors import UsageError


def pack_state(
    *,
    config: Config,
    classes: Sequence[str],
    category_ids: Sequence[int | str],
    fingerprint: str,
    anchor_scale: float,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: ModelEma,
    loader: TrainLoader,
    step: int,
    skipped: int,
    w_loc: float,
    seconds: float,
) -> dict[str, Any]:
    """The state after `step` steps. The learning rate needs no entry: it is a function of the step."""
    return {
        "config": config.to_json(),
        "classes": list(classes),
        "category_ids": list(category_ids),
        "data": fingerprint,
        "anchor_scale": anchor_scale,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ema": ema.state_dict(),
        "loader": loader.state_dict(),
        "step": step,
        "skipped": skipped,
        "w_loc": w_loc,
        "seconds": seconds,
        "random": random_state(),
    }


def unpack_config(saved: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """The configuration inside a checkpoint as nested plain values."""
    try:
        return json.loads(saved["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: holds no configuration of this trainer") from error


def random_state() -> dict[str, Any]:
    """The generators' states; NumPy's is not used by the trainer (augmentation draws from its own generators)."""
    version, numbers, gauss = random.getstate()
    state = {"torch": torch.get_rng_state(), "python": [version, list(numbers), gauss]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the generators back; a machine with another number of GPUs keeps its own CUDA states."""
    torch.set_rng_state(state["torch"].cpu())
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    cuda_states = state.get("cuda", [])
    if torch.cuda.is_available() and len(cuda_states) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in cuda_states])
