"""Habits that concern every tracked file: length, and that nothing points at one machine."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 500
SOURCES = {".py", ".cpp", ".h", ".inc", ".cu", ".cuh"}
FOLDERS = ("ioubal_kernels", "csrc", "bench", "tests", "tools")


def tracked() -> list[Path]:
    """Files under version control; in an unpacked source distribution, every file of the source folders."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    return [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]


def text_of(path: Path) -> str | None:
    """None for a binary file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def test_source_files_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in tracked() if path.suffix in SOURCES}
    assert len(lengths) > 10
    long = [f"{path.relative_to(ROOT)}: {length} lines" for path, length in lengths.items() if length > LONGEST]
    assert not long, f"over {LONGEST} lines, split by idea: {long}"


# Absolute paths of somebody's machine, addresses of package indexes. Written in pieces: this file is tracked as well.
MACHINE_PATH = r"""(?:^|[\s"'`(=:])/(?:home|root|Users|work|mnt|media|srv)/\w"""
REGISTRY = "|".join(
    ["index" + "-url", r"registry\s*=\s*\W?http", "https?://[^ ]*/simple" + "/", r"--trusted" + "-host"]
)


def test_no_file_points_at_one_machine() -> None:
    pattern = re.compile(f"{MACHINE_PATH}|{REGISTRY}", re.MULTILINE)
    found = []
    for path in tracked():
        text = text_of(path)
        for match in pattern.finditer(text) if text is not None else ():
            found.append(f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {match[0].strip()}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text", ["x = '/ho" + "me/me/data'", "pip install --extra-" + "index" + "-url https://a", "cd /wo" + "rk/x"]
)
def test_the_patterns_find_what_they_should(text: str) -> None:
    assert re.search(f"{MACHINE_PATH}|{REGISTRY}", text)
