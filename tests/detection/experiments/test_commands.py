"""`ioubal reproduce` and `ioubal report` as a user types them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ioubal_kernels.experiments import cost, expected, reproduce, runner
from ioubal_kernels.experiments.expected import duration

SET = [
    "--set", "data.image_size=[64, 64]", "--set", "train.iterations=6", "--set", "train.batch_size=4",
    "--set", "train.amp=off", "--set", "train.device=cpu", "--set", "loss.calibration_batches=1",
    "--set", "train.log_every=1", "--set", "train.eval_every=0",
]  # fmt: skip


def test_dry_run(ioubal, tiny_data, tmp_path):
    out = tmp_path / "new"
    code, shown, err = ioubal("reproduce", "table2", "--data", tiny_data, "--dry-run", "-o", out, *SET)
    assert (code, err) == (0, "")
    assert not out.exists()
    for text in ("baseline, Loc loss x 2", "eta 1.5, lambda 1.5, w_loc auto", "16 + 6 images", "15 trainings to go"):
        assert text in shown
    assert " on this machine" in shown


def test_dry_run_of_the_paper_needs_no_data(ioubal, tmp_path, monkeypatch):
    monkeypatch.setattr(expected, "WARM_UP", 0)
    monkeypatch.setattr(expected, "STEPS", 1)
    code, shown, err = ioubal(
        "reproduce", "table2", "--preset", "paper", "--arms", "both", "--dry-run", "-o", tmp_path / "new",
        "--set", "data.short_side=64", "--set", "data.long_side=64", "--set", "train.device=cpu",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "COCO 2017 (--data DIR): 118287 + 5000 images" in shown
    assert "days on this machine" in shown or " h on this machine" in shown


def test_what_is_finished_is_not_expected_again(ioubal, reproduction, tiny_data):
    code, shown, err = ioubal(
        "reproduce", "table2", "--data", tiny_data, "--seeds", "2", "--arms", "both,control", "--dry-run",
        "-o", reproduction.folder, *SET, "--set", "train.iterations=4", "--set", "train.eval_every=2",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "all 6 trainings are finished" in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["table9"], "expected one of table1, table2"),
        (["table2", "--preset", "paper"], "--data: table2 with --preset paper needs the folder of COCO 2017"),
        (["table2", "--preset", "paper", "--data", "TINY"], "retinanet_r50_fpn starts from ImageNet weights"),
        (["table2", "--time-budget", "nan"], "--time-budget: expected more than 20 seconds, got nan"),
        (["table2", "--time-budget", "5"], "--time-budget: expected more than 20 seconds, got 5"),
        (["table2", "--processes", "0"], "--processes: expected at least 1, got 0"),
        (["table2", "--arms", "all"], "--arms: expected of baseline, cls, loc, both, control, got 'all'"),
        (["table2", "--set", "loss.gama=1"], "nearest is 'loss.gamma'"),
        (["table2", "--data", "no-such-folder"], "no-such-folder"),
    ],
)
def test_mistakes(arguments, message, ioubal, tmp_path, tiny_data):
    given = [tiny_data if argument == "TINY" else argument for argument in arguments]
    code, _, err = ioubal("reproduce", *given, "-o", tmp_path / "out")
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def test_report_command(ioubal, reproduction, tmp_path):
    runs = [reproduction.folder / job.folder for job in reproduction.plan.jobs()[:2]]
    page = tmp_path / "page.html"
    code, shown, err = ioubal("report", *runs, "-o", page, "--title", "Mine & yours")
    assert (code, err) == (0, "")
    assert f"report: {page}" in shown and "IoU-balanced" in shown
    assert "<title>Mine &amp; yours</title>" in page.read_text(encoding="utf-8")
    code, _, err = ioubal("report", tmp_path)
    assert code == 2 and "expected the folder of a run" in err
    code, _, err = ioubal("report", tmp_path / "nowhere")
    assert code == 2 and "nowhere: expected the folder of a run" in err


def test_failed_trainings_are_named_and_the_others_counted(ioubal, reproduction, tiny_data, monkeypatch):
    """The results of what is finished are written all the same; the exit code says that something failed."""

    def some_failed(folder, jobs, data, **options):
        return runner.Outcome(finished=[job.label for job, _ in jobs], failed={"x seed 7": "out of memory"})

    monkeypatch.setattr(reproduce, "run_jobs", some_failed)
    monkeypatch.setattr(reproduce, "measure", lambda *arguments, **options: None)
    results = reproduction.folder / "results.json"
    results.unlink(missing_ok=True)
    code, shown, err = ioubal(
        "reproduce", "table2", "--data", tiny_data, "--seeds", "2", "--arms", "both,control", "-o", reproduction.folder,
        *SET, "--set", "train.iterations=4", "--set", "train.eval_every=2",
    )  # fmt: skip
    assert code == 1
    assert "1 failed" in err and "x seed 7:\nout of memory" in err
    assert results.is_file() and "IoU-balanced" in shown


def test_durations():
    assert [duration(s) for s in (95, 720, 27_000, 1_036_800)] == ["95 s", "12 min", "7.5 h", "12 days"]


@pytest.mark.slow
def test_from_nothing_to_the_page_in_slices(ioubal, tiny_data, tmp_path, monkeypatch):
    """Real trainings: the first slice of time is too short, the second one finishes, the third has nothing to do."""
    out = tmp_path / "out"
    monkeypatch.setattr(cost, "ROUNDS", 1)
    monkeypatch.setattr(reproduce, "RESERVE", 2.0)
    command = ["reproduce", "table2", "--data", tiny_data, "--seeds", "1", "--arms", "both", "-o", out, *SET]
    code, shown, err = ioubal(*command, "--time-budget", "3.5")
    assert (code, err) == (0, "")
    assert "0 trainings finished" in shown and "the same command continues" in shown
    code, shown, err = ioubal(*command)
    assert (code, err) == (0, "")
    assert "2 trainings finished, 0 saved on their way, 0 not begun, 0 failed" in shown
    (row,) = json.loads((out / "results.json").read_text())["rows"]
    assert set(row["cost"]["training"]) == {"baseline", "both"}
    assert set(row["cost"]["training"]["both"]) == {"eager", "fused"}
    assert (out / "report.html").is_file() and (out / "table.md").is_file()
    assert len(list((out / "plots").glob("*.svg"))) == 11
    times = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}
    assert ioubal(*command)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.slow
def test_a_signal_saves_every_training(tiny_data, tmp_path):
    """SIGTERM to `ioubal reproduce`: its trainings save themselves, it ends with 143, and the same command goes on."""
    command = [sys.executable, "-m", "ioubal_kernels", "reproduce", "table2", "--data", tiny_data, "--seeds", "1"]
    command += ["--arms", "both", "-o", str(tmp_path / "out"), *SET, "--set", "train.iterations=4000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    logs: list[Path] = []
    end = time.monotonic() + 120
    while time.monotonic() < end and len(logs) < 2:
        logs = [path for path in (tmp_path / "out").rglob("log.jsonl") if path.read_text().count('"step", "t') > 3]
        time.sleep(0.2)
    assert len(logs) == 2
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "2 saved on their way" in err and "the same command continues" in err
    for log in logs:
        assert json.loads(log.read_text().splitlines()[-1])["event"] == "interrupted"
        assert list((log.parent / "checkpoints").glob("step-*.pt"))
