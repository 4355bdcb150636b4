"""Giving a module another class, and its own back.

The new class is made of a mixin and the module's class, so that subclasses of torchvision's models keep what they add.
It has no parameters of its own: state dicts, hooks and references stay as they are. It is made when it is needed and
has no name to be imported by, hence the way it pickles.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

from torch import nn

from .settings import OP, Settings

ATTRIBUTE = "iou_balanced"


class Balanced:
    """Base of the mixins."""

    iou_balanced: Settings

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(protocol)
        return (_new, (type(self)._mixin, type(self)._original), *state)


@functools.cache
def _balanced_class(mixin: type, original: type) -> type:
    members = {"_mixin": mixin, "_original": original, "__module__": original.__module__, "__doc__": original.__doc__}
    return type(f"IoUBalanced{original.__name__}", (mixin, original), members)


def _new(mixin: type, original: type) -> Any:
    cls = _balanced_class(mixin, original)
    return cls.__new__(cls)


def warn_of_own_loss(module: nn.Module, stock: type) -> None:
    """For a class with its own `compute_loss`: the balanced one takes its place, with whatever it adds to `stock`'s."""
    original = getattr(type(module), "_original", type(module))
    if original.compute_loss is not stock.compute_loss:
        warnings.warn(
            f"{OP}: {original.__name__}.compute_loss is not called any more: the balanced one takes its place. What it"
            f" adds to {stock.__name__}'s has to be added where the model is called",
            stacklevel=4,
        )


def swap(module: nn.Module, mixin: type, settings: Settings) -> None:
    """Make `module` compute balanced losses; a module that does already gets new settings."""
    if not isinstance(module, Balanced):
        module.__class__ = _balanced_class(mixin, type(module))
    setattr(module, ATTRIBUTE, settings)


def swap_back(module: nn.Module) -> None:
    """Undo `swap`; nothing for a module that was not swapped."""
    if isinstance(module, Balanced):
        module.__class__ = type(module)._original
        delattr(module, ATTRIBUTE)
