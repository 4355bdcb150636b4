"""Everything that a GPU has to show of the CUDA kernels, in under nine minutes: ``make gpu-check``.

Or ``python -m ioubal_kernels.bench.gpu.check --help``. Each section has its own result: "passed" only where all that
was planned ran and held; "not run" or "partly run" with the reason otherwise. Exit status 0 when nothing failed, 1 when
something did, 2 without a usable GPU. ``--device cpu`` is a dry run of the program itself on the CPU kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import time
from pathlib import Path
from typing import Any

from ioubal_kernels import backends

from .. import machine, timing
from . import behaviour as gpu_behaviour
from . import cases as gpu_cases
from . import device as gpu_device
from . import edges as gpu_edges
from . import large as gpu_large
from . import opcheck as gpu_opcheck
from . import training as gpu_training
from .sections import FAILED, NOT_RUN, PARTLY, PASSED, Plan, Section, Tally, run_all, run_section

PROGRAM = "gpu-check"
FEWEST_CASES = 400
# Triton compiles a kernel for every combination of options, a few seconds each: fewer cases, cut into parts that run
# side by side, and more time.
TRITON_PARTS = 4
TRITON_TIME = 2.0
DRY_SHARE = 40  # a dry run takes every 40th parity case


def device_facts(tally: Tally) -> None:
    """The device answers; its facts are the report's."""
    found = tally.check("facts", lambda: gpu_device.facts(tally.plan.device))
    tally.facts["facts"] = found


def parity(tally: Tally, part: int = 0, parts: int = 1) -> None:
    """Every case against the float64 oracle on the same device, loss and gradients element by element. parts: every
    two options together instead, and of those cases a part."""
    plan = tally.plan
    cases = gpu_cases.parity_cases()
    assert len(cases) >= FEWEST_CASES, f"only {len(cases)} cases"
    if parts > 1:
        cases = gpu_cases.pairwise(cases)[part::parts]
    cases = cases[:: plan.few(1, DRY_SHARE)]
    done: dict[str, int] = {}

    def one(case: gpu_cases.Case) -> None:
        gpu_cases.check(case, plan.backend, plan.device)
        done[case.op] = done.get(case.op, 0) + 1

    try:
        tally.each([(case.name, lambda c=case: one(c)) for case in cases])
    finally:
        tally.facts["passed_by_op"] = done


# The most telling ones first: what the time does not suffice for is at the end.
SECTIONS = [
    Section("device", device_facts, 60.0),
    Section("special functions", gpu_edges.special_functions, 90.0),
    Section("parity", parity, 240.0),
    Section("edge cases", gpu_edges.edge_cases, 90.0),
    Section("no host sync", gpu_behaviour.no_sync, 60.0),
    Section("graphs", gpu_behaviour.graphs, 90.0),
    Section("repeats", gpu_behaviour.repeats, 60.0),
    Section("streams", gpu_behaviour.streams, 60.0),
    Section("memory", gpu_behaviour.memory, 60.0),
    Section("autocast", gpu_behaviour.autocast, 60.0),
    Section("launches", gpu_behaviour.launches, 90.0),
    Section("large", gpu_large.large, 120.0),
    Section("torch.compile", gpu_behaviour.compiled, 120.0),
    Section("training", gpu_training.training, 120.0),
    Section("opcheck", gpu_opcheck.opcheck, 150.0),
]


def sections_of(backend: str) -> list[Section]:
    if backend != "triton":
        return SECTIONS
    found = []
    for section in SECTIONS:
        if section.run is parity:
            for part in range(TRITON_PARTS):
                run = functools.partial(parity, part=part, parts=TRITON_PARTS)
                found.append(Section(f"parity {part + 1}/{TRITON_PARTS}", run, TRITON_TIME * section.limit))
        else:
            found.append(dataclasses.replace(section, limit=TRITON_TIME * section.limit))
    return found


def verdict(entries: dict[str, dict[str, Any]]) -> str:
    """Of the whole: passed only if every section is."""
    results = {entry["result"] for entry in entries.values()}
    if FAILED in results:
        return FAILED
    return PASSED if results == {PASSED} else "incomplete"


def show(name: str, entry: dict[str, Any]) -> None:
    counts = f"{entry.get('checks', 0)}/{entry.get('planned', 0)}"
    print(f"  {name:18s} {entry['result']:10s} {counts:>11s} {entry['seconds']:7.1f} s  {entry.get('reason', '')}")
    for failure in entry.get("failures", [])[:5]:
        print(f"      {failure}")
    sys.stdout.flush()


def default_jobs(backend: str) -> int:
    """Most of a check is waiting for Python, compilers and oracles: a few sections share a GPU well."""
    cores = os.cpu_count() or 1
    return max(1, min(12, cores * 3 // 4) if backend == "triton" else min(4, cores // 4))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__.splitlines()[0])
    known = {backend: [s.name for s in sections_of(backend)] for backend in gpu_device.BACKENDS}
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for everything (default 480)")
    parser.add_argument("--sections", help=f"comma-separated; default: all of {', '.join(known['cuda'])}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run, small")
    parser.add_argument("--backend", choices=gpu_device.BACKENDS, default="cuda", help="default cuda")
    parser.add_argument("--jobs", type=int, help="sections side by side (default: by backend and cores)")
    parser.add_argument("--no-child", action="store_true", help="run the sections in this process, for debugging")
    parser.add_argument("--output", type=Path, help="default bench/results/gpu_check[-triton]-<device>.json")
    options = parser.parse_args(arguments)
    sections, names = sections_of(options.backend), known[options.backend]
    jobs = default_jobs(options.backend) if options.jobs is None else options.jobs
    wanted = options.sections.split(",") if options.sections else names
    if unknown := set(wanted) - set(names):
        parser.error(f"--sections: no section {sorted(unknown)}; there are {', '.join(names)}")
    if options.budget <= 0 or jobs < 1:
        parser.error(f"--budget and --jobs must be positive, got {options.budget}, {jobs}")
    dry = options.device == "cpu"
    if dry and (reason := backends.unavailable_reason("cpu")):
        print(f"{PROGRAM}: {reason}", file=sys.stderr)
        return 2
    if not dry and gpu_device.refuse_without_gpu(PROGRAM, options.backend):
        return 2
    began = time.monotonic()
    backend = "cpu" if dry else options.backend
    plan = Plan(options.device, backend, dry, began + options.budget)
    facts = gpu_device.facts(options.device)
    path = options.output
    if path is None and not dry:
        path = (
            timing.RESULTS / f"gpu_check-{'triton-' if backend == 'triton' else ''}{machine.slug(facts['device'])}.json"
        )
    entries = {name: {"result": NOT_RUN, "reason": "not reached", "seconds": 0.0} for name in names}
    for name in set(names) - set(wanted):
        entries[name]["reason"] = "not asked for"

    def save() -> None:
        report = {"report": "gpu_check", "backend": backend, "verdict": verdict(entries), **facts}
        report["budget_s"] = options.budget
        report |= {"seconds": round(time.monotonic() - began, 1), "sections": entries}
        if path is not None:
            gpu_device.write_report(path, report)

    def on_entry(name: str, entry: dict[str, Any]) -> None:
        entries[name] = entry
        show(name, entry)
        save()  # what is done survives whatever ends the program

    print(f"{PROGRAM}: {facts['device']}, torch {facts['torch']}, commit {facts['commit']}", flush=True)
    chosen = [section for section in sections if section.name in wanted]
    if options.no_child:
        for section in chosen:
            on_entry(section.name, run_section(section.run, plan)[0])
    else:
        run_all(chosen, plan, on_entry, jobs=jobs)
    save()
    results = [entry["result"] for entry in entries.values()]
    parts = ", ".join(f"{results.count(r)} {r}" for r in (PASSED, FAILED, PARTLY, NOT_RUN) if r in results)
    print(f"{PROGRAM}: {verdict(entries)}: {parts}; {time.monotonic() - began:.0f} s" + (f"; {path}" if path else ""))
    return 1 if verdict(entries) == FAILED else 0


if __name__ == "__main__":
    sys.exit(main())
