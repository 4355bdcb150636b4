"""MMDetection as the tests run it: the real mmdet and mmengine, and mmcv with or without its compiled operators.

mmcv's operators (`mmcv._ext`) come in no wheel of PyPI; mmcv-lite has none, and `import mmdet.models` needs them to be
importable only. Where they are missing, a module of that name stands in: NMS is torchvision's, everything else raises.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
import torchvision


class _Operators(types.ModuleType):
    """Stands in for mmcv._ext; without a loader, by which mmengine tells that there are no operators."""

    def __init__(self) -> None:
        super().__init__("mmcv._ext")
        self.__spec__ = ModuleSpec("mmcv._ext", None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **keywords: Any) -> None:
            raise NotImplementedError(f"mmcv._ext.{name}: mmcv is installed without its compiled operators")

        return missing

    @staticmethod
    def nms(boxes: torch.Tensor, scores: torch.Tensor, *, iou_threshold: float, offset: int) -> torch.Tensor:
        assert offset == 0
        return torchvision.ops.nms(boxes, scores, iou_threshold)


def load() -> types.ModuleType:
    """mmdet, ready to build models; skips the module that calls it where it is not installed.

    With IOUBAL_FRAMEWORKS_REQUIRED=1 (CI) its absence is an error.
    """
    try:
        importlib.import_module("mmcv")
        try:
            importlib.import_module("mmcv._ext")
        except ImportError:
            sys.modules["mmcv._ext"] = _Operators()
        mmdet = importlib.import_module("mmdet")
        importlib.import_module("mmdet.models")
    except ImportError as error:
        if os.environ.get("IOUBAL_FRAMEWORKS_REQUIRED") == "1":
            raise
        pytest.skip(f"MMDetection cannot be imported: {error}", allow_module_level=True)
    importlib.import_module("mmdet.utils").register_all_modules(init_default_scope=True)
    return mmdet


def operators() -> str:
    """Which operators run, for a test's report."""
    return "stand-in" if isinstance(sys.modules["mmcv._ext"], _Operators) else "compiled"
