"""Optimisers, the learning rate of a step, and gradient clipping."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or SGD; weight decay spares norms and biases (everything of one dimension) unless `decay_all`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": config.weight_decay * config.decay_all},
    ]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999))
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


def warmup_steps(iterations: int, config: OptimConfig) -> int:
    """How many of a run's first steps warm up: `warmup_steps` or a share `warmup` of the run."""
    return round(config.warmup * iterations) if config.warmup_steps is None else config.warmup_steps


def learning_rate(step: int, iterations: int, config: OptimConfig) -> float:
    """The rate of optimisation step `step` (0-based) out of `iterations`.

    A function of the step alone, so that resuming needs no scheduler state. Linear warm-up from `warmup_start` of the
    rate over `warmup_steps`, then a cosine to 0, or a factor `gamma` at each milestone (both
    given as shares of the run), or constant.
    """
    warming = warmup_steps(iterations, config)
    if step < warming:
        start = config.warmup_start
        return config.lr * (start + (1 - start) * (step + 1) / (warming + 1))
    if config.schedule == "cosine":
        progress = (step - warming) / max(1, iterations - warming)
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "multistep":
        return config.lr * config.gamma ** sum(step >= milestone * iterations for milestone in config.milestones)
    return config.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their joint norm is at most `max_norm` (0: only measure); the norm before, 0-d.

    A norm that is NaN or infinite leaves the gradients as they are: clipping by it would spoil every parameter at once.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm and torch.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_([p for p in model.parameters() if p.grad is not None], max_norm, norm)
    return norm
