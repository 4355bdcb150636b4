"""A run's folder: the lock, the write probe, the log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from ioubal_kernels.detection.errors import OutputError, UsageError
from ioubal_kernels.detection.rundir import RunLock, RunLog, prepare_run_folder, read_log

HOLDER = """
import sys, time
from pathlib import Path
from ioubal_kernels.detection.rundir import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_cannot_write_one_run_and_a_dead_ones_lock_is_taken_over(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(UsageError, match=rf"another process is writing this run \(pid {holder.pid} on"),
            RunLock(tmp_path),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == holder.pid  # a stale file, as after any kill
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_one_process_cannot_write_one_run_twice(tmp_path):
    with RunLock(tmp_path):
        with pytest.raises(UsageError, match="already writing this run"), RunLock(tmp_path):
            pass
    with RunLock(tmp_path):
        pass


def test_a_lock_file_that_is_not_json_is_taken_over(tmp_path):
    (tmp_path / ".lock").write_text("\x00garbage")
    with RunLock(tmp_path):
        pass


def test_an_unwritable_folder_shows_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write to the run's folder .*file/run"):
        prepare_run_folder(tmp_path / "file" / "run")
    with pytest.raises(OutputError, match="cannot write to the run's folder"):
        prepare_run_folder(tmp_path / "file")
    prepare_run_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_log_lines_are_json_without_nan(tmp_path):
    log = RunLog(tmp_path)
    log.write("step", step=1, cls=float("nan"), parts={"a": [float("inf"), 1.0]})
    record = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert record["cls"] is None
    assert record["parts"] == {"a": [None, 1.0]}


def test_a_failing_log_does_not_stop_the_run(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    log = RunLog(tmp_path)
    log.write("step", step=1)
    assert "cannot write" in log.failed
    log.write("step", step=2)


def test_a_resumed_run_is_read_without_repetition(tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.write("step", step=step, cls=1.0)
    log.write("resume", step=2)
    log.write("step", step=3, cls=2.0)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"event": "step", "st')
    assert [(r["event"], r["step"], r.get("cls")) for r in read_log(tmp_path)] == [
        ("step", 1, 1.0), ("step", 2, 1.0), ("resume", 2, None), ("step", 3, 2.0),
    ]  # fmt: skip


def test_the_first_signal_is_answered_at_once_and_the_second_ends(tmp_path):
    program = (
        "import os, signal, time\n"
        "from ioubal_kernels.detection.signals import StopSignal\n"
        "with StopSignal('first line', 'second line') as stop:\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    print(stop.number, flush=True)\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    print('not reached', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM and done.stdout.split() == [str(int(signal.SIGTERM))]
    assert done.stderr.split("\n") == ["", "first line", "", "second line", ""]
