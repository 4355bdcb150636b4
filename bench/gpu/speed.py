"""Time of the losses on a GPU, beside a copy of the logits: ``make gpu-bench``.

Or ``python -m ioubal_kernels.bench.gpu.speed --help``. Device time is that of replayed CUDA graphs; the eager wall
time has a column of its own. A path is compared with the float64 oracle before it is timed: a wrong one gets no
figure. The most important cases come first; what the time does not suffice for is listed as not run. Exit status 0, 1
when a path was wrong or failed, 2 without a usable GPU. ``--device cpu`` is a dry run of the program itself on the
CPU kernels.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ioubal_kernels import backends, testing

from .. import timing
from . import device as gpu_device
from . import flat as gpu_flat
from . import paths as gpu_paths
from .cases import short
from .paths import Bench, RetinaNet, Row
from .sections import alive

PROGRAM = "gpu-bench"
WIDE, HALF = (torch.float32, torch.bfloat16), torch.float16
TABLE_LINES = 60


@dataclass(frozen=True)
class Job:
    kind: str  # jobs of a kind take about as long
    name: str
    run: Callable[[Bench], list[Row]]
    guess: float  # seconds, until one of its kind has run


def retinanet(batch: int, layout: str, dtype: torch.dtype) -> Job:
    case = RetinaNet(batch, layout, dtype)
    return Job(f"retinanet {batch}", case.name, partial(gpu_paths.retinanet_rows, case=case), 2.0 + batch)


def peers(batch: int, dtype: torch.dtype) -> Iterator[Job]:
    for peer in gpu_paths.peers_of(batch, dtype):
        run = partial(gpu_paths.peer_rows, batch=batch, dtype=dtype, peer=peer)
        compiles = "compile" in peer.name
        yield Job(f"peer {compiles}", f"{peer.name} batch {batch} {short(dtype)}", run, 40.0 if compiles else 15.0)


def flat(dtype: torch.dtype, columns: int | None = None) -> Iterator[Job]:
    """Cross entropy of so many columns, or the small losses."""
    if columns is not None:
        run = partial(gpu_flat.cross_entropy_rows, columns=columns, dtype=dtype)
        yield Job("cross entropy", f"softmax cross entropy {columns} {short(dtype)}", run, 10.0)
        return
    yield Job("small", f"smooth L1 {short(dtype)}", partial(gpu_flat.smooth_l1_rows, dtype=dtype), 5.0)
    yield Job("small", f"decode {short(dtype)}", partial(gpu_flat.decode_rows, dtype=dtype), 5.0)


def jobs() -> list[Job]:
    """Everything, the most important first."""
    listed = [retinanet(16, layout, dtype) for layout in testing.LAYOUTS for dtype in WIDE]
    for dtype in WIDE:
        listed += [job for job in peers(16, dtype) if "compile" not in job.name or "static" in job.name]
    listed += [retinanet(1, layout, dtype) for layout in testing.LAYOUTS for dtype in WIDE]
    for columns in gpu_flat.CROSS_ENTROPY:
        for dtype in WIDE:
            listed += flat(dtype, columns)
    listed += [retinanet(batch, layout, d) for batch in (4, 8, 2) for layout in testing.LAYOUTS for d in WIDE]
    for dtype in WIDE:
        listed += flat(dtype)
    listed += [retinanet(batch, layout, HALF) for batch in (16, 1, 4, 8, 2) for layout in testing.LAYOUTS]
    listed += peers(16, HALF)
    listed += flat(HALF, 81)
    listed += flat(HALF)
    return listed + list(peers(1, torch.float32))


def measure(job: Job, bench: Bench) -> tuple[list[Row], bool]:
    """A job's rows and whether it went well: out of memory is a row, and so is a wrong path, without a figure. What a
    peer cannot do is no fault of this library."""
    peer = job.kind.startswith("peer")
    try:
        rows = job.run(bench)
        if bench.device == "cuda":
            torch.cuda.synchronize()
        return [{"job": job.name, **row, "result": row.get("result", "measured")} for row in rows], True
    except torch.OutOfMemoryError:
        return [{"job": job.name, "result": "out of memory"}], True
    except AssertionError as error:
        return [{"job": job.name, "result": "wrong", "reason": str(error)[:400]}], peer
    except Exception as error:
        return [{"job": job.name, "result": "failed", "reason": f"{type(error).__name__}: {error}"[:400]}], peer


def fields(row: Row | None) -> str:
    """Milliseconds and share of the copy rate."""
    if row is None:
        return f"{'-':>9s} {'-':>6s}"
    share = f"{100 * row['share_of_copy_rate']:6.1f}" if "share_of_copy_rate" in row else f"{'-':>6s}"
    return f"{row['median_ms']:9.4f} {share}"


def table(rows: list[Row], left_out: list[str]) -> list[str]:
    """The short form: the fused loss by batch and layout, the rest by path; at most TABLE_LINES lines."""
    measured = [row for row in rows if row["result"] == "measured"]
    own = [row for row in measured if row["case"] == "retinanet"]
    headline = {(r["batch"], r["layout"], r["dtype"]): r for r in own if r["path"] == "fused"}
    dtypes = [short(dtype) for dtype in (*WIDE, HALF)]
    lines = [f"{'forward + backward':24s}" + "".join(f"{dtype + ' ms':>14s} % copy" for dtype in dtypes) + "   wall ms"]
    for batch in sorted({key[0] for key in headline}, reverse=True):
        for layout in testing.LAYOUTS:
            found = [headline.get((batch, layout, dtype)) for dtype in dtypes]
            if any(found):
                wall = " ".join(f"{row['eager_wall_ms']:.3f}" if row else "-" for row in found)
                name = f"batch {batch:2d}  {layout}"
                lines.append(f"{name:24s}" + "".join(f"{fields(row):>21s}" for row in found) + f"   {wall}")
    others = [row for row in own if row["batch"] == 16 and row["layout"] == "flat" and row["path"] != "fused"]
    others += [row for row in measured if row["case"] != "retinanet" and row["path"] != gpu_paths.COPY]
    for row in others:
        ratio = f"   {row['x_fused']:.2f} x fused" if "x_fused" in row else ""
        lines.append(f"{name_of(row):62.62s} {fields(row)}{ratio}")
    tail = [f"{row['result']}: {name_of(row)}" for row in rows if row["result"] != "measured"]
    if left_out:
        tail.append(f"not run, out of time: {len(left_out)} ({', '.join(left_out)[:300]})")
    tail = tail[-15:]
    room = TABLE_LINES - len(tail)
    if len(lines) > room:
        lines = [*lines[: room - 1], f"... and {len(lines) - room + 1} more rows in the file"]
    return lines + tail


def name_of(row: Row) -> str:
    if "case" not in row:
        return f"{row['job']}{': ' + row['reason'][:150] if 'reason' in row else ''}"
    what = f"batch {row['batch']} {row['layout']}" if "batch" in row else row["case"]
    reason = f": {row['reason'][:100]}" if "reason" in row else ""
    return f"{what}, {row['dtype']}: {row['path']}{reason}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for everything (default 480)")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds of every path (default 9)")
    parser.add_argument("--replays", type=int, default=20, help="queued replays of a round (default 20)")
    parser.add_argument("--only", default="", help="run the jobs whose name contains this")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run, small")
    parser.add_argument("--backend", choices=gpu_device.BACKENDS, default="cuda", help="default cuda")
    parser.add_argument("--output", type=Path, help="folder of the rows (default bench/results; a dry run keeps none)")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.replays < 1 or options.budget <= 0:
        parser.error("--rounds, --replays and --budget must be positive")
    dry = options.device == "cpu"
    if dry and (reason := backends.unavailable_reason("cpu")):
        print(f"{PROGRAM}: {reason}", file=sys.stderr)
        return 2
    if not dry and gpu_device.refuse_without_gpu(PROGRAM, options.backend):
        return 2
    wanted = [job for job in jobs() if options.only in job.name]
    if not wanted:
        parser.error(f"--only {options.only!r} names no job; there are: {', '.join(job.name for job in jobs())}")
    began = time.monotonic()
    bench = Bench(options.device, "cpu" if dry else options.backend, dry, options.rounds, options.replays)
    facts = gpu_device.facts(options.device)
    constant = {k: v for k, v in facts.items() if not k.endswith(("_clock_mhz", "_w", "_c", "_percent"))}
    constant["backend"] = bench.backend
    file = "dry-run" if dry else gpu_device.slug(facts["device"])
    folder = options.output or (None if dry else timing.RESULTS)
    print(f"{PROGRAM}: {facts['device']}, torch {facts['torch']}, commit {facts['commit']}", flush=True)
    rows: list[Row] = []
    left_out: list[str] = []
    took: dict[str, float] = {}
    good, usable = True, True
    for job in wanted:
        left = options.budget - (time.monotonic() - began)
        if not usable or left < 1.2 * took.get(job.kind, job.guess if not dry else 0.1):
            left_out.append(job.name)
            continue
        start = time.monotonic()
        found, well = measure(job, bench)
        if not dry:
            usable = alive()
            gc.collect()  # of captured graphs and what they hold
            torch.cuda.empty_cache()
        took[job.kind] = max(took.get(job.kind, 0.0), time.monotonic() - start)
        good = good and well and usable
        rows += found
        if folder is not None:  # at once: what is measured survives whatever ends the program
            timing.append_rows(file, [{**constant, **row} for row in found], folder)
        print(f"  {job.name}: {found[0]['result']}, {time.monotonic() - start:.1f} s", flush=True)
    if not usable:
        print(f"{PROGRAM}: the CUDA context was lost; the jobs after that did not run", file=sys.stderr)
    print("\n".join(table(rows, left_out)))
    where = f"; rows appended to {folder / file}.jsonl" if folder is not None else ""
    print(f"{PROGRAM}: {facts['device']}, {len(rows)} rows, {time.monotonic() - began:.0f} s{where}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
