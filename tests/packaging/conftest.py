"""The copy of the sources that packaging tests build in: never the checkout, which other tests use at the same time."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load(name: str, path: Path) -> ModuleType:
    """A file under a name of its own: neither the test folders nor tools/ are packages."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def building() -> ModuleType:
    return load("packaging_building", Path(__file__).with_name("building.py"))


@pytest.fixture(scope="session")
def cuda_code() -> ModuleType:
    """tools/cuda_code.py, the gate on the machine code."""
    return load("cuda_code", Path(__file__).parents[2] / "tools" / "cuda_code.py")


@pytest.fixture(scope="session")
def wheel_matrix() -> ModuleType:
    """tools/wheel_matrix.py."""
    return load("wheel_matrix", Path(__file__).parents[2] / "tools" / "wheel_matrix.py")


@pytest.fixture(scope="session")
def build_wheel() -> ModuleType:
    """tools/build_wheel.py."""
    return load("build_wheel", Path(__file__).parents[2] / "tools" / "build_wheel.py")


@pytest.fixture(scope="module")
def sources(building: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources in a folder whose name has a space."""
    return building.copy_sources(tmp_path_factory.mktemp("checkout with space"))
