"""Time and memory of the steps of `train_step`, stage beside stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ioubal_kernels.detection.data import Batch
from ioubal_kernels.detection.models import PreparedImages

from . import memory, timing
from .train_step_case import Case, HeadMaps, Spec, Targets, divided_step, leaves_of, whole_step
from .train_step_stages import STAGES, LossStage, check_parity

SEGMENTS = ("data", "to device", "forward", "matching", "loss", "loss backward", "backward", "optimiser")
LOSS_STAGE = ("matching", "loss", "loss backward")
MEASURED, WRONG, FAILED, MEMORY = "measured", "wrong", "failed", "out of memory"
MIB = 2**20


class Clock:
    """Seconds between marks on the host's clock; on a GPU, the device's work is waited for at every mark."""

    def __init__(self, device: torch.device) -> None:
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.seconds: dict[str, float] = {}
        self.wait()
        self.last = time.perf_counter()

    def mark(self, name: str) -> None:
        self.wait()
        now = time.perf_counter()
        self.seconds[name] = now - self.last
        self.last = now


@dataclass
class Result:
    """What is known of a stage: seconds of each round, or why there are none."""

    stage: LossStage
    state: str = MEASURED
    reason: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    rounds: list[tuple[float, dict[str, float]]] = field(default_factory=list)  # whole step; segments of a divided one

    def attempt(self, call: Any, *arguments: Any) -> None:
        """Runs a part of the measurement; what goes wrong is the stage's state from then on. Ctrl-C passes."""
        if self.state != MEASURED:
            return
        try:
            call(*arguments)
        except AssertionError as error:
            self.state, self.reason = WRONG, str(error)[:400]
        except Exception as error:
            self.state = MEMORY if memory.is_out_of_memory(error) else FAILED
            self.reason = f"{type(error).__name__}: {error}"[:400]
        if self.state == MEMORY and torch.cuda.is_available():
            torch.cuda.empty_cache()  # for the stages that need less

    def row(self) -> dict[str, Any]:
        """The stage's facts, and its figures when it is right and has any."""
        named = {
            "stage": self.stage.name,
            "path": self.stage.name,
            "phase": "training step",
            "computes": self.stage.computes,
            "matcher": self.stage.matcher,
        }
        if self.state != MEASURED:
            return {**named, "result": self.state, "reason": self.reason}
        return {**named, "result": MEASURED, **self.facts, **figures(self.rounds)}


def figures(rounds: list[tuple[float, dict[str, float]]]) -> dict[str, Any]:
    """Fastest, median and 80 % quantile in ms of the whole step, of every segment, and of the loss stage."""

    def rounded(samples: list[float]) -> dict[str, float]:
        return {key: round(value, 4) for key, value in timing.quantiles(samples).items()}

    whole = rounded([seconds for seconds, _ in rounds])
    parts = [segments for _, segments in rounds]
    return {
        "rounds": len(rounds),
        **whole,
        "segments": {name: rounded([p[name] for p in parts]) for name in SEGMENTS},
        "divided_step": rounded([sum(p.values()) for p in parts]),
        "loss_stage": rounded([sum(p[name] for name in LOSS_STAGE) for p in parts]),
    }


# ---------------------------------------------------------------------------------------------- memory


def loss_stage(case: Case, stage: LossStage, maps: HeadMaps, targets: Targets) -> HeadMaps:
    """Matching, loss and its backward on the maps; returns the leaves with their gradients."""
    leaves = leaves_of(maps)
    stage.run(case, leaves, targets, None).backward()
    return leaves


def kept_bytes(loss: Tensor) -> dict[int, int]:
    """Storages that Python's autograd Functions behind `loss` keep as plain attributes, address -> bytes: gradients
    prepared in the forward are not among the saved tensors."""
    found: dict[int, int] = {}
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        for value in getattr(node, "__dict__", {}).values():
            for each in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(each, Tensor):
                    found[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return found


@dataclass(eq=False)
class Kept:
    """A saved tensor, alive for as long as the graph holds it: weak references tell."""

    tensor: Tensor


def saved_for_backward(case: Case, stage: LossStage, maps: HeadMaps, targets: Targets) -> dict[str, float]:
    """MiB of the storages that the loss keeps for its backward: all of them, and those besides the head maps."""
    leaves = leaves_of(maps)
    packed: list[weakref.ref[Kept]] = []

    def pack(t: Tensor) -> Kept:
        kept = Kept(t.detach())  # a result's own node would hold what holds the result: never freed
        packed.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        loss = stage.run(case, leaves, targets, None)
    found = kept_bytes(loss)
    for kept in (reference() for reference in packed):
        if kept is not None:  # else saved by a part of the graph that was dropped, as by detach()
            storage = kept.tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    of_maps = {t.untyped_storage().data_ptr() for part in leaves for t in part}
    extra = sum(size for address, size in found.items() if address not in of_maps)
    return {
        "saved_mib": round(sum(found.values()) / MIB, 3),
        "saved_besides_maps_mib": round(extra / MIB, 3),
    }


def device_peak(case: Case, stage: LossStage, maps: HeadMaps, targets: Targets) -> float:
    """Bytes of the loss stage's peak above what was allocated before it, gradients of the maps included."""
    loss_stage(case, stage, maps, targets)  # workspaces and libraries come first
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss_stage(case, stage, maps, targets)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def host_peak(case: Case, stage: LossStage, maps: HeadMaps, targets: Targets) -> float:
    """The same of the resident memory, in a process that does nothing else (Linux). The kernel counts pages in batches
    of 32 and more for each CPU: a few hundred KiB are uncertain."""
    with torch.no_grad():
        small = case.forward(PreparedImages(torch.zeros(1, 3, 64, 64), [(64, 64)]))
    box = torch.tensor([[8.0, 8.0, 40.0, 40.0]])
    loss_stage(case, stage, small, ([box], [torch.zeros(1, dtype=torch.int64)]))

    def resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    loss_stage(case, stage, maps, targets)
    return resident("VmHWM") - before


def host_peak_child(text: str) -> None:
    """The child of `host_peak_of`: prints the bytes."""
    asked = json.loads(text)
    torch.set_num_threads(asked["threads"])
    case = Case(Spec(**asked["spec"]), asked["data"])
    stage = next(s for s in STAGES if s.name == asked["stage"])
    images, targets = case.moved(0)
    with torch.no_grad():
        maps = case.forward(images)
    print(host_peak(case, stage, maps, targets))


def host_peak_of(case: Case, stage: LossStage) -> float:
    """`host_peak` of a process of its own, on the same model and batch."""
    asked = {"spec": asdict(case.spec), "data": case.config.data.path, "stage": stage.name}
    asked["threads"] = torch.get_num_threads()
    call = "import sys; from ioubal_kernels.bench import train_step_measure as m; m.host_peak_child(sys.argv[1])"
    # Every large block is mapped by itself and unmapped when freed: what the network freed cannot hide in the baseline.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}
    command = [sys.executable, "-c", call, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {stage.name} failed: {done.stderr.strip()[-300:]}")
    return float(done.stdout)


def memory_facts(case: Case, stage: LossStage, maps: HeadMaps, targets: Targets, peak: bool) -> dict[str, Any]:
    """What the loss stage keeps and what it takes at its peak, in MiB and in units of the logits."""
    facts: dict[str, Any] = saved_for_backward(case, stage, maps, targets)
    if not peak:
        return {**facts, "peak_memory": "not asked for"}
    if case.device.type == "cuda":
        found, how = device_peak(case, stage, maps, targets), "allocated on the device"
    elif sys.platform.startswith("linux"):
        found, how = host_peak_of(case, stage), "resident memory of a process of its own, to half a MiB"
    else:
        return {**facts, "peak_memory": "not measured: it is read from Linux's /proc"}
    logits = sum(level.nbytes for level in maps.cls_logits)
    facts |= {"peak_memory": how, "peak_mib": round(found / MIB, 3), "peak_x_logits": round(found / logits, 3)}
    return facts


# ---------------------------------------------------------------------------------------------- the measurement


def prepare(case: Case, result: Result, peak: bool) -> None:
    """Parity first, memory then."""
    images, targets = case.moved(0)
    with torch.no_grad():
        maps = case.forward(images)
    result.facts["parity"] = check_parity(case, result.stage, maps, targets)
    result.facts |= memory_facts(case, result.stage, maps, targets, peak)


def one_round(case: Case, result: Result, number: int, batches: Iterator[Batch]) -> None:
    """A whole step and a divided one on the round's batch. Round 0 warms up, untold."""
    clock = Clock(case.device)
    whole_step(case, result.stage.run, number, batches)
    clock.mark("whole")
    divided = Clock(case.device)
    divided_step(case, result.stage.run, number, batches, divided.mark)
    if number:
        result.rounds.append((clock.seconds["whole"], divided.seconds))


def measure(case: Case, results: list[Result], rounds: int, peak: bool) -> None:
    """Fills the results, in interleaved rounds. Ctrl-C leaves what there is in them."""
    for result in results:
        result.attempt(prepare, case, result, peak)
    with closing(iter(case.loader)) as batches:
        for number in range(rounds + 1):
            for result in results:
                result.attempt(one_round, case, result, number, batches)
