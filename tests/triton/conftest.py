"""Tests of the Triton kernels. They run in Triton's interpreter, in processes of their own: whether triton interprets
is decided when it is imported. test_interpreter.py starts those processes, which collect the folder interpreted/."""

import importlib.util
import os

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if INTERPRETING else ["interpreted"]
MISSING = None if importlib.util.find_spec("triton") else "triton is not installed"


def pytest_collection_modifyitems(config, items):
    if MISSING:
        for item in items:
            if "tests/triton" in str(item.path).replace("\\", "/"):
                item.add_marker(pytest.mark.skip(reason=MISSING))
