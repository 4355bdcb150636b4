"""Optimiser, learning rate, clipping, and what a run computes with."""

from __future__ import annotations

import math

import pytest
import torch

from ioubal_kernels.detection import resources
from ioubal_kernels.detection.config import OptimConfig
from ioubal_kernels.detection.errors import UsageError
from ioubal_kernels.detection.models import build_model
from ioubal_kernels.detection.optim import clip_gradients, learning_rate, make_optimizer

CPU = torch.device("cpu")


def test_cosine_by_hand():
    """100 steps, 10 of warm-up: (t + 1) / 11 of the rate, then 1, one half in the middle, cos at the end."""
    config = OptimConfig(lr=2.0, warmup=0.1)
    assert learning_rate(0, 100, config) == pytest.approx(2 / 11)
    assert learning_rate(9, 100, config) == pytest.approx(20 / 11)
    assert learning_rate(10, 100, config) == 2.0
    assert learning_rate(55, 100, config) == pytest.approx(1.0)
    assert learning_rate(99, 100, config) == pytest.approx(1 + math.cos(math.pi * 89 / 90))


def test_warm_up_in_steps_from_a_third():
    """500 steps from 1/3: the first is 1/3 + 2/3 / 501, then the full rate."""
    config = OptimConfig(lr=3.0, warmup_steps=500, warmup_start=1 / 3, schedule="constant")
    assert learning_rate(0, 10_000, config) == pytest.approx(1 + 2 / 501)
    assert learning_rate(499, 10_000, config) == pytest.approx(1 + 2 * 500 / 501)
    assert learning_rate(500, 10_000, config) == 3.0


def test_multistep_and_constant_by_hand():
    config = OptimConfig(lr=1.0, warmup=0.0, schedule="multistep", milestones=(0.5, 0.9), gamma=0.1)
    assert [learning_rate(t, 10, config) for t in (0, 4, 5, 8, 9)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    config.schedule = "constant"
    assert learning_rate(9, 10, config) == 1.0


def test_weight_decay_spares_norms_and_biases():
    model = build_model("retinanet_tiny", 2)
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.05))
    decayed, spared = optimizer.param_groups
    assert decayed["weight_decay"] == 0.05
    assert spared["weight_decay"] == 0.0
    assert all(p.ndim == 4 for p in decayed["params"])
    assert all(p.ndim == 1 for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_clipping_by_hand():
    """Gradients (3, 4) have norm 5; clipped to 1 they are (0.6, 0.8). A NaN norm changes nothing."""
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_gradients(model, 0.0).item() == 5.0
    assert model.weight.grad.tolist() == [[3.0, 4.0]]
    assert clip_gradients(model, 1.0).item() == 5.0
    assert model.weight.grad.tolist()[0] == pytest.approx([0.6, 0.8], rel=1e-5)
    model.weight.grad = torch.tensor([[float("nan"), 4.0]])
    assert math.isnan(clip_gradients(model, 1.0).item())
    assert model.weight.grad[0, 1].item() == 4.0


def test_amp_auto_asks_the_processor(monkeypatch, tmp_path):
    for flags, expected in (("avx2 avx512f", None), ("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16)):
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text(f"flags : fpu {flags}\n")
        monkeypatch.setattr(resources, "Path", lambda _, file=cpuinfo: file)
        assert resources.resolve_amp("auto", CPU) is expected
    monkeypatch.setattr(resources, "Path", lambda _: tmp_path / "missing")
    assert resources.resolve_amp("auto", CPU) is None
    assert resources.resolve_amp("off", CPU) is None
    assert resources.resolve_amp("bf16", CPU) is torch.bfloat16


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:", "CPU", "cuda:-1", ""])
def test_bad_device(name):
    if name == "cuda:" and torch.cuda.is_available():
        pytest.skip("means the first GPU")
    with pytest.raises(UsageError, match=r"train.device: "):
        resources.resolve_device(name)


def test_a_gpu_that_is_not_there():
    with pytest.raises(UsageError, match="train.device: cuda:99 was asked for, but"):
        resources.resolve_device("cuda:99")


def test_a_backend_that_is_not_there_says_why():
    with pytest.raises(UsageError, match="loss.backend: triton cannot be used on cpu"):
        resources.check_backend("triton", CPU)
    resources.check_backend("reference", CPU)
    resources.check_backend("auto", CPU)
