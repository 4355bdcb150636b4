"""The copy of the sources that packaging tests build in: never the checkout, which other tests use at the same time."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load_helpers() -> ModuleType:
    """tests/packaging/building.py under a name of its own: test folders are no packages."""
    spec = importlib.util.spec_from_file_location("packaging_building", Path(__file__).with_name("building.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def building() -> ModuleType:
    return load_helpers()


@pytest.fixture(scope="module")
def sources(building: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources in a folder whose name has a space."""
    return building.copy_sources(tmp_path_factory.mktemp("checkout with space"))
