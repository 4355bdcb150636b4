"""Trainings as processes: several at a time, stopped when the time is up, continued where they were."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from ..detection.checkpoint import atomic_write_text
from ..detection.config import config_diff
from ..detection.data import load_pair
from ..detection.errors import UsageError
from ..detection.presets import load_config
from ..detection.progress import Reporter, Task
from ..detection.rundir import CONFIG_FILE, LOG_FILE, METRICS_FILE, data_changes, data_on_record, holds_run, read_log
from ..detection.signals import STOP_SIGNALS
from ..detection.starting import with_norm_kept
from .plans import Block, Job, Plan, SyntheticSet

POLL = 0.25  # seconds
GRACE = 60.0  # seconds that a training has to save itself


@dataclass
class Outcome:
    """What a slice of time brought: labels of the trainings that finished, were saved for later, or failed (with the
    end of what they printed), and of those that did not begin.
    """

    finished: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)


def is_finished(run: Path) -> bool:
    """Whether a training came to its end: metrics.json is the last thing it writes."""
    return (run / METRICS_FILE).is_file()


def check_runs(folder: Path, plan: Plan) -> None:
    """Make sure that what is there was trained as the plan has it, and on its data.

    Raises:
        UsageError: it was not; the differences are listed.
        DataError: a data set cannot be read.
    """
    blocks = {block.name: block for block in plan.blocks}
    data: dict[str, tuple[str, dict[str, str | None]]] = {}
    for job in plan.jobs():
        run = folder / job.folder
        file = run / CONFIG_FILE
        if not file.is_file():
            continue
        theirs = load_config(str(file)).to_dict()
        changes = config_diff(theirs, with_norm_kept(theirs, job.config).to_dict())
        if changes:
            raise UsageError(
                f"{run} was trained differently; choose another folder with -o:\n  " + "\n  ".join(changes)
            )
        noted = data_on_record(read_log(run)) if (run / LOG_FILE).is_file() else {}
        if noted and job.block not in data:
            data[job.block] = _data_of(blocks[job.block], folder, job)
        place, planned = data.get(job.block, ("", {}))
        known = ({key: digest for key, digest in each.items() if digest is not None} for each in (noted, planned))
        changes = data_changes(*known, (theirs["data"]["path"], place))
        if changes:
            raise UsageError(
                f"{run} was trained on another data set; choose another folder with -o:\n  " + "\n  ".join(changes)
            )


def _data_of(block: Block, folder: Path, job: Job) -> tuple[str, dict[str, str | None]]:
    """Path and fingerprints of what the trainings of a block would see; no fingerprint of a set that is not made or
    named yet.
    """
    made = isinstance(block.data, SyntheticSet)
    place = folder / "data" / block.name if made else block.data
    if place is None or (made and not place.is_dir()):
        return "", {}
    data = job.config.data
    splits = data.train_split, data.eval_split
    pair = load_pair(place, *splits, data.format, check_files=False, allow_symlinks=data.allow_symlinks)
    return pair.training.root, pair.fingerprints()


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen
    task: Task | None
    stack: ExitStack
    steps: int


def run_jobs(
    folder: Path,
    jobs: Sequence[tuple[Job, int]],
    data: dict[str, str],
    *,
    processes: int,
    threads: int,
    workers: int,
    proceed: Callable[[], bool],
    reporter: Reporter,
) -> Outcome:
    """Train what is not finished yet.

    Args:
        folder: the reproduction's.
        jobs: with their numbers of steps.
        data: the data set's folder of each block.
        processes: trainings at a time. threads, workers: of each, for computing and for loading images.
        proceed: asked all the time; once False, what runs saves itself, to continue another time.
        reporter: shows them.
    """
    outcome = Outcome()
    waiting = [(job, steps) for job, steps in jobs if not is_finished(folder / job.folder)]
    outcome.finished = [job.label for job, _ in jobs if is_finished(folder / job.folder)]
    running: list[_Running] = []
    done_before = sum(steps for job, steps in jobs if is_finished(folder / job.folder))
    with reporter.task("all trainings, steps", sum(steps for _, steps in jobs), done_before) as overall:
        try:
            while waiting or running:
                if not proceed():
                    break
                while waiting and len(running) < processes:
                    job, steps = waiting.pop(0)
                    running.append(_start(folder, job, data[job.block], steps, threads, workers, reporter))
                time.sleep(POLL)
                for each in list(running):
                    if each.process.poll() is not None:
                        running.remove(each)
                        _note_end(folder, each, outcome)
                        done_before += each.steps
                done = [(each, _steps_done(folder / each.job.folder)) for each in running]
                for each, steps in done:
                    if each.task is not None:
                        each.task.advance_to(steps)
                overall.advance_to(
                    done_before + sum(steps for _, steps in done), f"{len(outcome.finished)} of {len(jobs)} finished"
                )
        finally:
            _stop(folder, running, outcome)
    outcome.waiting += [job.label for job, _ in waiting]
    return outcome


def output_file(folder: Path, job: Job) -> Path:
    """What a training prints: a text file beside its run's folder."""
    return (folder / job.folder).with_suffix(".txt")


def train_command(run: Path, config_file: Path, data: str, workers: int) -> list[str]:
    """Trains a job, or goes on with it."""
    command = [sys.executable, "-m", "ioubal_kernels", "train", "--data", data, "-c", str(config_file), "-o", str(run)]
    return [*command, "--workers", str(workers), *(["--resume"] if holds_run(run) else [])]


def _start(folder: Path, job: Job, data: str, steps: int, threads: int, workers: int, reporter: Reporter) -> _Running:
    run = folder / job.folder
    run.parent.mkdir(parents=True, exist_ok=True)
    # The file beside the folder is for whoever wants to repeat this training alone.
    config_file = run.with_suffix(".yaml")
    atomic_write_text(config_file, job.config.to_yaml())
    command = train_command(run, config_file, data, workers)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with open(output_file(folder, job), "a", encoding="utf-8") as output:
        # In a session of its own: Ctrl-C in the terminal goes to the runner, which ends its trainings itself.
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    stack = ExitStack()
    done = _steps_done(run)
    # A bar for each on a terminal; a log has one line for all.
    task = stack.enter_context(reporter.task(job.label, steps, done)) if reporter.console.is_terminal else None
    return _Running(job, process, task, stack, steps)


def _steps_done(run: Path) -> int:
    """The last step in a run's log, read from its end."""
    try:
        with open(run / LOG_FILE, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 8192))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line).get("step", 0))
        except (ValueError, AttributeError):
            continue
    return 0


def _note_end(folder: Path, each: _Running, outcome: Outcome) -> None:
    each.stack.close()
    label = each.job.label
    if is_finished(folder / each.job.folder):
        outcome.finished.append(label)
    elif each.process.returncode in (-signal.SIGTERM, *(128 + number for number in STOP_SIGNALS)):
        # Before it handles signals a process just ends, and has done nothing yet that could be lost.
        (outcome.saved if holds_run(folder / each.job.folder) else outcome.waiting).append(label)
    else:
        outcome.failed[label] = _tail(output_file(folder, each.job))


def _tail(path: Path, lines: int = 8) -> str:
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return "(it printed nothing)"


def _stop(folder: Path, running: list[_Running], outcome: Outcome) -> None:
    """Ask what still runs to save itself; what does not within the grace is killed (its last checkpoint stays)."""
    for each in running:
        if each.process.poll() is None:
            each.process.terminate()
    limit = time.monotonic() + GRACE
    for each in running:
        try:
            each.process.wait(max(0.1, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(each.process.pid, signal.SIGKILL)
            each.process.wait()
            outcome.saved.append(each.job.label)
            each.stack.close()
            continue
        _note_end(folder, each, outcome)
