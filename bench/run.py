"""`ioubal bench run`: measures the cases and appends their rows to bench/results/<device>.jsonl.

A path is compared with the float64 oracle before it is timed: a wrong one gets no figure. The most important cases come
first; what the time does not suffice for is listed as not run. On a GPU the time is that of replayed CUDA graphs, and
the eager wall time has a column of its own. Exit status: 0, 1 when one of our paths was wrong or failed, 2 for wrong
usage or a device that is not there, 130 when interrupted (what was measured is kept).
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ioubal_kernels import backends
from ioubal_kernels.ops.library import isa_levels

from . import machine, measure, timing
from .cases import all_cases
from .gpu import device as gpu_device
from .gpu.sections import alive
from .neighbour import Neighbour
from .table import summary
from .timing import Row
from .work import Bench, Case, available

PROGRAM = "ioubal bench run"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=PROGRAM, description=__doc__.split(": ", 1)[1].split("\n")[0])
    add = made.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one")
    add("--only", nargs="+", default=[], metavar="TEXT", help="cases whose name contains one of these")
    add("--budget", type=float, default=480.0, help="seconds for everything (default 480)")
    add("--rounds", type=int, default=15, help="interleaved rounds of every path (default 15)")
    add("--replays", type=int, default=20, help="queued replays of a round on a GPU (default 20)")
    add("--seconds", type=float, default=3.0, help="of a slow path: fewer rounds then (default 3)")
    add("--threads", type=int, nargs="+", default=[1], help="of torch on the CPU (default 1); several: each of them")
    add("--heap", choices=("warm", "default"), default="warm", help="on Linux; warm keeps freed memory")
    add("--undisturbed", action="store_true", help="on a CPU: repeat calls that had to share the core")
    add("--isa", choices=("best", "all"), default="best", help="all: the plainer instruction sets too")
    add("--backend", choices=("cpu", "cuda", "triton"), help="ours on this one alone")
    add("--own", action="store_true", help="without the peers, which take most of the time")
    add("--dry-run", action="store_true", help="tiny inputs, no rows without --output: does every path run?")
    add("--no-save", action="store_true", help="print only")
    add("--output", type=Path, help="folder of the rows (default: the package's bench/results)")
    return made


def chosen_device(options: argparse.Namespace) -> str | None:
    """The device to measure on; None, and a line on stderr, when it is not there."""
    wanted = options.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() and not options.dry_run else "cpu"
    if wanted == "cuda":
        return None if gpu_device.refuse_without_gpu(PROGRAM, options.backend or backends_of("cuda")[0]) else "cuda"
    reason = backends.unavailable_reason("cpu")
    if reason:
        print(f"{PROGRAM}: {reason}", file=sys.stderr)
        return None
    return "cpu"


def backends_of(device: str) -> tuple[str, ...]:
    return available(device) or (device,)


def measured_on(device: str, options: argparse.Namespace) -> Bench:
    isas = tuple(isa for isa in isa_levels()[:-1]) if options.isa == "all" and device == "cpu" else ()
    ours = (options.backend,) if options.backend else available(device)
    neighbour = Neighbour() if options.undisturbed else None
    return Bench(
        *(device, ours, options.dry_run, options.rounds, options.replays, options.seconds, isas, not options.own),
        neighbour=neighbour,
    )


class Store:
    """Rows of one run: kept here, and appended to their file at once, so that they survive what ends the program."""

    def __init__(self, facts: Row, folder: Path | None) -> None:
        self.facts = {"format": timing.FORMAT, **{k: v for k, v in facts.items() if k not in machine.MOMENTARY}}
        self.folder, self.rows = folder, []
        self.file = machine.slug(facts["device"])

    def add(self, rows: list[Row], **more: Any) -> None:
        rows = [{**self.facts, **more, **row} for row in rows]
        self.rows += rows
        if self.folder is not None:
            timing.append_rows(self.file, rows, self.folder)


def run_case(case: Case, bench: Bench, store: Store, threads: int) -> bool:
    """Measures one case; whether ours went well."""
    start = time.monotonic()
    rows = measure.measure(case, bench)
    store.add(rows, **({"threads": threads} if bench.device == "cpu" else {}))
    bad = [row for row in rows if row["result"] in (measure.WRONG, measure.FAILED)]
    mine = [row for row in bad if "backend" in row or "path" not in row]
    verdict = "measured" if not bad else "; ".join(f"{r.get('path', 'it')} {r['result']}: {r['reason']}" for r in bad)
    of = f", {threads} threads" if threads > 1 else ""
    print(f"  {case.name}{of}: {verdict[:300]} ({time.monotonic() - start:.1f} s)", flush=True)
    return not mine


def run_all(wanted: list[Case], bench: Bench, store: Store, options: argparse.Namespace) -> tuple[bool, list[str]]:
    """Case after case while the time lasts; whether all went well, and what was left out."""
    began, good, left_out = time.monotonic(), True, []
    took: dict[str, float] = {}
    for case in wanted:
        left = options.budget - (time.monotonic() - began)
        guess = 0.1 if bench.small else case.guess / (4 if bench.device == "cuda" else 1)
        if left < 1.2 * took.get(case.kind, guess) * len(options.threads):
            left_out.append(case.name)
            continue
        for threads in options.threads if bench.device == "cpu" else [0]:
            if threads:
                torch.set_num_threads(threads)
            start = time.monotonic()
            try:
                good &= run_case(case, bench, store, threads)
            except KeyboardInterrupt:
                store.add([{"name": case.name, "case": case.kind, "result": measure.INTERRUPTED}])
                raise
            took[case.kind] = max(took.get(case.kind, 0.0), time.monotonic() - start)
            gc.collect()  # of captured graphs and what they hold
        if bench.device == "cuda":
            if not alive():
                print(f"{PROGRAM}: the CUDA context was lost; the cases after that did not run", file=sys.stderr)
                return False, [*left_out, *(each.name for each in wanted[wanted.index(case) + 1 :])]
            torch.cuda.empty_cache()
    return good, left_out


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser()
    options = made.parse_args(arguments)
    if min(options.rounds, options.replays, *options.threads) < 1 or options.budget <= 0 or options.seconds <= 0:
        made.error("--rounds, --replays, --threads, --budget and --seconds must be positive")
    if not options.dry_run:
        machine.restart_with_heap(options.heap)
    device = chosen_device(options)
    if device is None:
        return 2
    if options.backend and options.backend not in available(device):
        made.error(f"--backend {options.backend} does not run on {device}; there are: {', '.join(available(device))}")
    if options.undisturbed and device != "cpu":
        made.error("--undisturbed is for a CPU; name it with --device cpu")
    every = all_cases(device)
    wanted = [case for case in every if not options.only or any(text in case.name for text in options.only)]
    if not wanted:
        made.error(f"--only {' '.join(options.only)} names no case; `ioubal bench list` shows them")
    bench = measured_on(device, options)
    facts = machine.gpu_facts() if device == "cuda" else machine.cpu_facts()
    stored = not (options.no_save or (options.dry_run and options.output is None))
    folder = (options.output or timing.RESULTS) if stored else None
    store = Store({**facts, "dry_run": True} if options.dry_run else facts, folder)
    heap = f", {facts['heap']} heap" if "heap" in facts else ""
    print(f"{PROGRAM}: {facts['device']}{heap}, torch {facts['torch']}, commit {facts['commit']}", flush=True)
    stopped = False
    threads = torch.get_num_threads()
    try:
        good, left_out = run_all(wanted, bench, store, options)
    except KeyboardInterrupt:
        good, left_out, stopped = False, [], True
    finally:
        torch.set_num_threads(threads)
    print("\n".join(summary(store.rows)))
    if left_out:
        print(f"not run, out of time (--budget {options.budget:g}): {', '.join(left_out)}")
    if folder is not None and store.rows:
        print(f"rows appended to {Path(folder).name}/{store.file}.jsonl")
    if stopped:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
