"""`ioubal reproduce`: the trainings of one of the paper's tables, and everything that is made of them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from ..detection.data import make_synthetic
from ..detection.errors import UsageError
from ..detection.progress import Reporter
from ..detection.resources import available_cores, resolve_device
from ..detection.rundir import RunLock, prepare_run_folder
from ..detection.signals import StopSignal
from ..detection.starting import number_of_steps
from .plans import Block, Job, Plan, SyntheticSet
from .runner import check_runs, is_finished, run_jobs

RESERVE = 20.0  # seconds of a time budget in which trainings save themselves and the results are written


@dataclass(frozen=True)
class Resources:
    """How many trainings at a time, and the threads and loader processes of each."""

    processes: int
    threads: int
    workers: int


def choose_resources(plan: Plan, processes: int | None, threads: int | None) -> Resources:
    """On a CPU one training for each core, which loads its own images; on a GPU six, which share the CPU's cores.

    Raises:
        UsageError: a number below 1.
    """
    for name, value in (("--processes", processes), ("--threads", threads)):
        if value is not None and value < 1:
            raise UsageError(f"{name}: expected at least 1, got {value}")
    cores = available_cores()
    device = resolve_device(plan.jobs()[0].config.train.device)
    if device.type == "cuda":
        count = processes or (1 if plan.preset == "paper" else 6)
        return Resources(count, threads or 1, max(1, min(8, cores // count - 1)))
    count = processes or (1 if plan.preset == "paper" else cores)
    return Resources(count, threads or max(1, cores // count), 0 if count >= cores else 1)


def steps_of(job: Job, block: Block) -> int:
    """A training's length."""
    return number_of_steps(job.config, block.images[0] // job.config.train.batch_size)


def reproduce(
    plan: Plan,
    folder: Path,
    *,
    processes: int | None = None,
    threads: int | None = None,
    time_budget: float | None = None,
    command: str = "",
    reporter: Reporter | None = None,
) -> Path:
    """Train what the plan has and `folder` lacks, then write results.json, table.md, plots/ and report.html there.

    Every training is a run of `ioubal train` in a process of its own; one that was stopped goes on from its last
    checkpoint when the same plan is called again. A larger plan (more seeds, arms, rows) adds to what is there.

    Args:
        plan: see `make_plan`.
        folder: of the reproduction; gets data/, runs/ and the results.
        processes, threads: trainings at a time, and threads of each; None: by the machine.
        time_budget: seconds for this call.
        command: how it was called, for the report.
        reporter: where messages go.

    Returns:
        The path of results.json.

    Raises:
        UsageError, DataError: the folder holds runs of another plan, no data, before anything is trained.
        TrainerError: trainings failed; the others are finished, and the results written.
        Interrupted: by a signal; what ran is saved.
    """
    reporter = reporter or Reporter()
    began = time.monotonic()
    deadline = None if time_budget is None else began + max(0.0, time_budget - RESERVE)
    for block in plan.blocks:
        if block.data is None:
            raise UsageError(f"--data: {plan.table} with --preset {plan.preset} needs the folder of {block.title}")
    resources = choose_resources(plan, processes, threads)
    jobs = plan.jobs()
    check_runs(folder, jobs)
    prepare_run_folder(folder)
    with RunLock(folder), StopSignal() as stop:
        data = {block.name: _make_data(block, folder, reporter) for block in plan.blocks}
        blocks = {block.name: block for block in plan.blocks}
        done = sum(is_finished(folder / job.folder) for job in jobs)
        reporter.info(
            f"{plan.spec.title}, preset {plan.preset}: {len(jobs)} trainings, {done} of them finished; "
            f"{resources.processes} at a time, threads of each: {resources.threads}"
        )
        outcome = run_jobs(
            folder,
            [(job, steps_of(job, blocks[job.block])) for job in jobs],
            data,
            processes=resources.processes,
            threads=resources.threads,
            workers=resources.workers,
            deadline=deadline,
            reporter=reporter,
            stopped=lambda: stop.number is not None,
        )
        print(outcome, time.monotonic() - began)


def _make_data(block: Block, folder: Path, reporter: Reporter) -> str:
    """The data set's folder; the synthetic set is made, once."""
    if not isinstance(block.data, SyntheticSet):
        return str(block.data)
    wanted = block.data
    place = folder / "data" / block.name
    with reporter.task("make images", wanted.train + wanted.val) as task:
        make_synthetic(
            place,
            train=wanted.train,
            val=wanted.val,
            size=wanted.size,
            classes=wanted.classes,
            progress=lambda done, _: task.advance_to(done),
        )
    return str(place)
