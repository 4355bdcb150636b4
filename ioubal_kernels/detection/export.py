"""`ioubal export`: the evaluated weights in one file, with torchvision's keys and everything needed to use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator

from .._version import __version__
from .architectures import MODELS
from .checkpoint import atomic_torch_write
from .config import ModelConfig
from .errors import OutputError
from .models import class_specific_weights
from .predict import open_trained
from .rundir import holds_run

FORMAT = "ioubal_kernels weights 1"


def export_weights(target: str, file: Path) -> dict[str, Any]:
    """Write the evaluated (averaged) weights of a run. Returns what the file holds, without its weights.

    The file is a dict of plain values for `torch.load(file, weights_only=True)`:

    - `weights`: the state dict of torchvision's model of that kind (RetinaNet, SSD, FasterRCNN; docs/detectors.md
      builds them); FoveaBox is no model of torchvision's. Faster R-CNN's boxes, class-agnostic in training, are
      repeated for every class, as torchvision's FastRCNNPredictor has them.
    - `classes`: the K names. `first_label`: what the model calls the first of them, 0, or 1 where 0 is the background.
    - `norm`: of the backbone, "frozen", "batch" or "group"; None for VGG16. RetinaNet's and FoveaBox's towers have
      GroupNorm where it is not "frozen".
    - `anchors`: keyword arguments of torchvision's AnchorGenerator, for SSD of its DefaultBoxGenerator; None for
      FoveaBox.
    - `config`: the whole configuration as JSON. `model`, `anchor_scale`, `step`, `format`, `version`.

    Args:
        target: a run's folder or a checkpoint file.
        file: the file, replaced if it exists; in a run's folder only an earlier export is.

    Raises:
        UsageError: no such run. OutputError: the file cannot be written, or is a part of a run.
    """
    if file.is_file() and any(map(holds_run, list(file.resolve().parents)[:2])) and not _is_export(file):
        raise OutputError(f"cannot write {file}: it is a part of a run")
    trained = open_trained(target)
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
        "anchor_scale": trained.anchor_scale,
        "norm": _norm(trained.config.model),
        "anchors": _anchors(trained.model.network),
        "step": trained.step,
        "config": trained.config.to_json(),
    }
    # Through the file object: on a full disk torch's own file writing dies with an obscure internal message.
    atomic_torch_write(file, lambda stream: torch.save({**content, "weights": weights}, stream))
    return content


def _is_export(file: Path) -> bool:
    try:
        content = torch.load(file, map_location="meta", weights_only=True)
    except Exception:  # whatever else it holds, torch has many ways of saying that it cannot read it
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def _norm(model: ModelConfig) -> str | None:
    if MODELS[model.name].backbone == "vgg16":
        return None
    return "batch" if model.built_norm == "sync" else model.built_norm


def _anchors(network: nn.Module) -> dict[str, Any] | None:
    generator = getattr(getattr(network, "rpn", network), "anchor_generator", None)
    if generator is None:
        return None
    if isinstance(generator, DefaultBoxGenerator):
        return {"aspect_ratios": generator.aspect_ratios, "scales": generator.scales, "steps": generator.steps}
    return {"sizes": generator.sizes, "aspect_ratios": generator.aspect_ratios}
