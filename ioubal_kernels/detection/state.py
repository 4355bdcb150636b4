"""What a checkpoint holds: tensors, numbers, strings, lists and dicts, enough to go on as if nothing had happened."""

from __future__ import annotations

import json
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
    fingerprints: dict[str, str | None],
    anchor_scale: float,
    detector: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: ModelEma,
    loader: TrainLoader,
    step: int,
    skipped: int,
    w_loc: float,
    rpn_w_loc: float,
    processes: int,
    seconds: float,
) -> dict[str, Any]:
    """The state after `step` steps. Learning rate and random numbers need no entry: they are functions of the step."""
    return {
        "config": config.to_json(),
        "classes": list(classes),
        "category_ids": list(category_ids),
        **fingerprints,
        "anchor_scale": anchor_scale,
        "model": detector.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ema": ema.state_dict(),
        "loader": loader.state_dict(),
        "step": step,
        "skipped": skipped,
        "w_loc": w_loc,
        "rpn_w_loc": rpn_w_loc,
        "processes": processes,
        "seconds": seconds,
    }


def unpack_config(saved: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """The configuration inside a checkpoint as nested plain values."""
    try:
        return json.loads(saved["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: holds no configuration of this trainer") from error
