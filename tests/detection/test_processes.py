"""Several processes: a run of two gloo ranks trains and evaluates as one process with the whole batch; a killed rank
ends the job without loss.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ioubal_kernels.detection.checkpoint import find_checkpoint
from ioubal_kernels.detection.errors import UsageError
from ioubal_kernels.detection.processes import Processes, launched_as
from ioubal_kernels.detection.rundir import read_log

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")

# GroupNorm: BatchNorm's statistics are those of a process's own images. SGD: Adam makes whole steps of rounding.
COMMON = {
    "data.image_size": "[64, 64]", "data.workers": 0, "model.norm": "group", "optim.name": "sgd", "optim.lr": 0.01,
    "optim.clip": 1.0, "train.amp": "off", "train.device": "cpu", "train.log_every": 1, "train.eval_every": 0,
    "train.checkpoint_every": 2, "train.iterations": 4, "loss.calibration_batches": 2, "train.timeout": 60,
    "inference.batch_size": 2, "inference.score_threshold": 0.005,
}  # fmt: skip


def arguments(data: str, run: Path, config: str, **changes: object) -> list[str]:
    settings = {**COMMON, **changes}
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return ["train", "--data", data, "-o", str(run), "-c", config, *sets]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": ""}


def torchrun(words: list[str], ranks: int = 2) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
        "--monitor-interval", "0.2", "-m", "ioubal_kernels", *words,
    ]  # fmt: skip


def run_together(*commands: list[str]) -> None:
    """Run programs at the same time; every one must succeed."""
    started = [
        subprocess.Popen(c, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for c in commands
    ]
    for process in started:
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0, out


def steps(run: Path) -> list[dict]:
    return [r for r in read_log(run) if r["event"] == "step"]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["retinanet_tiny", "foveabox_tiny", "ssd_tiny"])
def test_two_processes_equal_one(config, tiny_data, tmp_path):
    """Losses of every step, positives, mean IoU, w_loc, the weights and the evaluation. (Faster R-CNN samples its RoIs
    at random in each process, so its two processes are another draw.)
    """
    one, two = tmp_path / "one", tmp_path / "two"
    run_together(
        [
            sys.executable,
            "-m",
            "ioubal_kernels",
            *arguments(tiny_data, one, config, **{"train.batch_size": 8, "loss.calibration_batches": 2}),
        ],
        torchrun(arguments(tiny_data, two, config, **{"train.batch_size": 4})),
    )
    expected, got = steps(one), steps(two)
    assert len(expected) == len(got) == 4
    for a, b in zip(expected, got, strict=True):
        for name in ("cls", "loc", "grad_norm", "mean_iou"):
            assert b[name] == pytest.approx(a[name], rel=1e-6 if name != "grad_norm" else 1e-5), (name, a["step"])
        assert (a["positives"], a["lr"]) == (b["positives"], b["lr"])
    states = [find_checkpoint(run)[1] for run in (one, two)]
    assert states[0]["w_loc"] == pytest.approx(states[1]["w_loc"], rel=1e-6)
    assert states[0]["loader"] == states[1]["loader"]
    for name, value in states[0]["model"].items():
        torch.testing.assert_close(states[1]["model"][name], value, rtol=1e-4, atol=1e-6, msg=name)
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (one, two)]
    assert metrics[0]["images"] == metrics[1]["images"] == 6
    assert metrics[0]["AP"] == pytest.approx(metrics[1]["AP"], abs=1e-9)
    start = next(r for r in read_log(two) if r["event"] == "start")
    assert start["processes"] == 2
    assert not list(two.glob("nonfinite-*"))


@pytest.mark.slow
def test_evaluation_of_one_checkpoint_is_the_same(tiny_data, tmp_path):
    """Resumed at its end, a run only evaluates: with two processes exactly as with one, image by image."""
    run = tmp_path / "run"
    words = arguments(tiny_data, run, "faster_rcnn_tiny", **{"train.batch_size": 4, "train.iterations": 2})
    run_together([sys.executable, "-m", "ioubal_kernels", *words])
    alone = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").unlink()
    run_together(torchrun([*words, "--resume", "--allow-config-change"]))  # another number of processes
    assert json.loads((run / "metrics.json").read_text()) == alone


def living(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if state != "Z":
            found.append(pid)
    return found


def ranks_of(parent: int) -> list[int]:
    """Processes below torchrun, loaders included."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(stat[1]) == parent:
                found += [int(entry.name), *ranks_of(int(entry.name))]
    return found


def start_long_run(data: str, run: Path) -> subprocess.Popen:
    words = arguments(
        data, run, "retinanet_tiny", **{"train.batch_size": 4, "train.iterations": 100000, "train.timeout": 10}
    )
    process = subprocess.Popen(
        torchrun(words), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 90
    while not list((run / "checkpoints").glob("step-*.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)
    return process


def resume(data: str, run: Path) -> None:
    """Two more steps after the newest checkpoint."""
    done = find_checkpoint(run)[1]["step"]
    words = arguments(
        data, run, "retinanet_tiny", **{"train.batch_size": 4, "train.iterations": done + 2, "train.timeout": 10}
    )
    run_together(torchrun([*words, "--resume", "--allow-config-change"]))
    assert find_checkpoint(run)[1]["step"] == done + 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_killed_rank_ends_the_job_and_loses_nothing(tiny_data, tmp_path):
    """kill -9 of the second rank: non-zero within the timeout, no process is left, --resume continues."""
    run = tmp_path / "run"
    process = start_long_run(tiny_data, run)
    below = ranks_of(process.pid)
    assert len(below) >= 2
    began = time.monotonic()
    os.kill(below[-1], signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - began < 40, out
    deadline = time.monotonic() + 10
    while living(below) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert living(below) == []
    path, state = find_checkpoint(run)
    assert state["step"] >= 2
    resume(tiny_data, run)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_sigterm_saves_the_step_that_all_ranks_have_done(tiny_data, tmp_path):
    run = tmp_path / "run"
    process = start_long_run(tiny_data, run)
    below = ranks_of(process.pid)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    log = read_log(run)
    assert [r["event"] for r in log].count("interrupted") == 1, out
    assert find_checkpoint(run)[1]["step"] == log[-1]["step"]
    assert living(below) == []
    resume(tiny_data, run)


def test_one_process_costs_nothing_and_changes_nothing():
    processes = Processes()
    module = torch.nn.Linear(1, 1)
    assert processes.first and not processes.several and processes.group is None
    assert processes.parallel(module) is module
    assert processes.any(True) and not processes.any(False)
    assert processes.gather(3) == [3] and processes.from_first("x") == "x"
    values = torch.ones(2)
    assert processes.sum(values) is values
    processes.wait()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK and LOCAL_RANK must be numbers as torchrun sets them"),
        ({"WORLD_SIZE": "2", "RANK": "two", "LOCAL_RANK": "0"}, "must be numbers"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "expected 0 <= RANK < WORLD_SIZE"),
    ],
)
def test_a_broken_environment_is_named(monkeypatch, variables, message):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launched_as() == (0, 1, 0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        launched_as()


NAN_ON_ONE_RANK = """
import os, sys
from pathlib import Path
from ioubal_kernels.detection.config import parse_assignment
from ioubal_kernels.detection.presets import preset
from ioubal_kernels.detection.progress import Reporter
from ioubal_kernels.detection.stepping import Stepper
from ioubal_kernels.detection.train import train

real = Stepper.run
def run(self, step, batches, stop, **options):
    if step == 1 and os.environ["RANK"] == "1":
        batches[0].images[0, 0, 0, 0] = float("nan")
    return real(self, step, batches, stop, **options)
Stepper.run = run
config = preset("retinanet_tiny")
config.set("data.path", sys.argv[1])
for assignment in sys.argv[3:]:
    config.set(*parse_assignment(assignment))
train(config, Path(sys.argv[2]), reporter=Reporter(quiet=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip:1", "stop"])
def test_a_nan_on_one_rank_is_decided_by_all(policy, tiny_data, tmp_path):
    """Skipped by both or stopping both: neither waits for the other, and the batch is on record where it was met."""
    program, run = tmp_path / "program.py", tmp_path / "run"
    program.write_text(NAN_ON_ONE_RANK)
    settings = {**COMMON, "train.batch_size": 4, "train.nan_policy": policy}
    words = [tiny_data, str(run), *(f"{key}={value}" for key, value in settings.items())]
    command = [*torchrun([])[:-2], str(program), *words]
    began = time.monotonic()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert time.monotonic() - began < 60  # the processes' timeout: nobody waited for it
    records = {path.name: json.loads(path.read_text()) for path in run.glob("nonfinite-*.json")}
    assert sorted(records) == ["nonfinite-00000002-0.json", "nonfinite-00000002-1.json"]
    assert all(records["nonfinite-00000002-0.json"]["images_finite"])
    assert records["nonfinite-00000002-1.json"]["images_finite"] == [False, True, True, True]
    if policy == "stop":
        assert done.returncode != 0 and "not finite" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in steps(run)] == [1, 2, 3, 4]
    state = find_checkpoint(run)[1]
    assert (state["step"], state["skipped"]) == (4, 1)
    assert all(torch.isfinite(value).all() for value in state["model"].values())
