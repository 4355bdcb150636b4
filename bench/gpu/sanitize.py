"""compute-sanitizer's four tools over small cases of every op: ``make gpu-sanitize``.

Or ``python -m ioubal_kernels.bench.gpu.sanitize --help``. Each tool runs this module again with ``--run-cases``: the
cases forward and backward, without the oracle, and labels and matches that point out of bounds. A tool has "passed"
only if it said so itself, after all the cases ran. Exit status 0 when no tool found anything, 1 when one did, 2 without
a usable GPU.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ioubal_kernels import testing

from .. import machine, timing
from . import cases as gpu_cases
from . import device as gpu_device
from . import edges as gpu_edges
from .sections import FAILED, NOT_RUN, PARTLY, PASSED, Plan

PROGRAM = "gpu-sanitize"
CASES = 64
FOUND = 99  # exit status of compute-sanitizer where it found something
OURS = ("--kernel-name", "kns=ioubal")
# What torch's kernels write must be tracked as well, or all of it would count as never initialised.
TOOLS: dict[str, tuple[str, ...]] = {
    "memcheck": (*OURS, "--padding", "64", "--leak-check", "no"),
    "initcheck": (),
    "racecheck": (*OURS, "--racecheck-report", "all"),
    "synccheck": OURS,
}
SUMMARY = re.compile(r"=+ (?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
# What counts where a run was stopped before its summary. "Error: ..." is what the tool says of itself.
COMPLAINT = re.compile(r"^=+ (?:Invalid|Uninitialized|Host API uninit|Warning: Race|Barrier|Program hit)", re.M)


def run_cases(count: int, device: str) -> int:
    """In the instrumented process: every case once, its results copied to the host, where a tool sees them read."""
    plan = Plan(device, device, True, math.inf)
    bad = [(f"unchecked label {b}", partial(gpu_edges.bad_labels, plan, b)) for b in gpu_edges.BAD]
    for b, layout in product(gpu_edges.BAD, testing.LAYOUTS):
        bad.append((f"unchecked match {b}, {layout}", partial(gpu_edges.bad_matches, plan, b, layout)))
    bad = bad[: count // 2]
    small = gpu_cases.small_cases(count - len(bad))
    cases = [(case.name, partial(read, case, device)) for case in small]
    for i, (name, call) in enumerate(cases + bad):
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"case {i + 1}: {name}", flush=True)
    return 0


def read(case: gpu_cases.Case, device: str) -> None:
    for figure in case.evaluate(device, device, False):
        figure.value.cpu()


def find_sanitizer() -> str | None:
    """COMPUTE_SANITIZER, PATH, the CUDA toolkit, or the package nvidia-cuda-sanitizer-api."""
    named = os.environ.get("COMPUTE_SANITIZER")
    if named:
        return shutil.which(named)
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home, part) for home in homes if home for part in ("bin", "compute-sanitizer")]
    site = Path(torch.__file__).resolve().parent.parent / "nvidia"
    folders += [path.parent for path in site.glob("**/compute-sanitizer") if path.is_file()]
    for where in (None, *folders):
        found = shutil.which("compute-sanitizer", path=None if where is None else str(where))
        if found:
            return found
    return None


def judge(output: str, status: int | None, cases: int) -> dict[str, Any]:
    """A tool's entry from what it printed. status: its exit status, None where it was stopped."""
    done = len(re.findall(r"^case \d+: ", output, re.M))
    entry: dict[str, Any] = {"cases": done, "planned": cases}
    summary = SUMMARY.search(output)
    complaints = len(COMPLAINT.findall(output))
    lines = [line for line in output.splitlines() if line.strip()]
    if summary:
        entry["errors"] = int(summary[1] or summary[2])
    elif complaints:
        entry["errors"] = complaints
    if entry.get("errors") or status == FOUND:
        shown = [line for line in lines if line.startswith("=")]
        return {**entry, "result": FAILED, "reason": "it found errors", "report": shown[:60]}
    if status is None:
        verdict = PARTLY if done else NOT_RUN
        return {**entry, "result": verdict, "reason": "out of time"}
    if summary is None:
        return {
            **entry,
            "result": NOT_RUN,
            "reason": f"not supported here? no summary; it ended with: {lines[-3:]}"[:600],
        }
    if status != 0:
        reason = f"the cases ended with exit status {status}: {lines[-3:]}"[:600]
        return {**entry, "result": FAILED, "reason": reason}
    if done < cases or done == 0:
        return {**entry, "result": PARTLY if done else NOT_RUN, "reason": f"{done} of {cases} cases ran"}
    return {**entry, "result": PASSED}


def run_tool(command: list[str], cases: int, seconds: float) -> dict[str, Any]:
    """Runs an instrumented command of its own process group, at most so long."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else an access beyond stays inside a block
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=max(seconds, 1.0))
        status: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = None
    return {**judge(output or "", status, cases), "seconds": round(time.monotonic() - began, 1)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for everything (default 480)")
    parser.add_argument("--cases", type=int, default=CASES, help=f"cases of every tool (default {CASES})")
    parser.add_argument("--tools", default=",".join(TOOLS), help=f"comma-separated, of {', '.join(TOOLS)}")
    parser.add_argument("--output", type=Path, help="the report; default bench/results/gpu_sanitize-<device>.json")
    parser.add_argument("--run-cases", action="store_true", help="run the cases here, under no tool")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: with --run-cases only")
    options = parser.parse_args(arguments)
    wanted = options.tools.split(",")
    if unknown := set(wanted) - set(TOOLS):
        parser.error(f"--tools: no tool {sorted(unknown)}; there are {', '.join(TOOLS)}")
    if options.cases < 1 or options.budget <= 0:
        parser.error("--cases and --budget must be positive")
    if options.device == "cpu" and not options.run_cases:
        parser.error("--device cpu goes with --run-cases: compute-sanitizer knows GPUs only")
    if options.device == "cuda" and gpu_device.refuse_without_gpu(PROGRAM):
        return 2
    if options.run_cases:
        return run_cases(options.cases, options.device)
    began = time.monotonic()
    facts = gpu_device.facts("cuda")
    path = options.output or timing.RESULTS / f"gpu_sanitize-{machine.slug(facts['device'])}.json"
    sanitizer = find_sanitizer()
    absent = "compute-sanitizer not found" if sanitizer is None else "not reached"
    tools = {name: {"result": NOT_RUN, "reason": absent, "cases": 0, "planned": options.cases} for name in TOOLS}
    for name in set(TOOLS) - set(wanted):
        tools[name]["reason"] = "not asked for"

    def save() -> None:
        results = {entry["result"] for entry in tools.values()}
        verdict = FAILED if FAILED in results else PASSED if results == {PASSED} else "incomplete"
        report = {"report": "gpu_sanitize", "verdict": verdict, **facts, "budget_s": options.budget}
        gpu_device.write_report(path, {**report, "seconds": round(time.monotonic() - began, 1), "tools": tools})

    save()
    program = [sys.executable, "-m", "ioubal_kernels.bench.gpu.sanitize", "--run-cases", "--cases", str(options.cases)]
    for i, name in enumerate(wanted):
        if sanitizer is not None:
            left = options.budget - (time.monotonic() - began)
            common = ["--error-exitcode", str(FOUND), "--print-limit", "20"]
            command = [sanitizer, "--tool", name, *common, *TOOLS[name], *program]
            tools[name] = run_tool(command, options.cases, left / (len(wanted) - i))
            save()
        entry = tools[name]
        counts = f"{entry['cases']}/{entry['planned']} cases"
        print(f"  {name:10s} {entry['result']:10s} {counts:14s} {entry.get('reason', '')}", flush=True)
        for line in entry.get("report", [])[:10]:
            print(f"      {line}")
    failed = any(entry["result"] == FAILED for entry in tools.values())
    print(f"{PROGRAM}: {facts['device']}; {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
