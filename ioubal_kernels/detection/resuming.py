"""Going on from a checkpoint: what differs from the run that wrote it, and which of that it allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import Config, config_diff
from .errors import UsageError
from .progress import Reporter
from .rundir import data_changes
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
    saved: dict[str, Any],
    path: Path,
    config: Config,
    classes: Sequence[str],
    fingerprints: dict[str, str | None],
    images: int,
    processes: int,
) -> list[str]:
    """Lines `key: old -> new` of what matters to the result and is not what the checkpoint's run had.

    Args:
        saved, path: the checkpoint.
        config, classes, fingerprints, images, processes: of the run that goes on: configuration, classes and
            `fingerprints` of the data, number of training images, number of processes.

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
    changes += data_changes(saved, fingerprints)  # the first versions' checkpoints have no eval_data
    if saved["loader"]["num_samples"] != images:
        changes.append(f"number of training images: {saved['loader']['num_samples']} -> {images}")
    if list(saved["classes"]) != list(classes):
        raise UsageError(f"{path}: trained on classes {list(saved['classes'])}, the data has {list(classes)}")
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
