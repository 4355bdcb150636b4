"""Going on from a checkpoint: what differs from the run that wrote it, and which of that it allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import Config, config_diff
from .data import DatasetPair
from .errors import UsageError
from .progress import Reporter
from .state import unpack_config

# A checkpoint holds what follows from these; with others a run could not go on from it.
FIXED_KEYS = {"model.name", "model.anchor_scale", "optim.name", "train.seed", "number of training images"}
CALIBRATED_KEYS = {
    f"loss.{key}" for key in ("w_loc", "rpn_w_loc", "lambda_", "normalize_loc", "rpn", "beta", "calibration_batches")
}


def key_of(change: str) -> str:
    """What a line `key: old -> new` is about."""
    return change.split(":")[0]


def changes_since(
    saved: dict[str, Any], path: Path, config: Config, pair: DatasetPair, images: int, processes: int
) -> list[str]:
    """Lines `key: old -> new` of what matters to the result and is not what the checkpoint's run had.

    Args:
        saved, path: the checkpoint.
        config, pair, images, processes: of the run that goes on: configuration, data, number of training images, number
            of processes.

    Raises:
        UsageError: the data has other classes.
    """
    changes = config_diff(unpack_config(saved, path), config.to_dict())
    before = saved.get("processes", processes)  # not in the first versions' checkpoints
    if before != processes:
        changes.append(
            f"processes: {before} -> {processes} (a step has another number of images, an epoch another number of"
            " steps)"
        )
    data = pair.fingerprints()
    for key, what in (("data", "training"), ("eval_data", "evaluation")):
        theirs = saved.get(key, data[key])  # the first versions' checkpoints have no eval_data
        if theirs != data[key]:
            old, new = (f"{digest[:12]}..." if digest else "none" for digest in (theirs, data[key]))
            changes.append(f"{what} data (classes, images, boxes): {old} -> {new}")
    if saved["loader"]["num_samples"] != images:
        changes.append(f"number of training images: {saved['loader']['num_samples']} -> {images}")
    if list(saved["classes"]) != list(pair.training.classes):
        raise UsageError(
            f"{path}: trained on classes {list(saved['classes'])}, the data has {list(pair.training.classes)}"
        )
    return changes


def require_allowed(changes: Sequence[str], path: Path, allow_config_change: bool, reporter: Reporter) -> None:
    """Warns of the changes that a run goes on with.

    Raises:
        UsageError: one of them cannot be, or there are any and the user did not allow them.
    """
    fixed = sorted({key_of(line) for line in changes} & FIXED_KEYS)
    if fixed:
        raise UsageError(
            f"{path}: {', '.join(fixed)}: cannot change in a run (what is saved depends on it):\n  "
            + "\n  ".join(line for line in changes if key_of(line) in fixed)
        )
    if changes and not allow_config_change:
        raise UsageError(
            f"{path}: the run was started differently; --allow-config-change continues all the same:\n  "
            + "\n  ".join(changes)
        )
    for change in changes:
        reporter.warn(f"continuing with a changed configuration: {change}")
