"""Time and memory of the fused loss on the CPU: ``make bench-cpu``, or ``python -m ioubal_kernels.bench.cpu --help``.

The case is RetinaNet at 800 x 1333: 200,700 anchors, 80 classes, one image, forward and backward. The floor is a copy
of the logits: one read of them and one write of their gradient. Memory is the peak above the inputs, each path in a
process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ioubal_kernels as ik
from ioubal_kernels import backends, testing
from ioubal_kernels.ops.library import isa_levels, limit_isa

from . import eager, timing
from .inputs import ANCHORS, CLASSES, PER_LOCATION, retinanet_inputs

MEMORY_PATHS = ("fused", "fused in place", "eager", "eager, authors' style")


def fused_step(inputs: testing.DetectionInputs, **options: Any) -> Tensor:
    """Forward and backward; leaves the gradients in .grad."""
    for t in inputs.heads():
        t.grad = None
    out = ik.iou_balanced_detection_loss(*inputs.arguments(), **options)
    total = out.classification + out.localization
    total.backward()
    return total.detach()


def eager_step(inputs: testing.DetectionInputs) -> Tensor:
    for t in inputs.heads():
        t.grad = None
    cls, loc = eager.eager_loss(*inputs.arguments())
    (cls + loc).backward()
    return (cls + loc).detach()


def authors_step(inputs: testing.DetectionInputs) -> Tensor:
    """Classification only, in the authors' dense formulation; the IoU is given."""
    inputs.cls_logits.grad = None
    matched = inputs.matched_idxs.long()
    labels = torch.where(matched >= 0, inputs.gt_labels[0][matched.clamp(min=0)], matched)
    loss = eager.authors_style_loss(inputs.cls_logits, labels, torch.full(labels.shape, 0.7))
    loss.backward()
    return loss.detach()


def check_parity(isa: int) -> None:
    """Raises AssertionError unless the timed calls equal the float64 oracle, gradient by element."""
    limit_isa(isa)
    flat = testing.detection_inputs(
        seed=9, images=2, classes=CLASSES, per_location=PER_LOCATION, levels=((20, 21), (3, 3))
    )
    wide = flat.double().requiring_grad()
    want = fused_step(wide, backend="reference")
    for layout in testing.LAYOUTS:
        got = flat.in_layout(layout).requiring_grad()
        testing.assert_close_budget(fused_step(got, backend="cpu"), want, torch.float32, "loss", what=f"{layout} loss")
        logits = got.cls_logits.grad if layout == "flat" else [t.grad for t in got.cls_logits]
        logits = logits if layout == "flat" else testing.from_levels(logits, PER_LOCATION)
        testing.assert_close_budget(logits, wide.cls_logits.grad, torch.float32, what=f"{layout} gradient")
    plain = flat.requiring_grad()
    loss = eager_step(plain)
    torch.testing.assert_close(loss, want.float(), rtol=1e-4, atol=0)


def paths_for(dtype: torch.dtype, with_eager: bool) -> dict[str, timing.TimedPath]:
    """Every path by name. Two sets of inputs each, together past the cache."""
    sets = {layout: [retinanet_inputs(dtype, layout, seed) for seed in (0, 1)] for layout in testing.LAYOUTS}
    flat = sets["flat"]
    source = [s.cls_logits.detach() for s in flat]
    target = torch.empty_like(source[0])
    # In place the logits are consumed: each round starts from fresh ones, copied before the clock starts.
    scratch = [replace(s, cls_logits=s.cls_logits.detach().clone().requires_grad_()) for s in flat]

    def refill(r: int) -> None:
        scratch[r % 2].cls_logits.grad = None
        scratch[r % 2].cls_logits.data.copy_(source[r % 2])

    def no_grad(r: int) -> None:
        with torch.no_grad():
            ik.iou_balanced_detection_loss(*flat[r % 2].arguments())

    paths = {"copy of the logits": timing.TimedPath(lambda r: target.copy_(source[r % 2]), {"path": "copy"})}

    def add(isa: int, name: str, path: str, layout: str, call: Callable[[int], Any], prepare: Any = None) -> None:
        def run(r: int) -> None:
            limit_isa(isa)
            call(r)

        facts = {"path": path, "layout": layout, "isa": timing.ISA_NAMES[isa]}
        paths[f"fused, {name}, {timing.ISA_NAMES[isa]}"] = timing.TimedPath(run, facts, prepare)

    for isa in reversed(isa_levels()):
        if isa == 4 and dtype != torch.bfloat16 and 5 in isa_levels():
            continue  # the BF16 level differs from it in bfloat16 only
        for layout, pair in sets.items():
            add(isa, layout, "fused", layout, lambda r, pair=pair: fused_step(pair[r % 2]))
        add(isa, "flat, gamma 1.5", "fused gamma 1.5", "flat", lambda r: fused_step(flat[r % 2], gamma=1.5))
        add(isa, "flat, forward only", "fused forward", "flat", no_grad)
        in_place = lambda r: fused_step(scratch[r % 2], inplace=True)  # noqa: E731
        add(isa, "flat, in place", "fused in place", "flat", in_place, refill)
    if with_eager:
        paths["eager PyTorch (README)"] = timing.TimedPath(
            lambda r: eager_step(flat[r % 2]), {"path": "eager", "layout": "flat"}
        )
        paths["eager, authors' style, classification only"] = timing.TimedPath(
            lambda r: authors_step(flat[r % 2]), {"path": "eager authors", "layout": "flat"}
        )
    return paths


def peak_memory(path: str) -> None:
    """In a process of its own: prints the peak of the resident memory above the inputs, in units of the logits."""
    torch.set_num_threads(1)
    steps = {
        "fused": fused_step,
        "fused in place": lambda inputs: fused_step(inputs, inplace=True),
        "eager": eager_step,
        "eager, authors' style": authors_step,
    }
    steps[path](retinanet_inputs(torch.float32, "flat", 0, small=True))  # libraries and thread pools come first
    inputs = retinanet_inputs(torch.float32, "flat", 0)

    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    steps[path](inputs)
    print((resident("VmHWM") - before) / inputs.cls_logits.nbytes)


def memory_rows() -> list[dict[str, Any]]:
    rows = []
    for path in MEMORY_PATHS:
        call = [sys.executable, "-c", f"from ioubal_kernels.bench import cpu; cpu.peak_memory({path!r})"]
        # The default heap: with the warm one freed memory would stay resident and hide in the baseline.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        result = subprocess.run(call, capture_output=True, text=True, env=environment)
        if result.returncode:
            raise RuntimeError(f"bench cpu: measuring the memory of {path!r} failed: {result.stderr.strip()[-500:]}")
        rows.append({"case": "retinanet memory", "path": path, "extra_memory_x_logits": round(float(result.stdout), 3)})
    return rows


def timing_rows(dtype: torch.dtype, rounds: int, with_eager: bool) -> list[dict[str, Any]]:
    paths = paths_for(dtype, with_eager)
    times = timing.race(paths, rounds)
    limit_isa(5)
    base = timing.quantiles(times["copy of the logits"])
    logits = ANCHORS * CLASSES
    rows = []
    for name, path in paths.items():
        q = timing.quantiles(times[name])
        row = {
            "case": "retinanet",
            "name": name,
            **path.facts,
            "dtype": str(dtype).removeprefix("torch."),
            "rounds": rounds,
        }
        row |= {k: round(v, 4) for k, v in q.items()}
        row |= {
            "ns_per_logit": round(q["median_ms"] * 1e6 / logits, 4),
            "x_copy": round(q["median_ms"] / base["median_ms"], 3),
            "x_copy_fastest": round(q["min_ms"] / base["min_ms"], 3),
        }
        rows.append(row)
        print(
            f"  {name:48s} {q['median_ms']:9.2f} ms {row['ns_per_logit']:8.3f} ns/logit {row['x_copy']:8.2f} x copy"
            f"   fastest {q['min_ms']:8.2f} ms {row['x_copy_fastest']:6.2f} x",
            flush=True,
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ioubal_kernels.bench.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default 15)")
    parser.add_argument("--no-eager", action="store_true", help="leave the eager paths out: they take most of the time")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory measurement out")
    parser.add_argument("--save", action="store_true", help="append the rows to bench/results/cpu.jsonl")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if "cpu" not in ik.available_backends():
        print(f"bench cpu: {backends.unavailable_reason('cpu')}", file=sys.stderr)
        return 1
    facts = timing.machine()
    print(", ".join(f"{k} {v}" for k, v in facts.items()))
    for isa in isa_levels():
        check_parity(isa)
    print("parity with the float64 oracle: holds on every instruction set here")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        print(f"{dtype}, one image of 200,700 anchors x 80 classes, forward + backward:")
        rows += timing_rows(dtype, options.rounds, with_eager=dtype == torch.float32 and not options.no_eager)
    if not options.no_memory and sys.platform.startswith("linux"):
        memory = memory_rows()
        rows += memory
        print("peak memory above the inputs, in units of the logits:")
        for row in memory:
            print(f"  {row['path']:48s} {row['extra_memory_x_logits']:9.2f}")
    if options.save:
        print(f"rows appended to {timing.append_rows('cpu', [{**facts, **row} for row in rows])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
