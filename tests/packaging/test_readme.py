"""The README is true: its code is the code that was measured, and runs as it stands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_the_eager_code_is_the_measured_one() -> None:
    source = (ROOT / "bench" / "eager.py").read_text(encoding="utf-8")
    shown = source.split("# README: begin\n")[1].split("# README: end")[0].strip()
    assert shown in [block.strip() for block in python_blocks()]


@pytest.mark.parametrize(
    ("word", "printed"),
    [
        ("optimizer", r"6 positives, mean IoU 0\.\d\d, loss \d+\.\d{3}\n"),
        ("torchvision", r"\{'classification': \d+\.\d+, 'bbox_regression': \d+\.\d+\} w_loc [1-9]\d*\.\d\d\n"),
    ],
)
def test_the_complete_programs_run(word: str, printed: str) -> None:
    (program,) = [block for block in python_blocks() if block.startswith("import torch\n") and word in block]
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(printed, result.stdout), result.stdout


def test_every_file_it_names_is_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"^[A-Z]+_[A-Z]+$", README, flags=re.MULTILINE), "a figure is missing"


def test_table_2_is_the_stored_one() -> None:
    """The figures between the marks are those of bench/results/table2-cpu, and nothing else stands there."""
    (row,) = json.loads((ROOT / "bench/results/table2-cpu/results.json").read_text(encoding="utf-8"))["rows"]
    block = README.split("<!-- table 2 -->")[1].split("<!-- end of table 2 -->")[0].strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in block]
    names = cells[0][1:]
    shown = {line[0]: line[1:] for line in cells[2:]}
    base = row["arms"][0]

    def signed(value: float) -> str:
        return f"{round(value, 1) + 0.0:+.1f}"

    expected = {arm["label"]: [f"{arm['mean'][name]['mean']:.1f}" for name in names] for arm in row["arms"]}
    for arm in row["arms"][1:]:
        found = [arm["difference"][name] for name in names]
        expected[f"{arm['label']}, difference"] = [
            f"{signed(d['mean'])} [{signed(d['low'])}, {signed(d['high'])}]" for d in found
        ]
        if arm["paper"]:
            values = [signed(arm["paper"][name] - base["paper"][name]) for name in names]
            expected[f"*the paper: {arm['label']}, difference*"] = values
    assert shown == expected
