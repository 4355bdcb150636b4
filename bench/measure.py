"""From a case to its rows: parity first, then memory, then one interleaved race beside the copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import memory, timing
from .clocks import capture, clock_of, clocks_under_load, wall_ms
from .timing import Row, TimedPath
from .work import BACKWARD, BOTH, COPY, FORWARD, INFERENCE, OTHER, UNITS, Bench, Case, Contender, Problem, Work

MEASURED, WRONG, FAILED, NOT_INSTALLED = "measured", "wrong", "failed", "not installed"
OUT_OF_MEMORY, INTERRUPTED = "out of memory", "interrupted"
SLOW_MS = 20.0  # on a GPU: what takes longer is repeated less
REASON_LENGTH = 400


def failure(error: BaseException) -> Row:
    """A row's `result` and `reason` of what an exception kept from being measured."""
    if memory.is_out_of_memory(error):
        return {"result": OUT_OF_MEMORY}
    wrong = isinstance(error, AssertionError)
    text = str(error) if wrong else f"{type(error).__name__}: {error}"
    return {"result": WRONG if wrong else FAILED, "reason": " ".join(text.split())[:REASON_LENGTH]}


def measure(case: Case, bench: Bench) -> list[Row]:
    """The case's rows, one a path and phase; a path that is wrong, fails or finds no memory has one without figures.

    What goes wrong before there is any path gives a single row.
    """
    with memory.within_memory(bench.device):
        try:
            torch._dynamo.reset()
            problem = case.build(bench)
        except Exception as error:
            return [{"name": case.name, "case": case.kind, **failure(error)}]
        rows, timed = [], {}
        for contender in problem.contenders:
            head = {"name": case.name, **problem.facts, "path": contender.path, "computes": contender.computes}
            head |= contender.facts
            if contender.missing():
                rows.append({**head, "result": NOT_INSTALLED, "reason": f"no package {contender.package}"})
                continue
            try:
                timed |= prepared(contender, problem, bench, head)
            except Exception as error:
                rows.append({**head, **failure(error)})
        try:
            return race(timed, problem, bench, case.name) + rows
        except Exception as error:
            return [*rows, {"name": case.name, **problem.facts, **failure(error)}]


def prepared(contender: Contender, problem: Problem, bench: Bench, head: Row) -> dict[tuple[str, str], TimedPath]:
    """The contender's phases, ready to be timed. Raises what its parity check raises."""
    tested = contender.make(-1)
    if tested.refill is not None:
        tested.refill()
    step = tested.both if tested.leaves else tested.inference
    contender.check(tested, step())
    works = [contender.make(number) for number in range(problem.sets)]
    facts = {**head, "parity": contender.parity, **memory.footprint(works[0], bench.device)}
    facts |= memory.launches(works[0], bench.device)
    graph = contender.graph and bench.device == "cuda"
    timed = {}
    for phase in contender.phases:
        if bench.device == "cuda" and not graph and phase in (BACKWARD, OTHER):
            continue  # one forward a backward: between two events there would be both
        path = graph_path(works, phase, bench) if graph else host_path(works, phase, bench.device)
        path.facts = {**facts, "phase": phase}
        if bench.device == "cuda":
            path.facts["timing"] = "graph" if graph else "events around eager calls"
            if phase in (BOTH, INFERENCE):
                path.facts["eager_wall_ms"] = round(wall_ms(works[0].phase(phase, "cuda").step), 4)
        timed[f"{contender.path} {contender.facts.get('backend', '')}", phase] = path
    return timed


def host_path(works: list[Work], phase: str, device: str) -> TimedPath:
    """Eager calls, rotating among the sets."""
    phases = [work.phase(phase, device) for work in works]
    at = lambda number: phases[number % len(phases)]  # noqa: E731
    prepare: Callable[[int], Any] | None = None
    if phases[0].prepare is not None:
        prepare = lambda number: at(number).prepare()  # noqa: E731
    return TimedPath(lambda number: at(number).step(), {}, prepare)


def graph_path(works: list[Work], phase: str, bench: Bench) -> TimedPath:
    """Replays of captured graphs. A captured forward keeps tensors of its own: few sets where they are large."""
    few = works[:1] if phase in (BACKWARD, OTHER, FORWARD) and len(works) < 3 else works
    replays = []
    for work in few:
        made = work.phase(phase, bench.device)
        replays.append(capture(made.step, made.prepare, made.warm))
    return TimedPath(lambda number: replays[number % len(replays)].run(), {})


def copy_path(problem: Problem, bench: Bench, name: str) -> TimedPath:
    """Contiguous copies of as many elements, as torch makes them: the rate that everything is held against."""
    pairs = [
        [torch.zeros(problem.elements, dtype=problem.dtype, device=bench.device) for _ in range(2)]
        for _ in range(problem.sets)
    ]
    facts = {"name": name, **problem.facts, "path": COPY, "computes": "nothing: the floor", "phase": BOTH}
    return TimedPath(lambda number: pairs[number % len(pairs)][1].copy_(pairs[number % len(pairs)][0]), facts)


def race(timed: dict[Any, TimedPath], problem: Problem, bench: Bench, name: str) -> list[Row]:
    """Times all paths, the copy among them, in interleaved rounds: a row each.

    `x_copy` is a path's time over the copy's; `share_of_copy_rate` its rate over the copy's, by the reads and writes of
    the logits that its phase needs at least; `bytes` what any implementation of the phase must move at least.
    """
    paths = {COPY: copy_path(problem, bench, name), **timed}
    replays = bench.replays if bench.device == "cuda" else problem.calls
    times = timing.race(paths, bench.rounds, clock_of(bench.device, replays), bench.seconds, bench.neighbour)
    copy = timing.quantiles(times[COPY])
    clocks = clocks_under_load(paths[COPY].call, copy["median_ms"], bench.device)
    copied = 2 * problem.elements * torch.finfo(problem.dtype).bits // 8
    rows = []
    for key, path in paths.items():
        figures = timing.quantiles(times[key])
        phase, median = path.facts["phase"], figures["median_ms"]
        row = {**path.facts, "rounds": len(times[key]), "calls": replays, "sets": problem.sets}
        row |= {field: round(value, 6) for field, value in figures.items()}
        row |= {
            "x_copy": round(median / copy["median_ms"], 4),
            "x_copy_fastest": round(figures["min_ms"] / copy["min_ms"], 4),
            f"ns_per_{problem.entries}": round(median * 1e6 / problem.elements, 5),
        }
        moved = copied if path is paths[COPY] else problem.bytes.get(phase)
        if moved:
            row |= {"bytes": moved, "gb_per_s": round(moved / median / 1e6, 2)}
        if phase in UNITS:
            row["share_of_copy_rate"] = round(UNITS[phase] / 2 * copy["median_ms"] / median, 4)
        if bench.neighbour is not None:
            row["disturbed_rounds"] = path.disturbed
        if "peak_extra_bytes" in row:
            row["extra_memory_x_logits"] = round(row["peak_extra_bytes"] * 2 / copied, 4)
        if bench.device == "cpu":
            row["eager_wall_ms"] = row["median_ms"]
        rows.append({**row, **clocks, "result": MEASURED})
    return rows
