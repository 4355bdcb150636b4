"""Exponential moving average of a model's weights: the weights that are evaluated."""

from __future__ import annotations

import copy

import torch
from torch import nn


class ModelEma:
    """A second model whose parameters and running statistics follow those of `model`.

    Args:
        model: the trained model.
        decay: share kept at every update; the first updates keep less, so that the initialisation is forgotten. 0
            copies.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step towards `model`."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.decay else 0.0
        source = model.state_dict()
        averaged, targets = [], []
        for name, value in self.module.state_dict().items():
            if value.is_floating_point():
                averaged.append(value)
                targets.append(source[name].to(value.dtype))
            else:
                value.copy_(source[name])
        torch._foreach_lerp_(averaged, targets, 1 - decay)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "model": self.module.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        self.module.load_state_dict(state["model"])
