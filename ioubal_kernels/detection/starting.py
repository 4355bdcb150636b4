"""What a training starts from: anchors that fit the boxes, a new network, weights of an earlier run, its length."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from .anchors import FITTING_IOU, AnchorFit, anchor_fit, choose_anchor_scale, network_boxes
from .architectures import MODELS
from .checkpoint import find_checkpoint
from .config import Config
from .data import Dataset, DatasetPair, TrainLoader
from .errors import UsageError
from .models import Detector
from .optim import learning_rate, warmup_steps
from .processes import Processes
from .progress import Reporter
from .resources import choose_cache, choose_workers, transform_config
from .state import unpack_config
from .weights import load_matching_weights

COVERAGE_WARNING = 0.9
Source = tuple[Path, dict[str, Any]]  # a checkpoint's path and what is in it


def require_boxes(pair: DatasetPair, reporter: Reporter) -> None:
    """Warns where there is nothing to measure on.

    Raises:
        UsageError: there is nothing to train on.
    """
    if not pair.training.num_train_boxes:
        raise UsageError(
            f"dataset {pair.training.root}: split {pair.training.split!r} has no box to train on (regions of many"
            " objects and difficult ones do not count)"
        )
    if pair.evaluation is not None and not pair.evaluation.num_train_boxes:
        reporter.warn(f"split {pair.evaluation.split!r} has no boxes: there will be no AP")


def point_out(config: Config, steps: int, reporter: Reporter) -> None:
    """Warns of what is allowed and rarely meant in a run of so many steps."""
    loss, optim = config.loss, config.optim
    warming = warmup_steps(steps, optim)
    if warming >= steps:
        share = learning_rate(steps - 1, steps, optim) / optim.lr
        key = f"optim.warmup={optim.warmup:g}" if optim.warmup_steps is None else f"optim.warmup_steps={warming}"
        reporter.warn(
            f"{key}: the warm-up is not over when the run of {steps} steps ends: the learning rate comes to"
            f" {100 * share:.0f} % of optim.lr, and optim.schedule has no effect"
        )
    if loss.lambda_ and loss.normalize_loc:
        for name in ("w_loc", "rpn_w_loc") if loss.rpn else ("w_loc",):
            factor = getattr(loss, name)
            if factor not in ("auto", 1.0):
                reporter.warn(
                    f"loss.{name}={factor:g} with loss.normalize_loc: Eq. 7 keeps the localisation loss what it is"
                    f" without weights by itself, so that it is trained {factor:g} times as large"
                )


def number_of_steps(config: Config, batches_per_epoch: int) -> int:
    """The run's length: train.epochs passes over the data where they are given, else train.iterations."""
    if config.train.epochs is None:
        return config.train.iterations
    return max(1, round(config.train.epochs * batches_per_epoch / config.train.accumulate))


def make_train_loader(config: Config, dataset: Dataset, processes: Processes) -> TrainLoader:
    """The batches of one process, as the configuration has them."""
    return TrainLoader(
        dataset,
        transform_config(config),
        config.train.batch_size,
        seed=config.train.seed,
        workers=choose_workers(config.data.workers, processes.device),
        rank=processes.rank,
        world_size=processes.world_size,
        on_bad_image=config.data.on_bad_image,
        bad_image_limit=config.data.bad_image_limit,
        cache=choose_cache(config.data.cache, dataset, config),
        timeout=config.data.timeout,
    )


def fit_anchors(config: Config, dataset: Dataset, wanted: float | str, reporter: Reporter) -> AnchorFit:
    """The scale of the anchors, and how well they fit; nan where the architecture has no such anchors.

    Args:
        wanted: the scale, or "auto": the architecture's own, and for the tiny models the one that fits the boxes best.
    """
    _, _, strides, octaves, own_scale = MODELS[config.model.name]
    scale = own_scale if wanted == "auto" else float(wanted)
    if not octaves:
        return AnchorFit(scale or 1.0, math.nan, math.nan)
    boxes, sizes = network_boxes(dataset, transform_config(config))
    if scale is None:
        fit = choose_anchor_scale(boxes, sizes, strides, octaves)
    else:
        fit = anchor_fit(boxes, sizes, strides, octaves, scale)
    text = (
        f"anchors from {fit.scale:.2f} strides: {100 * fit.covered:.1f} % of the boxes have one with "
        f"IoU >= {FITTING_IOU}"
    )
    if fit.covered < COVERAGE_WARNING:
        reporter.warn(
            f"{text}; less than {100 * COVERAGE_WARNING:.0f} %: many objects are too small, too large or too long "
            "for them. Consider another data.image_size or model.anchor_scale"
        )
    else:
        reporter.info(text)
    return fit


def source_of(config: Config) -> Source | None:
    """The checkpoint that model.init_from names.

    Raises:
        UsageError: there is none.
    """
    if config.model.init_from is None:
        return None
    try:
        return find_checkpoint(config.model.init_from)
    except UsageError as error:
        raise UsageError(f"model.init_from: {error}") from None


def with_norm_of(source: Source | None, config: Config) -> Config:
    """The configuration with the normalisation of the network in a checkpoint, which one that starts from it must
    share, where the configuration leaves it open.

    Raises:
        UsageError: the checkpoint is of another detector.
    """
    if source is None:
        return config
    path, saved = source
    theirs = Config()
    theirs.update(unpack_config(saved, path), str(path))
    if theirs.model.name != config.model.name:
        raise UsageError(
            f"model.init_from: {path} holds a {theirs.model.name}, expected {config.model.name} like model.name"
        )
    if config.model.norm != "auto":
        return config
    return replace(config, model=replace(config.model, norm=theirs.model.built_norm))


def with_norm_kept(theirs: dict[str, dict[str, Any]], config: Config) -> Config:
    """The configuration of a run that goes on, asked for by the line that began it: the normalisation that
    `with_norm_of` found then, where it is left open.

    Args:
        theirs: the run's configuration, as `unpack_config` has it.
    """
    model = theirs.get("model", {})
    if config.model.init_from is None or config.model.norm != "auto" or model.get("norm") is None:
        return config
    return replace(config, model=replace(config.model, norm=model["norm"]))


def start_from(source: Source, detector: Detector, reporter: Reporter) -> None:
    """Load a checkpoint's evaluated weights, but for layers of another shape (a head for other classes).

    Raises:
        UsageError: the checkpoint is of another architecture.
    """
    path, saved = source
    left_out = load_matching_weights(detector, saved["ema"]["model"], path)
    new = f"; of other shapes, and new: {', '.join(left_out)}" if left_out else ""
    reporter.info(f"starting from {path}{new}")
