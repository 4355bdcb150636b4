"""How the dense pass is best launched on this GPU: ``make gpu-tune``.

Or ``python -m ioubal_kernels.bench.gpu.tune --help``. The same loss under one launch plan after the other, checked
against the oracle, then timed side by side beside a copy of the logits. The rules of csrc/cuda/focal_fill.cu and, with
--backend triton, of triton_kernels/focal_pass.py are to be chosen from what it finds; nothing is chosen here. Exit
status 0, 1 when a plan was wrong or failed, 2 without a usable GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ioubal_kernels.ops import library, with_triton

from .. import machine, measure, timing
from ..cases import all_cases
from ..timing import Row, TimedPath
from ..work import BOTH, Bench, Case, Problem
from . import device as gpu_device

PROGRAM = "gpu-tune"
CASES = tuple(f"retinanet/b16/{layout}/{dtype}" for dtype in ("bfloat16", "float32") for layout in ("flat", "nchw"))
Plan = dict[str, int]


# What is tried: the rule first.
PLANS: dict[str, tuple[Plan, ...]] = {
    "cuda": ({}, *({"iterations": groups} for groups in (1, 2, 3, 4, 6, 8))),
    "triton": (
        {},
        *({"groups": groups} for groups in (2, 4, 8, 16)),
        {"vectors": 2},
        {"vectors": 2, "registers": 48},
        {"vectors": 3},
        {"registers": 80},
        {"warps": 2},
        {"warps": 4},
    ),
}


@contextmanager
def chosen(backend: str, plan: Plan) -> Iterator[None]:
    """The plan, for what is launched or captured inside."""
    choose = with_triton.choose_plan if backend == "triton" else library.choose_cuda_plan
    choose(**plan)
    try:
        yield
    finally:
        choose()


def label(plan: Plan) -> str:
    return ", ".join(f"{name} {value}" for name, value in plan.items()) or "by rule"


def try_plans(problem: Problem, bench: Bench, case: Case, backend: str) -> list[Row]:
    """A row each; a plan that is wrong or fails has one without figures."""
    ours = problem.contenders[0]
    rows: list[Row] = []
    timed: dict[Any, TimedPath] = {}
    for plan in PLANS[backend]:
        contender = replace(ours, path=label(plan), phases=(BOTH,), facts={**ours.facts, "plan": plan})
        head = {"name": case.name, **problem.facts, "path": contender.path, **contender.facts}
        try:
            with chosen(backend, plan):
                timed |= measure.prepared(contender, problem, bench, head)
                if bench.device == "cpu":  # not captured: nothing to time under another plan
                    rows.append({**head, "result": measure.MEASURED})
        except Exception as error:
            rows.append({**head, **measure.failure(error)})
    return rows if bench.device == "cpu" else measure.race(timed, problem, bench, case.name) + rows


def show(rows: list[Row]) -> None:
    for row in sorted(rows, key=lambda row: row.get("x_copy", 99.0)):
        figures = f"{row['x_copy']:.3f} copies, {row['median_ms'] * 1e3:.1f} us" if "x_copy" in row else row["result"]
        print(f"    {row['path']:40s} {figures} {row.get('reason', '')}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=gpu_device.BACKENDS, default="cuda", help="default cuda")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for everything (default 480)")
    parser.add_argument("--only", nargs="+", default=CASES, metavar="NAME", help="cases of `ioubal bench list`")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds of every plan (default 15)")
    parser.add_argument("--output", type=Path, help="default bench/results/gpu_tune[-triton]-<device>.json")
    parser.add_argument("--dry-run", action="store_true", help="tiny inputs on the CPU, where no plan changes anything")
    options = parser.parse_args(arguments)
    device = "cpu" if options.dry_run else "cuda"
    if device == "cuda" and gpu_device.refuse_without_gpu(PROGRAM, options.backend):
        return 2
    if options.backend == "cuda" and (reason := library.load_error("cuda")):
        print(f"{PROGRAM}: {reason}", file=sys.stderr)
        return 2
    cases = {case.name: case for case in all_cases(device)}
    if unknown := [name for name in options.only if name not in cases or not name.startswith("retinanet/")]:
        parser.error(f"--only: no case of the fused loss: {', '.join(unknown)}; `ioubal bench list` shows them")
    if options.rounds < 1 or options.budget <= 0:
        parser.error("--rounds and --budget must be positive")
    began = time.monotonic()
    facts = gpu_device.facts(device)
    stem = f"gpu_tune-{'triton-' if options.backend == 'triton' else ''}{machine.slug(facts['device'])}"
    path = options.output or timing.RESULTS / f"{stem}.json"
    bench = Bench(
        device, ("cpu" if options.dry_run else options.backend,), options.dry_run, options.rounds, peers=False
    )
    report = {"report": "gpu_tune", "backend": options.backend, **facts, "not_run": list(options.only), "rows": []}
    for name in options.only:
        if time.monotonic() - began > options.budget:
            break
        rows = try_plans(cases[name].build(bench), bench, cases[name], options.backend)
        print(f"  {name}")
        show(rows)
        report["rows"] += rows
        report["not_run"].remove(name)
        if options.output or not options.dry_run:
            gpu_device.write_report(path, report)
        if device == "cuda":
            torch.cuda.empty_cache()
    if report["not_run"]:
        print(f"not run, out of time (--budget {options.budget:g}): {', '.join(report['not_run'])}")
    bad = [row for row in report["rows"] if row["result"] in (measure.WRONG, measure.FAILED)]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
