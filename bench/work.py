"""What is timed: a problem's inputs, the paths that solve it, and the phases of each."""

from __future__ import annotations

import functools
import importlib.util
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import ioubal_kernels as ik

from .clocks import Step
from .neighbour import Neighbour
from .timing import Row

# The phases of a loss. Forward keeps what the backward needs; inference runs without gradients; a backward with another
# grad_output than the expected one cannot use what the forward prepared.
BOTH, FORWARD, INFERENCE = "forward + backward", "forward", "inference"
BACKWARD, OTHER = "backward", "backward, another grad_output"
# Reads and writes of the logits that a phase needs at least. A backward may find its gradient ready: no number.
UNITS = {BOTH: 2, INFERENCE: 1, OTHER: 2}
COPY = "copy of the logits"


@dataclass
class Bench:
    """What every case is measured with."""

    device: str  # "cpu" or "cuda"
    backends: tuple[str, ...]  # ours, the first one is the headline's
    small: bool = False  # a dry run
    rounds: int = 15
    replays: int = 20  # queued replays of a round, on a GPU
    seconds: float = 4.0  # of one path in one case
    isas: tuple[int, ...] = ()  # instruction sets beside the best one
    peers: bool = True
    neighbour: Neighbour | None = None  # whose disturbances are repeated


@dataclass
class Phase:
    """One timed step; prepare runs before each, untimed."""

    step: Step
    prepare: Callable[[], Any] | None = None
    warm: bool = True  # the step may run several times after one prepare


class Work:
    """A path on one set of inputs: losses, and the leaves that their sum is differentiated by.

    refill: runs before everything that consumes its inputs.
    """

    def __init__(
        self,
        losses: Callable[[], Sequence[Tensor]],
        leaves: Sequence[Tensor] = (),
        refill: Callable[[], Any] | None = None,
    ) -> None:
        self.losses, self.leaves, self.refill = losses, list(leaves), refill
        self._held: list[Tensor] = []

    def both(self) -> list[Tensor]:
        """A training step's part: losses, then the gradients of their sum."""
        losses = list(self.losses())
        return [
            *(x.detach() for x in losses),
            *torch.autograd.grad(functools.reduce(operator.add, losses), self.leaves),
        ]

    def forward(self) -> list[Tensor]:
        return list(self.losses())

    def inference(self) -> list[Tensor]:
        with torch.no_grad():
            return list(self.losses())

    def hold(self) -> None:
        """The forward whose backward comes next."""
        if self.refill is not None:
            self.refill()
        self._held = [functools.reduce(operator.add, self.losses())]

    def release(self) -> None:
        """Lets go of what the last `hold` keeps."""
        self._held = []

    def backward(self, grad_output: Tensor | None = None, retain: bool = False) -> list[Tensor]:
        return list(torch.autograd.grad(self._held[0], self.leaves, grad_output, retain_graph=retain))

    def phase(self, name: str, device: str) -> Phase:
        """The phase of that name. On a GPU a captured backward is replayed: its tensors must stay."""
        if name == BOTH:
            return Phase(self.both, self.refill)
        if name == FORWARD:
            return Phase(self.forward, self.refill)
        if name == INFERENCE:
            return Phase(self.inference, self.refill)
        grad_output = torch.full((), 2.0, device=device) if name == OTHER else None
        return Phase(lambda: self.backward(grad_output, device == "cuda"), self.hold, warm=False)


@dataclass
class Contender:
    """A path of a case.

    make(number): the work on that set of inputs. check(work, results): raises AssertionError where the results of
    `both` (or of `inference`, without gradients) are wrong; parity says what they were compared with.
    """

    path: str
    computes: str
    make: Callable[[int], Work]
    check: Callable[[Work, list[Tensor]], None]
    parity: str
    phases: tuple[str, ...] = (BOTH,)
    facts: Row = field(default_factory=dict)
    graph: bool = True  # whether a CUDA graph can hold it
    package: str | None = None  # that it needs

    def missing(self) -> bool:
        if self.package is None:
            return False
        try:
            return importlib.util.find_spec(self.package) is None
        except ImportError:  # of a parent package
            return True


@dataclass
class Problem:
    """A case with its inputs drawn."""

    facts: Row
    contenders: list[Contender]
    elements: int  # entries of the logits: what the copy copies
    dtype: torch.dtype
    sets: int  # of inputs, which the rounds rotate among
    bytes: dict[str, int]  # phase -> bytes that any implementation must read and write
    entries: str = "logit"  # what a time per entry is of
    calls: int = 1  # of a sample on the CPU: more for small ones


@dataclass(frozen=True)
class Case:
    """One line of `ioubal bench list`."""

    name: str  # kind/..., unique
    kind: str  # cases of a kind and size take about as long
    what: str
    build: Callable[[Bench], Problem]
    guess: float = 10.0  # seconds on a CPU, until one of its kind has run
    devices: tuple[str, ...] = ("cpu", "cuda")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def available(device: str) -> tuple[str, ...]:
    """Our backends for tensors of a device, the automatic choice first; the reference is none of the fused ones."""
    order = ("cpu",) if device == "cpu" else ("cuda", "triton")
    there = ik.available_backends()
    return tuple(name for name in order if name in there)
