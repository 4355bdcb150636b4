"""Runs inside a process with TRITON_INTERPRET=1; see test_interpreter.py."""

import guarded
import interpreter
import pytest
import torch

from ioubal_kernels.ops import autograd, workspace

interpreter.install()


@pytest.fixture(autouse=True)
def guard(monkeypatch):
    """Gradient buffers and scratch memory end at guard pages and are NaN before they are written."""
    monkeypatch.setattr(torch, "empty_like", guarded.empty_like)
    monkeypatch.setattr(autograd, "_empty_in_phase", guarded.empty_like)  # as it is where logits are guarded
    monkeypatch.setattr(workspace, "_tensor", guarded.workspace)
