"""One benchmarked case on a GPU: inputs, parity, captured paths, one race beside the copy, rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import ioubal_kernels as ik
from ioubal_kernels import testing

from .. import inputs as bench_inputs
from .. import timing
from .cases import short
from .graph_timing import Step, capture, clock_of, clocks_under_load, sets_beyond_cache, wall_ms
from .peers import PEERS, Peer

COPY = "copy of the logits"
Row = dict[str, Any]


@dataclass
class Bench:
    """What every case is measured with."""

    device: str
    backend: str
    small: bool  # a dry run
    rounds: int
    replays: int


@dataclass
class Path:
    """A path of a case: one replay per set of inputs, the bytes it must move, its facts in the row."""

    replays: list[Callable[[], Any]]
    bytes: int
    facts: Row
    timing: str = "graph"


def race_rows(bench: Bench, paths: dict[str, Path], copied_bytes: int, facts: Row) -> list[Row]:
    """Times all paths, the copy among them, in interleaved rounds.

    `x_copy` is a path's time over the copy's. `share_of_copy_rate` is its rate over the copy's where the path has
    "units" (reads and writes of the logits), by these alone; else by all its bytes.
    """
    timed = {
        name: timing.TimedPath(lambda i, replays=path.replays: replays[i % len(replays)](), path.facts)
        for name, path in paths.items()
    }
    times = timing.race(timed, bench.rounds, clock_of(bench.device, bench.replays))
    copy = timing.quantiles(times[COPY])
    clocks = clocks_under_load(timed[next(reversed(timed))].call, copy["median_ms"], bench.device)
    rows = []
    for name, path in paths.items():
        q = timing.quantiles(times[name])
        seconds, units = q["median_ms"] / 1e3, path.facts.get("units")
        counted = units * copied_bytes / 2 if units is not None else path.bytes
        row = {**facts, "path": name, **path.facts, "timing": path.timing if bench.device == "cuda" else "host"}
        row |= {"rounds": bench.rounds, "replays": bench.replays, "sets": len(path.replays)}
        row |= {key: round(value, 6) for key, value in q.items()}
        if path.bytes:
            row |= {"bytes": path.bytes, "gb_per_s": round(path.bytes / seconds / 1e9, 1)}
        row |= {"x_copy": round(q["median_ms"] / copy["median_ms"], 4)}
        if counted:
            row["share_of_copy_rate"] = round(counted / copied_bytes * copy["median_ms"] / q["median_ms"], 4)
        if "logits" in facts:
            row["ps_per_logit"] = round(seconds * 1e12 / facts["logits"], 4)
        rows.append({**row, **clocks})
    return rows


def copy_path(bench: Bench, elements: int, dtype: torch.dtype, sets: int) -> Path:
    """Contiguous copies of as many elements, as torch makes them: the rate that everything is held against."""
    pairs = [
        (
            torch.zeros(elements, dtype=dtype, device=bench.device),
            torch.empty(elements, dtype=dtype, device=bench.device),
        )
        for _ in range(sets)
    ]
    replays = [capture(lambda s=source, t=target: [t.copy_(s)], bench.device).run for source, target in pairs]
    return Path(replays, 2 * pairs[0][0].nbytes, {"units": 2})


# ---------------------------------------------------------------------------------------------- RetinaNet


def fused(bench: Bench, heads: testing.DetectionInputs) -> Step:
    """A training step's part: both losses, their sum, both gradients."""

    def step() -> list[Tensor]:
        out = ik.iou_balanced_detection_loss(*heads.arguments(), backend=bench.backend)
        grads = torch.autograd.grad(out.classification + out.localization, heads.heads())
        return [out.classification.detach(), out.localization.detach(), *grads]

    return step


def forward_only(bench: Bench, heads: testing.DetectionInputs) -> Step:
    def step() -> list[Tensor]:
        with torch.no_grad():
            return list(ik.iou_balanced_detection_loss(*heads.arguments(), backend=bench.backend)[:2])

    return step


def backward_only(bench: Bench, heads: testing.DetectionInputs, factor: float) -> tuple[Step, Callable[[], None]]:
    """The backward alone: of an expected grad_output a predicate that finds nothing to do, of another one a pass."""
    state: list[Tensor] = []
    grad_output = torch.full((), factor, device=bench.device)

    def prepare() -> None:
        out = ik.iou_balanced_detection_loss(*heads.arguments(), backend=bench.backend)
        state[:] = [out.classification + out.localization]

    def step() -> list[Tensor]:
        # The graph of autograd stays: its tensors are what the replays read.
        return list(torch.autograd.grad(state[0], heads.heads(), grad_output, retain_graph=True))

    return step, prepare


def flat_of(heads: testing.DetectionInputs, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    if isinstance(heads.cls_logits, Tensor):
        return grads[0], grads[1]
    half = len(grads) // 2
    return testing.from_levels(grads[:half], heads.per_location), testing.from_levels(grads[half:], heads.per_location)


class Oracle:
    """The float64 reference's losses and gradients of one set of inputs."""

    def __init__(self, flat: testing.DetectionInputs) -> None:
        wide = flat.double().requiring_grad()
        out = ik.iou_balanced_detection_loss(*wide.arguments(), backend="reference")
        self.losses = [out.classification.detach(), out.localization.detach()]
        self.grads = torch.autograd.grad(out.classification + out.localization, wide.heads())

    def check_losses(self, got: list[Tensor], what: str) -> None:
        for value, want in zip(got, self.losses, strict=True):
            testing.assert_close_budget(value, want, torch.float32, "loss", what=f"{what}: loss")

    def check_grads(self, heads: testing.DetectionInputs, grads: list[Tensor], factor: float, what: str) -> None:
        for got, want in zip(flat_of(heads, grads), self.grads, strict=True):
            testing.assert_close_budget(got, want * factor, got.dtype, what=f"{what}: gradient")


@dataclass(frozen=True)
class RetinaNet:
    """One case of the table."""

    batch: int
    layout: str
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"retinanet batch {self.batch} {self.layout} {short(self.dtype)}"


def draw(bench: Bench, case: RetinaNet, seed: int) -> tuple[testing.DetectionInputs, testing.DetectionInputs]:
    """The same numbers flat and in the case's layout, int32 indices."""
    found = bench_inputs.targets(seed, bench.small, case.batch, bench.device, torch.int32)
    flat = bench_inputs.with_logits(found, case.dtype, "flat", seed, case.dtype)
    return flat, flat.in_layout(case.layout).requiring_grad() if case.layout != "flat" else flat


def retinanet_rows(bench: Bench, case: RetinaNet) -> list[Row]:
    """The rows of a case; raises AssertionError where a path is wrong, before anything is timed."""
    elements = case.batch * (bench_inputs.SMALL_ANCHORS if bench.small else bench_inputs.ANCHORS) * bench_inputs.CLASSES
    size = elements * torch.finfo(case.dtype).bits // 8
    sets = sets_beyond_cache(2 * size, bench.device)
    flat, first = draw(bench, case, 0)
    try:
        oracle: Oracle | None = Oracle(flat)
        where = "every element at full size"
    except torch.OutOfMemoryError:
        oracle, where = None, "every element of one image's size: the oracle of all images needs more memory"
    if oracle is None:
        torch.cuda.empty_cache()
        one = replace(case, batch=1)
        small_flat, small_heads = draw(bench, one, 0)
        check_step(Oracle(small_flat), small_heads, fused(bench, small_heads)(), case.name)
    del flat
    heads = [first, *(draw(bench, case, seed)[1] for seed in range(1, sets))]
    deltas = elements // bench_inputs.CLASSES * 4 * torch.finfo(case.dtype).bits // 8
    matched = elements // bench_inputs.CLASSES * 4
    made: dict[str, tuple[list[Any], int, int | None]] = {}
    made["fused"] = ([capture(fused(bench, h), bench.device) for h in heads], 2 * size + deltas + matched, 2)
    if oracle is not None:
        check_step(oracle, first, made["fused"][0][0].results, case.name)
    made["fused, forward only"] = (
        [capture(forward_only(bench, h), bench.device) for h in heads],
        size + matched,
        1,
    )
    if oracle is not None:
        oracle.check_losses(made["fused, forward only"][0][0].results, f"{case.name}, forward only")
    # Each keeps gradients of its own: at batch 16 one set is beyond the cache, and enough.
    few = heads if case.batch < 8 else heads[:1]
    for name, factor, units in (("backward, grad_output as expected", 1.0, None), ("backward, another", 2.0, 2)):
        replays = []
        for h in few:
            step, prepare = backward_only(bench, h, factor)
            replays.append(capture(step, bench.device, prepare, warm=False))
        moved = 0 if units is None else 2 * size + deltas + matched
        if oracle is not None:
            oracle.check_grads(first, replays[0].results, factor, f"{case.name}, {name}")
        if bench.device == "cuda":  # without a graph a backward runs but once
            made[name] = (replays, moved, units)
    del oracle
    facts = {"case": "retinanet", "batch": case.batch, "layout": case.layout, "dtype": short(case.dtype)}
    facts |= {"logits": elements, "parity": where}
    paths = {COPY: copy_path(bench, elements, case.dtype, sets)}
    for name, (replays, moved, units) in made.items():
        paths[name] = Path([r.run for r in replays], moved, {} if units is None else {"units": units})
    rows = race_rows(bench, paths, 2 * size, facts)
    wall = round(wall_ms(fused(bench, first), bench.device), 4)
    return [row | {"eager_wall_ms": wall} if row["path"] == "fused" else row for row in rows]


def check_step(oracle: Oracle, heads: testing.DetectionInputs, results: list[Tensor], what: str) -> None:
    oracle.check_losses(results[:2], what)
    oracle.check_grads(heads, results[2:], 1.0, what)


# ---------------------------------------------------------------------------------------------- competitors


def peer_rows(bench: Bench, batch: int, dtype: torch.dtype, peer: Peer) -> list[Row]:
    """The row of a peer on flat logits, timed beside the copy and the fused loss; `x_fused` is the ratio of the times.
    One that is not installed, or finds another loss, has a row without a figure."""
    facts = {"case": "peer", "batch": batch, "layout": "flat", "dtype": short(dtype), "computes": peer.computes}
    if peer.absent():
        return [{**facts, "path": peer.name, "result": "not installed"}]
    flat, _ = draw(bench, RetinaNet(batch, "flat", dtype), 0)
    step = peer.make(flat)
    results = step()
    if peer.balanced:
        ours = fused(bench, flat)()
        # Eager 16-bit arithmetic is that coarse; a wrong loss is further off.
        tolerance, want = (1e-4 if dtype == torch.float32 else 5e-2), float(ours[0] + ours[1])
        if not abs(float(results[0]) - want) <= tolerance * want:
            reason = f"its loss is {float(results[0]):.6g} instead of {want:.6g}"
            return [{**facts, "path": peer.name, "result": "another loss", "reason": reason}]
    size, elements = flat.cls_logits.nbytes, flat.cls_logits.numel()
    facts |= {"logits": elements, "parity": "the loss" if peer.balanced else "another loss: not compared"}
    graph = peer.graph and bench.device == "cuda"
    call = capture(step, bench.device).run if graph else step
    ours_call = capture(fused(bench, flat), bench.device).run
    paths = {
        COPY: copy_path(bench, elements, dtype, 1),
        "fused": Path([ours_call], 0, {"units": 2}),
        peer.name: Path([call], 0, {"units": 2}, "graph" if graph else "events around eager calls"),
    }
    # What synchronises with the host or takes tens of milliseconds is repeated less.
    slower = bench if graph else replace(bench, rounds=min(bench.rounds, 3), replays=min(bench.replays, 3))
    rows = {row["path"]: row for row in race_rows(slower, paths, 2 * size, facts)}
    ratio = rows[peer.name]["median_ms"] / rows["fused"]["median_ms"]
    return [{**rows[peer.name], "x_fused": round(ratio, 3)}]


def peers_of(batch: int, dtype: torch.dtype) -> list[Peer]:
    return [peer for peer in PEERS if batch in peer.batches and dtype in peer.dtypes]
