"""Configuration keys that another one makes idle: whoever sets one by hand expects it to do something."""

from __future__ import annotations

from collections.abc import Iterable

from .architectures import MODELS
from .config import Config
from .errors import UsageError


def why_unused(config: Config, key: str) -> str | None:
    """What makes a dotted key have no effect in this configuration; None: it has one."""
    family = MODELS[config.model.name].family
    model, image_size = f"model.name={config.model.name}", config.data.image_size is not None
    softmax, rpn = family in ("ssd", "faster_rcnn"), config.loss.rpn
    idle_rpn = not (rpn and family == "faster_rcnn")
    idle = {
        "train.iterations": (config.train.epochs is not None, f"train.epochs={config.train.epochs} (null: iterations)"),
        "data.short_side": (image_size, "data.image_size (null: by the sides)"),
        "data.long_side": (image_size, "data.image_size (null: by the sides)"),
        "data.keep_ratio": (not image_size, "data.image_size=null, which keeps it"),
        "loss.alpha": (softmax, model),
        "loss.gamma": (softmax, model),
        "loss.rpn": (family != "faster_rcnn", model),
        "loss.rpn_w_loc": (idle_rpn, model if rpn else "loss.rpn=false"),
        "optim.momentum": (config.optim.name != "sgd", f"optim.name={config.optim.name}"),
        "optim.milestones": (config.optim.schedule != "multistep", f"optim.schedule={config.optim.schedule}"),
        "optim.gamma": (config.optim.schedule != "multistep", f"optim.schedule={config.optim.schedule}"),
        "optim.warmup": (config.optim.warmup_steps is not None, f"optim.warmup_steps={config.optim.warmup_steps}"),
        "model.ssd_smallest": (MODELS[config.model.name].backbone != "vgg16", model),
        "model.anchor_scale": (family == "ssd", model),
    }
    unused, because = idle.get(key, (False, ""))
    return because if unused else None


def refuse_unused(keys: Iterable[str], *configs: Config) -> None:
    """For keys set by hand.

    Raises:
        UsageError: one of them has no effect in any of the configurations.
    """
    for key in keys:
        reasons = [why_unused(config, key) for config in configs]
        if all(reasons):
            raise UsageError(f"--set: {key} has no effect with {reasons[0]}")
