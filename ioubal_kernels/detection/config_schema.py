"""Typed options: what a configuration value may be, checked when it is set."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import field
from typing import Any

from .errors import UsageError

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class Checked:
    """Base of the configuration's sections."""


def option(
    default: Any,
    kind: type,
    *,
    doc: str,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] | None = None,
    words: tuple[str, ...] = (),
    optional: bool = False,
    length: int | None = -1,
) -> Any:
    """A dataclass field with its rules.

    Args:
        default, kind: the value and its type (bool, int, float, str).
        doc: one line for `ioubal configs NAME`.
        low, high: closed bounds; above: open lower bound.
        choices: all strings allowed; words: strings allowed besides numbers.
        optional: null is allowed.
        length: a sequence of that many values, None for any number, -1 for a single value.
    """
    rules = {"kind": kind, "low": low, "high": high, "above": above, "choices": choices, "words": words}
    return field(default=default, metadata={**rules, "optional": optional, "length": length, "doc": doc})


def check_value(key: str, value: Any, option_field: dataclasses.Field) -> Any:
    """The value as the option's type.

    Raises:
        UsageError: naming key, expected and got.
    """
    rules = option_field.metadata
    if value is None and rules["optional"]:
        return None
    length = rules["length"]
    if length == -1:
        return _check_single(key, value, rules)
    if not isinstance(value, (list, tuple)) or (length is not None and len(value) != length):
        raise UsageError(f"{key}: expected {describe(rules)}, got {value!r}")
    return tuple(_check_single(key, item, rules) for item in value)


def _check_single(key: str, value: Any, rules: Any) -> Any:
    kind = rules["kind"]
    if isinstance(value, str) and value in rules["words"]:
        return value
    # YAML 1.1 reads 3e-3 (no point) as text.
    if kind is float and isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    # YAML 1.1 reads off as false.
    if value is False and rules["choices"] is not None and "off" in rules["choices"]:
        value = "off"
    # A bool is an int to Python, never to a reader of a configuration.
    right_type = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    if not right_type or (kind is float and not math.isfinite(value)):
        raise UsageError(f"{key}: expected {describe(rules)}, got {value!r} ({type(value).__name__})")
    if kind in (int, float):
        low, high, above = rules["low"], rules["high"], rules["above"]
        if (
            (low is not None and value < low)
            or (high is not None and value > high)
            or (above is not None and value <= above)
        ):
            raise UsageError(f"{key}: expected {describe(rules)}, got {value!r}")
    if rules["choices"] is not None and value not in rules["choices"]:
        raise UsageError(f"{key}: expected {describe(rules)}, got {value!r}")
    return value


def describe(rules: Any) -> str:
    """The rule in words."""
    if rules["choices"] is not None:
        text = "one of " + ", ".join(rules["choices"])
    else:
        text = {bool: "true or false", int: "an integer", float: "a number", str: "text"}[rules["kind"]]
        if rules["above"] is not None:
            text += f" > {rules['above']:g}"
        if rules["low"] is not None:
            text += f" >= {rules['low']:g}"
        if rules["high"] is not None:
            text += f"{' and' if rules['low'] is not None or rules['above'] is not None else ''} <= {rules['high']:g}"
    if rules["words"]:
        text += " or " + " or ".join(rules["words"])
    if rules["length"] is None:
        text = f"a list, each {text}"
    elif rules["length"] != -1:
        text = f"a list of {rules['length']}, each {text}"
    return text + (" or null" if rules["optional"] else "")
