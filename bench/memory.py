"""Memory and launches of one step: what the allocator hands out, and what a GPU is told to run."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from .timing import Row
from .work import Work

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would complain of a missing GPU
SPARE = 1 << 30  # bytes of the machine's memory that a case leaves to others


def cpu_allocations(step: Callable[[], Any]) -> tuple[int, int]:
    """(peak, end) of the bytes that torch's CPU allocator has handed out since the step began.

    What the step returns counts at its end: it is held until both are taken.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        held = step()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.device_type() == torch.autograd.DeviceType.CPU:
            total += event.nbytes()
            peak = max(peak, total)
    del held
    return peak, total


def gpu_allocations(step: Callable[[], Any]) -> tuple[int, int]:
    """The same on a GPU."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    held = step()
    torch.cuda.synchronize()
    peak, end = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    del held
    return peak, end


def footprint(work: Work, device: str) -> Row:
    """`peak_extra_bytes` above the inputs in a forward and backward, and `saved_bytes` that a forward keeps for its
    backward. A work without leaves has the peak alone."""
    allocations = gpu_allocations if device == "cuda" else cpu_allocations
    if work.refill is not None:
        work.refill()
    if not work.leaves:
        return {"peak_extra_bytes": allocations(work.inference)[0]}
    peak, _ = allocations(work.both)
    _, saved = allocations(work.hold)
    work.release()
    return {"peak_extra_bytes": peak, "saved_bytes": max(saved, 0)}


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def launches(work: Work, device: str) -> Row:
    """`kernel_launches` of a forward and backward on a GPU; on the CPU `torch_ops`, the operators it dispatches."""
    step = work.both if work.leaves else work.inference
    if work.refill is not None:
        work.refill()
    if device == "cpu":
        with _Count() as count:
            step()
        return {"torch_ops": count.calls}
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        step()
        torch.cuda.synchronize()
    events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return {"kernel_launches": len([e for e in events if not e.name.startswith("Memcpy")])}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on either device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


@contextlib.contextmanager
def within_memory(device: str) -> Iterator[None]:
    """On the CPU an allocation beyond the machine's free memory raises, where the system would kill the process."""
    status, free = _kilobytes("/proc/self/status", "VmData"), _kilobytes("/proc/meminfo", "MemAvailable")
    if device != "cpu" or status is None or free is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = status + max(free - SPARE, SPARE)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _kilobytes(path: str, field: str) -> int | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)
