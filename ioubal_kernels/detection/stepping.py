"""One optimisation step: batches in, averaged gradients, one decision of all processes, figures out."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from .config import Config, parse_nan_policy
from .data import Batch
from .ema import ModelEma
from .models import Detector
from .objective import autocast, normalizers, to_device
from .optim import clip_gradients, learning_rate, make_optimizer, set_learning_rate
from .processes import Processes


class Stepper:
    """The objects that a step changes.

    Args:
        detector: with its losses (`objective.apply_loss`), on the device, in training mode.
        config: of the run.
        processes: that share each step's batches.
        amp: autocast's dtype, None for float32.
        steps: the run's length, for the learning rate.
    """

    def __init__(
        self, detector: Detector, config: Config, processes: Processes, amp: torch.dtype | None, steps: int
    ) -> None:
        self.detector, self.config, self.processes, self.amp, self.steps = detector, config, processes, amp, steps
        self.optimizer = make_optimizer(detector, config.optim)
        self.ema = ModelEma(detector, config.train.ema)
        self.parallel = processes.parallel(detector)
        self.allowed = parse_nan_policy(config.train.nan_policy)
        images = config.train.batch_size * config.train.accumulate * processes.world_size
        self.rate_factor = images / config.optim.base_batch if config.optim.base_batch else 1.0

    def run(
        self, step: int, batches: list[Batch], stop: bool, *, watch: bool = False
    ) -> tuple[dict[str, Any], bool, bool]:
        """Step number `step` (0-based) on `batches`, whose gradients are averaged.

        Args:
            stop: whether this process was told to stop.
            watch: put the normalisers of this process's positives into the record.

        Returns:
            The step's record: its number (1-based), the losses, gradient norm, positives, mean IoU and learning rate;
            whether all of it was finite and the weights were changed; whether any process was told to stop. Losses are
            means over batches and processes, the same in all of them.
        """
        config = self.config
        # Samplers (of Faster R-CNN) draw from torch's generator: as a function of the step, a resumed run draws the
        # same, and every process something else.
        torch.manual_seed(_step_seed(config.train.seed, step, self.processes.rank))
        rate = self.rate_factor * learning_rate(step, self.steps, config.optim)
        set_learning_rate(self.optimizer, rate)
        # A NaN image would stay in BatchNorm's running statistics for ever, although its batch is skipped.
        buffers = [b.clone() for b in self.detector.buffers()] if self.allowed else []
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        with self.detector.record_positives() if watch else contextlib.nullcontext() as recording:
            for number, batch in enumerate(batches, start=1):
                for name, value in self._backward(batch, len(batches), last=number == len(batches)).items():
                    totals[name] = totals[name] + value if name in totals else value
        norm = clip_gradients(self.detector, config.optim.clip)
        names = [*totals, "stop"]
        flag = torch.tensor(float(stop), dtype=torch.float64, device=norm.device)
        # One transfer for all figures: a GPU is asked once a step.
        means = self.processes.sum(torch.stack([*totals.values(), flag])) / self.processes.world_size
        *figures, gradient = torch.cat([means, norm.detach().double().reshape(1)]).tolist()
        found = dict(zip(names, figures, strict=True))
        stop = found.pop("stop") > 0
        record = {
            "step": step + 1,
            **found,
            "grad_norm": gradient,
            "positives": round(found["positives"] * len(batches)),
            "lr": rate,
        }
        finite = all(math.isfinite(value) for value in (*found.values(), gradient))
        if finite:
            self.optimizer.step()
            self.ema.update(self.detector)
        else:
            for buffer, before in zip(self.detector.buffers(), buffers, strict=bool(buffers)):
                buffer.copy_(before)
        if recording is not None:
            record |= normalizers(recording, config.loss, self.detector.box_coder(rpn=False))
        return record, finite, stop

    def _backward(self, batch: Batch, count: int, last: bool) -> dict[str, Tensor]:
        """Add a batch's gradients; its losses and figures, each divided by the number of batches, float64 0-d."""
        images, boxes, labels = to_device(batch, self.processes.device, self.config.train.channels_last)
        # Gradients travel between processes once a step.
        alone = self.processes.several and not last
        with self.parallel.no_sync() if alone else contextlib.nullcontext():
            with autocast(self.processes.device, self.amp):
                losses = self.parallel(images, boxes, labels)
            (sum(losses.values()) / count).backward()
        figures = {**losses, **self.detector.statistics()}
        return {name: value.detach().double() / count for name, value in figures.items()}


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step * 4_099 + rank) % 2**63
