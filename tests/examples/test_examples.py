"""Each example runs as a user starts it, and prints what it promises."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("compiled", "cuda_graphs", "ddp", "finetune_torchvision", "plain_loop")
NUMBER = r"[\d.]+(?:e[-+]\d+)?"


def run(arguments: list[object], cwd: Path, *, launcher: tuple[str, ...] = ()) -> str:
    """What it prints; outside the checkout, so that nothing but the installed package is found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_all_examples_are_tested_and_short() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(NAMES)
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert 40 <= len(text.splitlines()) <= 120, path.name
        assert f"examples/{path.name}" in ast.get_docstring(ast.parse(text)), path.name


def losses_of(line: str) -> tuple[float, float]:
    return tuple(float(x) for x in re.findall(rf"(?:classification|localization|bbox_regression) ({NUMBER})", line))


def test_plain_loop_learns(tmp_path: Path) -> None:
    first, last = run([EXAMPLES / "plain_loop.py", "--steps", 40, "--images", 2, "--size", 64], tmp_path).splitlines()
    assert first.startswith("step 0:") and last.startswith("step 39:")
    assert sum(losses_of(last)) < 0.7 * sum(losses_of(first))
    assert int(re.search(r"(\d+) positives", last)[1]) > 0
    assert 0.0 < float(re.search(rf"mean IoU ({NUMBER})", last)[1]) <= 1.0


@pytest.mark.parametrize("backend", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_compiled_equals_eager(backend: str, tmp_path: Path) -> None:
    if backend == "inductor" and " " in torch.__file__:
        pytest.skip("inductor cannot link to a torch in a path with a space")
    *batches, verdict = run([EXAMPLES / "compiled.py", "--backend", backend, "--size", 64], tmp_path).splitlines()
    assert len(batches) == 3
    for line in batches:
        eager, compiled = (float(x) for x in re.findall(rf"(?:eager|compiled) ({NUMBER})", line))
        assert eager > 0 and compiled == pytest.approx(eager, rel=2e-6)
    difference = re.fullmatch(rf"fullgraph with {backend}: gradients differ by ({NUMBER}) .*", verdict)
    assert float(difference[1]) < 1e-6


def test_cuda_graphs_without_a_gpu(tmp_path: Path) -> None:
    *batches, last = run([EXAMPLES / "cuda_graphs.py", "--size", 64, "--images", 1], tmp_path).splitlines()
    assert last == "no GPU usable here: nothing was captured, the step ran eagerly on the CPU"
    values = [re.fullmatch(rf"batch \d: eager loss ({NUMBER}), gradient norm ({NUMBER})", line) for line in batches]
    assert len(values) == 3
    assert len({found[1] for found in values}) == 3  # new data each time
    assert all(float(found[2]) > 0 for found in values)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_replay(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "cuda_graphs.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        replayed, eager, error = re.search(rf"replayed ({NUMBER}), eager ({NUMBER}), .*error ({NUMBER})", line).groups()
        assert float(replayed) == pytest.approx(float(eager), rel=1e-5) and float(error) < 1e-5


@pytest.mark.slow
def test_ddp_ranks_agree_and_equal_one_process(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    shown = run([EXAMPLES / "ddp.py", "--steps", 3, "--size", 64], tmp_path, launcher=launcher)
    assert "2 ranks after 3 steps: weights agree" in shown
    each, other, alone = re.search(r"each rank has them: \[(\d+), (\d+)\]; one process: (\d+)", shown).groups()
    assert int(each) == int(other) == int(alone) > 0
    assert float(re.search(rf"relative error ({NUMBER})", shown)[1]) < 1e-5


@pytest.mark.slow
def test_ddp_without_torchrun_says_how_to_start_it(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / "ddp.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and "torchrun --nproc-per-node 2 examples/ddp.py" in done.stderr


@pytest.mark.slow
def test_finetune_torchvision(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    arguments = [EXAMPLES / "finetune_torchvision.py", "--steps", 12, "--min-size", 96, "--images", 4]
    head, *steps = run(arguments, tmp_path).splitlines()
    w_loc = re.fullmatch(rf"resnet18, 4 classes, w_loc ({NUMBER})", head)
    assert float(w_loc[1]) > 1.0  # the IoU weights are below 1
    assert len(steps) == 12
    totals = [sum(losses_of(line)) for line in steps]
    assert sum(totals[-4:]) < sum(totals[:4])
    assert all(int(re.search(r"(\d+) positives", line)[1]) > 0 for line in steps)
