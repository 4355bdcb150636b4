"""What weights of another training (`--init-from`) decide about the network that starts from them."""

from __future__ import annotations

import copy
from pathlib import Path

from .architectures import MODELS
from .checkpoint import find_checkpoint
from .config import Config
from .errors import UsageError
from .state import unpack_config


def with_start(config: Config, *, resume: bool = False) -> Config:
    """The configuration with the normalisation of the weights it starts from, where model.norm is "auto".

    A network that was trained from scratch has BatchNorm and normalised towers, one that began with a backbone file has
    neither: it must be built as it was to take the weights, and the new run's configuration says so.

    Args:
        resume: the run has weights of its own; that the others are gone is no error.

    Raises:
        UsageError: no such run, or one of another architecture.
    """
    model = config.model
    if model.init_from is None:
        return config
    try:
        path, state = find_checkpoint(model.init_from)
    except UsageError as error:
        if resume:
            return config
        raise UsageError(f"model.init_from: {error}") from None
    source = _config_of(state, path)
    if source.model.name != model.name:
        raise UsageError(
            f"model.init_from: {path} holds a {source.model.name}, expected a {model.name} (model.name of this run)"
        )
    if model.norm != "auto" or source.model.frozen_backbone or MODELS[model.name].backbone == "vgg16":
        return config
    config = copy.deepcopy(config)
    config.model.norm = "batch" if source.model.norm == "auto" else source.model.norm
    return config


def _config_of(state: dict, path: Path) -> Config:
    config = Config()
    config.update(unpack_config(state, path), str(path))
    return config
