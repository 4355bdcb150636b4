"""Device time: steps captured as CUDA graphs, replayed many times between two events. On a CPU the host's clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import machine
from .timing import Clock, wall_seconds

Step = Callable[[], list[Tensor]]
HOLD_CYCLES = 2_000_000  # about a millisecond: the queue fills before the first replay starts
CLOCK_SECONDS = 0.15  # of work behind which the clock is read


@dataclass
class Replay:
    """A captured step: calling it runs the step again; its results lie in `results`. The step itself is kept, too:
    what it holds is memory that the graph reads."""

    run: Callable[[], Any]
    results: list[Tensor]
    step: Step


def capture(step: Step, prepare: Callable[[], Any] | None = None, warm: bool = True) -> Replay:
    """The step as a CUDA graph. prepare: runs before it on the same stream, outside of the graph. warm: the step may
    run three times before (as it must, unless it can run but once and its kernels are loaded already)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        if prepare is not None:
            prepare()
        for _ in range(3 if warm else 0):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = step()
    graph.replay()
    torch.cuda.synchronize()
    return Replay(graph.replay, results, step)


def device_clock(replays: int) -> Clock:
    """Seconds of one of `replays` queued calls, by events around all of them."""

    def seconds(call: Callable[[int], Any], number: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        hold = getattr(torch.cuda, "_sleep", None)  # private in torch; without it small steps may wait for the host
        if hold is not None:
            hold(HOLD_CYCLES)
        start.record()
        for i in range(replays):
            call(number * replays + i)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / replays

    return seconds


def clock_of(device: str, replays: int) -> Clock:
    """A clock for `timing.race`: on a GPU `device_clock`, on the CPU the host's mean of `replays` calls."""
    if device == "cuda":
        return device_clock(replays)
    if replays == 1:
        return wall_seconds

    def seconds(call: Callable[[int], Any], number: int) -> float:
        start = time.perf_counter()
        for i in range(replays):
            call(number * replays + i)
        return (time.perf_counter() - start) / replays

    return seconds


def clocks_under_load(call: Callable[[int], Any], milliseconds: float, device: str) -> dict[str, Any]:
    """Clocks and power by nvidia-smi while the GPU works on queued calls; {} where that cannot be asked."""
    if device == "cpu":
        return {}
    for i in range(min(int(CLOCK_SECONDS * 1e3 / max(milliseconds, 1e-3)) + 1, 1000)):
        call(i)
    found = machine.smi("sm_clock_mhz", "memory_clock_mhz", "power_w", "temperature_c")
    torch.cuda.synchronize()
    return found


def wall_ms(step: Step, times: int = 20) -> float:
    """Eager time of a step on a GPU, host included: what a training loop without graphs sees."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / times


def sets_beyond_cache(bytes_of_a_set: int, device: str) -> int:
    """How many sets of inputs to rotate among, so that none is still in the last cache when its turn comes again."""
    if device == "cpu":
        cache = machine.cache_bytes()
    else:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(8, -(-3 * cache // max(bytes_of_a_set, 1)) + 1))
