"""The README is true: its code is the code that was measured, and runs as it stands."""

from __future__ import annotations

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
        assert (ROOT / target).is_file(), target


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"^[A-Z]+_[A-Z]+$", README, flags=re.MULTILINE), "a figure is missing"
