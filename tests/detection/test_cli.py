"""The program: help, exit codes, one clear message without a traceback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ioubal_kernels.commands.app import _explain
from ioubal_kernels.detection.checkpoint import list_checkpoints
from ioubal_kernels.detection.errors import UsageError
from ioubal_kernels.detection.presets import PRESETS, load_config

TINY = [
    "--set", "data.image_size=[64, 64]", "--set", "train.batch_size=4", "--set", "train.eval_every=0",
    "--set", "loss.calibration_batches=1", "--workers", "0", "--device", "cpu", "--amp", "off",
]  # fmt: skip


@pytest.mark.parametrize(
    "arguments", [["--help"], *([c, "--help"] for c in ("train", "eval", "configs", "doctor", "demo", "data"))]
)
def test_help(ioubal, arguments):
    code, out, err = ioubal(*arguments)
    assert code == 0
    assert "Usage: ioubal" in out
    assert err == ""


def test_help_needs_no_torch():
    """torch alone takes most of the three seconds that help may take."""
    code = (
        "import sys; from ioubal_kernels.cli import main; code = main(['train', '--help']); "
        "sys.exit(code or 10 * ('torch' in sys.modules or 'torchvision' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_version(ioubal):
    from ioubal_kernels import __version__

    assert ioubal("--version") == (0, f"ioubal {__version__}\n", "")


@pytest.mark.parametrize("command", ["train", "eval", "configs", "data", "demo"])
def test_without_the_extra_one_line_says_what_to_install(ioubal, monkeypatch, command):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "typer" else real(name, *a))
    assert ioubal(command) == (2, "", "pip install 'ioubal_kernels[train]'\n")
    assert ioubal("--version")[0] == 0


def test_configs(ioubal, tmp_path):
    code, out, _ = ioubal("configs")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(PRESETS)
    code, out, _ = ioubal("configs", "demo")
    (tmp_path / "demo.yaml").write_text(out)
    assert load_config(str(tmp_path / "demo.yaml")) == load_config("demo")
    assert all("  # " in line for line in out.splitlines() if line.startswith("  "))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "data.path: no dataset given (--data DIR)"),
        (["train", "--data", "/nowhere"], "/nowhere"),
        (["train", "--data", "DATA", "--config", "retinanet_tyni"], "the nearest is 'retinanet_tiny'"),
        (["train", "--data", "DATA", "--config", "no/such.yaml"], "no/such.yaml is not a file"),
        (["train", "--data", "DATA", "--loss", "iou"], "loss: expected one of baseline, cls, loc, both, got 'iou'"),
        (["train", "--data", "DATA", "--set", "optim.lrr=3"], "the nearest is 'optim.lr'"),
        (["train", "--data", "DATA", "--set", "optim.lr"], "--set: expected section.key=value, got 'optim.lr'"),
        (["train", "--data", "DATA", "--set", "data.eval_split=tset"], "tset"),
        (["train", "--data", "DATA", "--device", "gpu"], "train.device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        (
            ["train", "--data", "DATA", "--set", "loss.backend=cuda", "--device", "cpu"],
            "loss.backend: cuda cannot be used",
        ),
        (["train", "--data", "DATA", "--set", "train.batch_size=1000"], "a smaller train.batch_size would do"),
        (["train", "--data", "DATA", "--resume"], "--resume: name the run's folder with -o"),
        (["train", "--data", "DATA", "--resume", "-o", "/nowhere/run"], "--resume: /nowhere/run is not a folder"),
        (["eval", "/nowhere", "--data", "DATA"], "/nowhere is neither a run's folder nor a checkpoint file"),
        (["eval", "/nowhere", "--data", "DATA", "--set", "loss.eta=0"], "--set: loss.eta has no effect on a trained"),
        (
            ["predict", "/nowhere", "x.png", "-o", "out", "--set", "model.name=ssd_tiny"],
            "--set: model.name has no effect",
        ),
        (["train", "--data", "DATA", "--config", "q"], "unknown configuration 'q'; `ioubal configs` lists them"),
        (["eval", __file__, "--data", "DATA"], "test_cli.py is no checkpoint: those are RUN/checkpoints/step-*.pt"),
        (["configs", "retinanet_tyni"], "unknown configuration 'retinanet_tyni'; the nearest is 'retinanet_tiny'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(ioubal, tiny_data, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = ioubal(*[tiny_data if a == "DATA" else a for a in arguments])
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["trian"], ["train", "--lr", "3"], ["eval"], ["train", "--seed", "x"], ["data"]])
def test_usage_errors(ioubal, arguments):
    code, out, err = ioubal(*arguments)
    assert code == 2
    assert "Usage" in out + err
    assert "Traceback" not in out + err


def test_an_unwritable_output_is_exit_code_3(ioubal, tiny_data, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = ioubal("train", "--data", tiny_data, "-o", tmp_path / "file" / "run", *TINY)
    assert code == 3
    assert err.startswith("error: cannot write to the run's folder")


def test_a_traceback_on_request(ioubal, monkeypatch):
    monkeypatch.setenv("IOUBAL_TRACEBACK", "1")
    from ioubal_kernels.detection.errors import UsageError

    with pytest.raises(UsageError):
        ioubal("configs", "tiny")


def test_eval_is_on_the_runs_own_split(ioubal, tiny_data, tmp_path):
    """Where its data have several, not the one that would be found first; on other data as ever."""
    data = shutil.copytree(tiny_data, tmp_path / "set")
    content = json.loads((data / "annotations" / "instances_val.json").read_text())
    kept = {image["id"] for image in content["images"][:2]}
    content["images"] = [{**i, "file_name": f"val/{i['file_name']}"} for i in content["images"] if i["id"] in kept]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    (data / "annotations" / "instances_few.json").write_text(json.dumps(content))
    run = tmp_path / "run"
    options = ("--set", "train.iterations=1", "--set", "data.eval_split=few", *TINY)
    assert ioubal("train", "--data", data, "-o", run, *options)[0] == 0
    images = [
        json.loads(ioubal("eval", run, "--data", where, "--json", "--workers", "0", *split)[1])["images"]
        for where, split in ((data, ()), (data, ("--split", "val")), (tiny_data, ()))
    ]
    assert images == [2, 6, 6]


def test_train_eval_resume(ioubal, tiny_data, tmp_path, monkeypatch):
    """From images to the same figures twice, in a folder chosen by the program."""
    monkeypatch.chdir(tmp_path)
    code, out, err = ioubal("train", "--data", tiny_data, "--loss", "loc", "--set", "train.iterations=3", *TINY)
    assert (code, err) == (0, "")
    assert "AP50" in out
    run = tmp_path / "runs" / "set-loc"
    metrics = json.loads((run / "metrics.json").read_text())
    code, out, err = ioubal(
        "eval", run, "--data", tiny_data, "--json", "--device", "cpu", "--amp", "off", "--workers", "0"
    )
    assert (code, err) == (0, "")
    assert json.loads(out) == metrics
    newest = list_checkpoints(run / "checkpoints")[0]
    assert ioubal("eval", newest, "--data", tiny_data, "--workers", "0")[0] == 0
    code, out, _ = ioubal("train", "--resume", "-o", run)  # data and settings come from the run
    assert code == 0
    assert "continuing from step-00000003.pt" in out
    code, _, err = ioubal("train", "--resume", "-o", run, "--set", "optim.lr=1")
    assert code == 2
    assert "optim.lr: 0.003 -> 1.0" in err


def test_data_synth_and_check(ioubal, tmp_path):
    code, out, _ = ioubal("data", "synth", "-o", tmp_path / "s", "--train", 3, "--val", 2, "--size", 48, "--workers", 1)
    assert code == 0
    code, out, _ = ioubal("data", "check", tmp_path / "s", "--json")
    assert code == 0
    assert json.loads(out)["ok"] is True
    picture = next((tmp_path / "s").rglob("*.png"), None) or next((tmp_path / "s").rglob("*.jpg"))
    picture.write_bytes(picture.read_bytes()[:100])
    code, out, _ = ioubal("data", "check", tmp_path / "s")
    assert code == 2
    assert picture.name in out
    code, _, err = ioubal("train", "--data", tmp_path / "s", "-o", tmp_path / "run", *TINY)
    assert code in (1, 2)
    assert picture.name in err


def start_training(data: str, run: Path, iterations: int) -> subprocess.Popen:
    """`python -m ioubal_kernels train`, returned when its first checkpoint is there."""
    command = [sys.executable, "-m", "ioubal_kernels", "train", "--data", data, "-o", str(run), *TINY]
    command += ["--set", f"train.iterations={iterations}", "--set", "train.checkpoint_every=2", "--workers", "1"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 90
    while not list_checkpoints(run / "checkpoints"):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(
    ("number", "code", "to_all"),
    [(signal.SIGINT, 130, True), (signal.SIGTERM, 143, True), (signal.SIGTERM, 143, False), (signal.SIGHUP, 129, True)],
)
def test_a_signal_saves_and_exits(tiny_data, tmp_path, number, code, to_all):
    """Also one to the whole job, loaders included, as terminals, `timeout` and schedulers send them."""
    process = start_training(tiny_data, tmp_path / "run", 100_000)
    if to_all:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.index("stopping after this step, the run will be saved") < err.index(
        f"stopped by signal {int(number)} at"
    )
    assert "Traceback" not in out + err
    step = int(err.split("at step ")[1].split(";")[0])
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[0].name == f"step-{step:08d}.pt"


def test_an_interrupted_import_is_not_repeated(monkeypatch):
    """Ctrl-C while torch is imported: a second import of half a module ends in a traceback or an abort."""
    monkeypatch.setitem(sys.modules, "ioubal_kernels.detection.data", None)  # importing it fails
    assert _explain(KeyboardInterrupt()) == (130, "interrupted")
    assert _explain(UsageError("--split")) == (2, "--split")


@pytest.mark.slow
def test_sigkill_then_resume(tiny_data, tmp_path):
    process = start_training(tiny_data, tmp_path / "run", 100_000)
    process.kill()
    process.communicate()
    again = subprocess.run(
        [sys.executable, "-m", "ioubal_kernels", "train", "--resume", "-o", str(tmp_path / "run")]
        + ["--allow-config-change", "--set", "train.iterations=40"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "continuing from step-" in again.stdout


@pytest.mark.skipif(os.name == "nt", reason="no SIGPIPE")
def test_a_closed_pipe_is_no_traceback():
    command = [
        sys.executable,
        "-c",
        "import sys; from ioubal_kernels.cli import main; sys.exit(main(['configs', 'demo']))",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert err == b""
    assert process.returncode in (0, 3)


def test_help_shows_the_defaults_that_are_no_constants(ioubal):
    """Square brackets would be taken for markup and vanish."""
    for command, text in (("train", "default: runs/DATA-LOSS"), ("reproduce", "default: by the machine")):
        code, shown, _ = ioubal(command, "--help")
        assert code == 0
        assert text in " ".join(line.strip("│ ") for line in shown.splitlines())


@pytest.mark.parametrize("command", (["doctor"], ["bench", "list"], ["configs"]), ids=" ".join)
def test_a_reader_that_has_read_enough(command):
    """`| head`: exit code 3 and not a word, neither from the program nor from the interpreter at its end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ioubal_kernels", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=120), said) == (3, b"")
