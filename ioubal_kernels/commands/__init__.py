"""The commands of `ioubal`, one module a subject; importing this registers them."""

from . import data, detector, experiments
from .app import run

__all__ = ["data", "detector", "experiments", "run"]
