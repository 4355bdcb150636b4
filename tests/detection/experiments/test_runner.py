"""Trainings as processes: in turn, stopped and continued, failing. Stubs stand for the trainer."""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ioubal_kernels.detection.data import make_synthetic
from ioubal_kernels.detection.errors import UsageError
from ioubal_kernels.detection.progress import Reporter
from ioubal_kernels.experiments import runner
from ioubal_kernels.experiments.plans import make_plan
from ioubal_kernels.experiments.runner import check_runs, is_finished, run_jobs

STUB = """
import json, os, pathlib, signal, sys, time
run, behaviour = pathlib.Path(sys.argv[1]), sys.argv[2]
run.mkdir(parents=True, exist_ok=True)
(run / "config.yaml").touch()
with open(run.parent / "events.txt", "a") as events:
    print("threads", os.environ["OMP_NUM_THREADS"], *sys.argv[3:], file=events)
print("hello from", run.name, flush=True)
if behaviour == "fail":
    sys.exit("something broke")
if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if behaviour == "wait" and not (run / "saved").exists():
    def save(*_):
        (run / "saved").touch()
        os._exit(143)
    signal.signal(signal.SIGTERM, save)
for step in range(1, 200 if behaviour in ("wait", "stubborn") and not (run / "saved").exists() else 3):
    with open(run / "log.jsonl", "a") as log:
        print(json.dumps({"event": "step", "step": step}), file=log)
    time.sleep(0.05)
(run / "metrics.json").write_text("{}")
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """`jobs(behaviours)`: as many jobs, each with what its stub does."""
    monkeypatch.setattr(runner, "POLL", 0.02)
    monkeypatch.setattr(runner, "GRACE", 2.0)

    def make(*behaviours):
        made = make_plan("table2", seeds=3).jobs()[: len(behaviours)]
        does = {tmp_path / job.folder: what for job, what in zip(made, behaviours)}

        def command(run, config_file, data, workers):
            assert config_file.is_file() and data == "the-data"
            resumed = ["resumed"] if runner.holds_run(run) else []
            return [sys.executable, "-c", STUB, str(run), does[run], str(workers), *resumed]

        monkeypatch.setattr(runner, "train_command", command)
        return [(job, 2) for job in made]

    return make


def run(folder, jobs, *, processes=2, seconds=60.0):
    end = time.monotonic() + seconds
    return run_jobs(
        folder,
        jobs,
        {"synthetic": "the-data"},
        processes=processes,
        threads=3,
        workers=0,
        proceed=lambda: time.monotonic() < end,
        reporter=Reporter(quiet=True),
    )


def test_all_are_run_once(jobs, tmp_path):
    made = jobs("quick", "quick", "quick")
    outcome = run(tmp_path, made)
    assert sorted(outcome.finished) == sorted(job.label for job, _ in made)
    assert not (outcome.saved or outcome.failed or outcome.waiting)
    before = (tmp_path / made[0][0].folder / "log.jsonl").read_text()
    assert run(tmp_path, made).finished == [job.label for job, _ in made]
    assert (tmp_path / made[0][0].folder / "log.jsonl").read_text() == before
    assert (tmp_path / made[0][0].folder).with_suffix(".txt").read_text() == "hello from seed-0\n"
    events = (tmp_path / made[0][0].folder).parent / "events.txt"
    assert events.read_text() == "threads 3 0\n"


def test_a_failure_costs_nobody_else_and_is_tried_again(jobs, tmp_path):
    made = jobs("quick", "fail", "quick")
    outcome = run(tmp_path, made)
    label = made[1][0].label
    assert list(outcome.failed) == [label]
    assert outcome.failed[label].endswith("something broke")
    assert len(outcome.finished) == 2
    assert len(run(tmp_path, jobs("quick", "quick", "quick")).finished) == 3


def test_time_is_up(jobs, tmp_path):
    """What runs saves itself and continues where it was; what is finished stays; what has not begun waits."""
    made = jobs("quick", "wait", "wait", "quick")
    outcome = run(tmp_path, made, seconds=3.0)
    assert outcome.finished == [made[0][0].label]
    assert sorted(outcome.saved) == sorted(job.label for job, _ in made[1:3])
    assert outcome.waiting == [made[3][0].label]
    outcome = run(tmp_path, made)
    assert len(outcome.finished) == 4
    events = (tmp_path / made[1][0].folder).parent / "events.txt"
    assert events.read_text().splitlines() == ["threads 3 0", "threads 3 0 resumed"]


def test_one_that_does_not_stop_is_killed(jobs, tmp_path):
    made = jobs("stubborn")
    began = time.monotonic()
    outcome = run(tmp_path, made, seconds=1.0)
    assert time.monotonic() - began < 20
    assert outcome.saved == [made[0][0].label]
    assert not is_finished(tmp_path / made[0][0].folder)


def test_as_many_at_a_time_as_told(jobs, tmp_path, monkeypatch):
    most = []
    real = runner._steps_done

    def watched(folder):
        most.append(folder)
        return real(folder)

    monkeypatch.setattr(runner, "_steps_done", watched)
    begun = time.monotonic()
    assert len(run(tmp_path, jobs(*["quick"] * 4), processes=1).finished) == 4
    assert most and time.monotonic() - begun < 60


def test_runs_of_another_plan_are_refused(tmp_path):
    plan = make_plan("table2", seeds=1)
    job = plan.jobs()[0]
    run_folder = tmp_path / job.folder
    run_folder.mkdir(parents=True)
    (run_folder / "config.yaml").write_text(job.config.to_yaml())
    check_runs(tmp_path, plan)
    other = make_plan("table2", seeds=1, options={"train.iterations": 7})
    with pytest.raises(UsageError, match=r"was trained differently.*\n  train.iterations: 600 -> 7"):
        check_runs(tmp_path, other)
    # Where a data set is, or how often is logged, makes no other training.
    check_runs(tmp_path, make_plan("table2", seeds=1, options={"train.log_every": 3}))


def test_runs_on_other_data_are_refused(reproduction, tiny_data, tmp_path):
    """What the data set holds counts, not where it lies; and each split for itself."""

    def on(data):
        blocks = tuple(replace(block, data=Path(data)) for block in reproduction.plan.blocks)
        return replace(reproduction.plan, blocks=blocks)

    moved = shutil.copytree(tiny_data, tmp_path / "moved")
    check_runs(reproduction.folder, on(moved))
    other = make_synthetic(tmp_path / "other", train=16, val=6, size=64, classes=3, seed=2, workers=1)
    with pytest.raises(UsageError) as error:
        check_runs(reproduction.folder, on(other))
    run, training, evaluation = str(error.value).splitlines()
    assert run.endswith("was trained on another data set; choose another folder with -o:")
    assert training.startswith("  training data (classes, images, boxes): ") and evaluation.startswith("  evaluation ")
    assert all(f"{tiny_data} (" in line and f" -> {other} (" in line for line in (training, evaluation))
    # Edited between two slices of time.
    file = moved / "annotations/instances_val.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "annotations": []}))
    with pytest.raises(UsageError, match=r"another data set.*\n  evaluation data [^\n]*$"):
        check_runs(reproduction.folder, on(moved))


def test_steps_of_a_log_cut_short(tmp_path):
    assert runner._steps_done(tmp_path) == 0
    lines = [json.dumps({"event": "step", "step": step}) for step in (5, 10)]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"event": "st']))
    assert runner._steps_done(tmp_path) == 10
