"""Configuration values given over all trainings of an experiment: what has no effect is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..detection.config import Config
from ..detection.errors import UsageError
from ..detection.unused_keys import refuse_unused


def check_options(options: Mapping[str, Any], configs: Sequence[Config], owned: Mapping[str, str]) -> None:
    """Refuse options that none of the trainings' configurations follows.

    Args:
        options: values by dotted key.
        configs: of all trainings, the options in them.
        owned: keys that the experiment sets itself, and what to do instead.

    Raises:
        UsageError: naming the option.
    """
    for key, value in options.items():
        if key in owned:
            raise UsageError(f"--set: {key} is the experiment's own: {owned[key]}")
        given = configs[0].copy()
        given.set(key, value)
        # A weight that is switched off by the arms is switched on by them, too.
        off = key in ("loss.eta", "loss.lambda_") and value == 0
        if off or all(_value(config, key) != _value(given, key) for config in configs):
            raise UsageError(f"--set: {key}={value} has no effect: the arms of the comparison set it")
    refuse_unused(options, *configs)


def _value(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)
