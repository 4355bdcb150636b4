"""`ioubal reproduce`: the trainings of one of the paper's tables, and everything that is made of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..detection.checkpoint import atomic_write_text
from ..detection.data import make_synthetic
from ..detection.errors import Interrupted, TrainerError, UsageError
from ..detection.predict import evaluate_checkpoint
from ..detection.progress import Reporter
from ..detection.resources import available_cores, resolve_device
from ..detection.rundir import RunLock, prepare_run_folder
from ..detection.signals import StopSignal
from ..detection.starting import number_of_steps
from .cost import measure
from .page import tables_of, write_page, write_tables
from .plans import Block, Job, Plan, SyntheticSet
from .results import RESULTS_FILE, save_results
from .runner import Outcome, check_runs, is_finished, run_jobs
from .study import Study, study_of_plan
from .tables import to_rich

COST_FILE = "cost.json"
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
    results_split: str | None = None,
    command: str | None = None,
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
        results_split: a split without annotations: each finished run writes its detections there as COCO results.
        command: how it was called, for the report.
        reporter: where messages go.

    Returns:
        The path of results.json.

    Raises:
        UsageError, DataError: the folder holds runs of another plan or on other data, no data, before anything is
            trained.
        TrainerError: trainings failed; the others are finished, and the results written.
        Interrupted: by a signal; what ran is saved.
    """
    reporter = reporter or Reporter()
    began = time.monotonic()
    if time_budget is not None and not time_budget > RESERVE:  # NaN as well
        raise UsageError(f"--time-budget: expected more than {RESERVE:.0f} seconds, got {time_budget:g}")
    deadline = None if time_budget is None else began + time_budget - RESERVE
    for block in plan.blocks:
        if block.data is None:
            raise UsageError(f"--data: {plan.table} with --preset {plan.preset} needs the folder of {block.title}")
    resources = choose_resources(plan, processes, threads)
    jobs = plan.jobs()
    for job in jobs:
        job.config.require_start()
    check_runs(folder, plan)
    prepare_run_folder(folder)
    with RunLock(folder), StopSignal() as stop:

        def proceed() -> bool:
            return stop.number is None and (deadline is None or time.monotonic() < deadline)

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
            proceed=proceed,
            reporter=reporter,
        )
        if results_split is not None:
            _write_results_of(results_split, jobs, folder, data, proceed, reporter)
        study = study_of_plan(plan, folder, command=command)
        if study.rows:
            complete = not (outcome.saved or outcome.waiting)
            _measure_costs(study, folder, complete=complete, proceed=proceed, reporter=reporter)
            _write_everything(study, folder, complete=complete, reporter=reporter)
        _report_outcome(outcome, began, stop.number, reporter)
    return folder / RESULTS_FILE


def _measure_costs(
    study: Study, folder: Path, *, complete: bool, proceed: Callable[[], bool], reporter: Reporter
) -> None:
    """Cost of every row, measured once, when nothing else runs: kept in cost.json."""
    path = folder / COST_FILE
    known: dict[str, Any] = {}
    if path.is_file():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            reporter.warn(f"{path} cannot be read: measuring again")
    for row in study.rows:
        key = f"{row.block}/{row.name}"
        arms = [arm.name for arm in row.arms]
        if complete and known.get(key, {}).get("arms") != arms and proceed():
            found = measure(row, folder, reporter, proceed=proceed)
            if found is not None:
                known[key] = {"arms": arms, "cost": found}
                atomic_write_text(path, json.dumps(known, indent=1) + "\n")
        row.cost = known.get(key, {}).get("cost")


def _write_everything(study: Study, folder: Path, *, complete: bool, reporter: Reporter) -> None:
    save_results(study, folder)
    write_tables(study, folder)
    for table in tables_of(study):
        reporter.show(to_rich(table))
    if complete:  # drawing takes seconds that a slice of time has better uses for
        page = write_page(study, folder / "report.html", plots=folder / "plots")
        reporter.info(f"report: {page}")
    reporter.info(f"results: {folder / RESULTS_FILE}, {folder / 'table.md'}")


def _write_results_of(
    split: str, jobs: list[Job], folder: Path, data: dict[str, str], proceed: Callable[[], bool], reporter: Reporter
) -> None:
    """Detections on a split without annotations (test-dev), as files for an evaluation server, beside each run."""
    for job in jobs:
        run = folder / job.folder
        file = run / f"results-{split}.json"
        if is_finished(run) and not file.exists() and proceed():
            evaluate_checkpoint(str(run), data[job.block], split, [], reporter, save_results=str(file))


def _report_outcome(outcome: Outcome, began: float, signal_number: int | None, reporter: Reporter) -> None:
    seconds = time.monotonic() - began
    counts = (
        f"{len(outcome.finished)} trainings finished, {len(outcome.saved)} saved on their way, "
        f"{len(outcome.waiting)} not begun, {len(outcome.failed)} failed; {seconds:.0f} s"
    )
    if signal_number is not None:
        raise Interrupted(f"stopped by signal {signal_number}: {counts}; the same command continues", signal_number)
    if outcome.failed:
        ends = "\n".join(f"{label}:\n{text}" for label, text in outcome.failed.items())
        raise TrainerError(f"{counts}; the same command tries these again. What the failed ones printed last:\n{ends}")
    more = "; the same command continues" if outcome.saved or outcome.waiting else ""
    reporter.info(f"{counts}{more}")


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
