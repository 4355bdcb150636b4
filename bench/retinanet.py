"""The fused detection loss on RetinaNet's heads, beside its peers: one case's inputs, paths and oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ioubal_kernels as ik
from ioubal_kernels import testing
from ioubal_kernels.ops.library import BEST_ISA, limit_isa

from . import inputs as bench_inputs
from . import machine
from .clocks import sets_beyond_cache
from .peers import WHOLE, Peer, assert_near, oracle_work, peers_of
from .work import BACKWARD, BOTH, FORWARD, INFERENCE, OTHER, Bench, Contender, Problem, Work, short

# Entries up to which every element is held against the float64 oracle at full size: it takes 8 times the logits'
# memory in float64. Beyond, the same heads on a smaller image are.
ORACLE_ENTRIES = 40_000_000


@dataclass(frozen=True)
class RetinaNet:
    """One line of the table."""

    batch: int
    layout: str
    dtype: torch.dtype
    classes: int = bench_inputs.CLASSES
    peers: bool = False
    variants: bool = False  # other gammas, in place, other instruction sets

    @property
    def name(self) -> str:
        classes = "" if self.classes == bench_inputs.CLASSES else f"/k{self.classes}"
        return f"retinanet{classes}/b{self.batch}/{self.layout}/{short(self.dtype)}"


def draw(
    bench: Bench, case: RetinaNet, levels: bench_inputs.Levels, seed: int
) -> tuple[testing.DetectionInputs, testing.DetectionInputs]:
    """The same numbers flat and in the case's layout, int32 indices."""
    found = bench_inputs.targets(seed, levels, case.batch, bench.device, torch.int32, case.classes)
    flat = bench_inputs.with_logits(found, case.dtype, "flat", seed, case.dtype, case.classes)
    return flat, flat.in_layout(case.layout).requiring_grad() if case.layout != "flat" else flat


def flat_of(heads: testing.DetectionInputs, grads: list[Tensor]) -> list[Tensor]:
    """Gradients of the heads' tensors as those of flat heads."""
    if isinstance(heads.cls_logits, Tensor):
        return grads
    half = len(grads) // 2
    return [testing.from_levels(maps, heads.per_location) for maps in (grads[:half], grads[half:])]


@dataclass
class Oracle:
    """The float64 reference's losses and gradients of flat heads, by loss options."""

    flat: testing.DetectionInputs
    found: dict[Any, list[Tensor]] = field(default_factory=dict)

    def ours(self, **options: Any) -> list[Tensor]:
        """[classification, localization, the logits' gradient, the deltas' gradient]"""
        key = tuple(sorted(options.items()))
        if key not in self.found:
            wide = self.flat.double().requiring_grad()
            loss = partial(ik.iou_balanced_detection_loss, *wide.arguments(), backend="reference", **options)
            self.found[key] = Work(lambda: loss()[:2], wide.heads()).both()
        return self.found[key]

    def check(self, heads: testing.DetectionInputs, results: list[Tensor], what: str, **options: Any) -> None:
        """Losses and every element of the gradients, within the budgets."""
        want = self.ours(**options)
        for got, exact in zip(results[:2], want[:2], strict=True):
            testing.assert_close_budget(got, exact, torch.float32, "loss", what=f"{what}: loss")
        for got, exact in zip(flat_of(heads, results[2:]), want[2:], strict=True):
            testing.assert_close_budget(got, exact, got.dtype, what=f"{what}: gradient")

    def check_peer(self, peer: Peer, heads: testing.DetectionInputs, results: list[Tensor], losses: int) -> None:
        if peer.computes not in self.found:
            self.found[peer.computes] = oracle_work(peer, self.flat).both()
        grads = results[losses:]
        grads = flat_of(heads, grads) if len(grads) > 1 else grads
        dtype, positives = grads[0].dtype, self.flat.matched_idxs >= 0
        assert_near([*results[:losses], *grads], self.found[peer.computes], losses, dtype, positives, peer.name)


def fused(heads: testing.DetectionInputs, backend: str, isa: int | None = None, **options: Any) -> Work:
    """Ours. isa: at most that instruction set."""
    loss = partial(ik.iou_balanced_detection_loss, *heads.arguments(), backend=backend, **options)

    def limited() -> tuple[Tensor, Tensor]:
        limit_isa(isa)
        try:
            return loss()[:2]
        finally:
            limit_isa(BEST_ISA)

    return Work((lambda: loss()[:2]) if isa is None else limited, heads.heads())


def in_place(source: testing.DetectionInputs, backend: str) -> Work:
    """Ours on logits of its own, which each call consumes and the next one's refill restores."""
    logits = source.cls_logits.detach()
    heads = replace(source, cls_logits=logits.clone().requires_grad_())
    work = fused(heads, backend, inplace=True)
    work.refill = lambda: heads.cls_logits.data.copy_(logits)
    return work


def build(bench: Bench, case: RetinaNet) -> Problem:
    """The case's inputs and paths."""
    levels = bench_inputs.SMALL_LEVELS if bench.small else testing.RETINANET_LEVELS
    rows = case.batch * bench_inputs.anchors_of(levels)
    elements = rows * case.classes
    item = torch.finfo(case.dtype).bits // 8
    sets = sets_beyond_cache(2 * elements * item, bench.device)
    whole = elements <= ORACLE_ENTRIES
    tested = case if whole else replace(case, batch=1)
    flat, first = draw(bench, tested, levels if whole else bench_inputs.MIDDLE_LEVELS, 0)
    oracle = Oracle(flat)
    parity = "every element at full size" if whole else "every element of a smaller image"
    kept = {} if whole else {-1: first}  # by set; -1 is what parity is checked on
    made: dict[int, testing.DetectionInputs] = {0: first} if whole else {}

    def heads_of(number: int) -> testing.DetectionInputs:
        if number < 0 and number in kept:
            return kept[number]
        number = max(number, 0)
        if number not in made:
            made[number] = draw(bench, case, levels, number)[1]
        return made[number]

    def ours(path: str, make: Callable[[testing.DetectionInputs], Work], phases: tuple[str, ...], **facts: Any) -> None:
        options = {"gamma": facts["gamma"]} if "gamma" in facts else {}
        contenders.append(
            Contender(
                path,
                WHOLE,
                lambda number: make(heads_of(number)),
                lambda _, results: oracle.check(heads_of(-1), results, f"{case.name}, {path}", **options),
                parity,
                phases,
                facts,
            )
        )

    def theirs(peer: Peer, **facts: Any) -> None:
        contenders.append(
            Contender(
                peer.name,
                peer.computes,
                lambda number: peer.make(heads_of(number)),
                lambda work, found: oracle.check_peer(peer, heads_of(-1), found, len(found) - len(work.leaves)),
                f"{'every entry' if whole else 'a smaller image'}, in norm",
                peer.phases,
                facts,
                peer.graph,
                peer.package,
            )
        )

    contenders: list[Contender] = []
    for backend in bench.backends:
        all_phases = (BOTH, INFERENCE, BACKWARD, OTHER, FORWARD)
        ours("fused", partial(fused, backend=backend), all_phases, backend=backend)
    headline = bench.backends[0]
    if case.variants:
        for gamma in (0.0, 1.0, 1.5):
            make = partial(fused, backend=headline, gamma=gamma)
            ours(f"fused, gamma {gamma:g}", make, (BOTH,), backend=headline, gamma=gamma)
        ours("fused, in place", partial(in_place, backend=headline), (BOTH,), backend=headline)
        for isa in bench.isas:
            name = machine.ISA_NAMES[isa]
            ours(f"fused, {name}", partial(fused, backend=headline, isa=isa), (BOTH,), backend=headline, isa=name)
        reference = Peer("reference backend", WHOLE, partial(fused, backend="reference"), phases=(BOTH,))
        theirs(reference, backend="reference")
    if case.peers and bench.peers:
        for peer in peers_of(case.batch, case.layout, case.dtype):
            theirs(peer)
    logits, deltas, matched = elements * item, rows * 4 * item, rows * 4
    moved = {BOTH: 2 * logits + deltas + matched, INFERENCE: logits + matched, OTHER: 2 * logits + deltas + matched}
    facts = {
        "case": "retinanet",
        "batch": case.batch,
        "layout": case.layout,
        "dtype": short(case.dtype),
        "classes": case.classes,
        "anchors": rows // case.batch,
    }
    return Problem(facts, contenders, elements, case.dtype, sets, moved)
