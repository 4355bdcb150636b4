"""`ioubal export`: the evaluated weights in one file, with torchvision's keys and everything needed to use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from .architectures import MODELS
from .checkpoint import atomic_write, find_checkpoint
from .models import class_specific_weights
from .predict import model_from_state

FORMAT = "ioubal_kernels weights 1"


def export_weights(target: str, file: Path) -> dict[str, Any]:
    """Write the evaluated (averaged) weights of a run. Returns what the file holds, without its weights.

    The file is a dict of plain values for `torch.load(file, weights_only=True)`:

    - `weights`: the state dict of torchvision's model of that kind (RetinaNet, SSD, FasterRCNN; docs/detectors.md
      builds them); FoveaBox is no model of torchvision's. Faster R-CNN's boxes, class-agnostic in training, are
      repeated for every class, as torchvision's FastRCNNPredictor has them.
    - `classes`: the K names. `first_label`: what the model calls the first of them, 0, or 1 where 0 is the background.
    - `config`: the whole configuration as JSON. `model`, `anchor_scale`, `step`, `format`, `version`.

    Args:
        target: a run's folder or a checkpoint file.
        file: the file, replaced if it exists.

    Raises:
        UsageError: no such run. OutputError: the file cannot be written.
    """
    path, state = find_checkpoint(target)
    trained = model_from_state(state, path, torch.device("cpu"))
    weights = {
        key: value.detach().clone(memory_format=torch.contiguous_format)
        for key, value in trained.model.network.state_dict().items()
    }
    if MODELS[trained.config.model.name].family == "faster_rcnn":
        weights = class_specific_weights(weights)
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": __version__,
        "model": trained.config.model.name,
        "classes": list(trained.classes),
        "first_label": trained.model.offset,
        "anchor_scale": float(state["anchor_scale"]),
        "step": trained.step,
        "config": trained.config.to_json(),
    }
    # Through the file object: on a full disk torch's own file writing dies with an obscure internal message.
    atomic_write(file, lambda stream: torch.save({**content, "weights": weights}, stream))
    return content
