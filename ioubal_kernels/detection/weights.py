"""A configuration's network, and weights that are put into it."""

from __future__ import annotations

from pathlib import Path

import torch

from .config import Config
from .errors import UsageError
from .models import Detector, build_model


def new_detector(config: Config, num_classes: int, anchor_scale: float, *, backbone_file: bool = False) -> Detector:
    """The network of a configuration.

    Args:
        num_classes: K, foreground classes.
        anchor_scale: as `fit_anchors` found it, or a checkpoint says.
        backbone_file: load model.backbone_file; without it the form that the file gives is built all the same.
    """
    model = config.model
    return build_model(
        model.name,
        num_classes,
        anchor_scale=anchor_scale,
        size=config.data.image_size,
        smallest=model.ssd_smallest,
        norm=model.built_norm,
        backbone_file=model.backbone_file if backbone_file else None,
        backbone_sha256=model.backbone_sha256,
    )


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """`load_state_dict` whose error lists missing, unexpected and misshapen keys."""
    _complain(path, *_differences(model, weights))
    model.load_state_dict(weights)


def load_matching_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], path: Path) -> list[str]:
    """Load the weights of another training; those of another shape (a head for other classes) stay as they are.

    Returns:
        The keys that were left out.

    Raises:
        UsageError: the weights are of another architecture: keys are missing or unexpected.
    """
    missing, unexpected, misshapen = _differences(model, weights)
    _complain(path, missing, unexpected, [])
    left_out = [text.split(" ")[0] for text in misshapen]
    model.load_state_dict({k: v for k, v in weights.items() if k not in left_out}, strict=False)
    return left_out


def _differences(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Missing keys, unexpected keys, and those of another shape with both shapes."""
    own = model.state_dict()
    misshapen = [
        f"{k} {tuple(weights[k].shape)} instead of {tuple(own[k].shape)}"
        for k in sorted(own.keys() & weights.keys())
        if own[k].shape != weights[k].shape
    ]
    return sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys()), misshapen


def _complain(path: Path, missing: list[str], unexpected: list[str], misshapen: list[str]) -> None:
    if missing or unexpected or misshapen:
        raise UsageError(
            f"{path}: the weights do not fit the model: missing {missing[:5]}, unexpected {unexpected[:5]}, "
            f"other shapes {misshapen[:5]} ({len(missing)}, {len(unexpected)}, {len(misshapen)} in total)"
        )
