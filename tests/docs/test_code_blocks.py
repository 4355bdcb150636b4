"""Every Python block of the README and of docs/ runs, page by page in one namespace; every command line that a page
shows is one that the program takes.

A block that cannot run here has `<!-- not run: reason -->` in the line before it.
"""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from doc_pages import DOCS, PAGES, ROOT, Block, blocks

import ioubal_kernels as ik
from ioubal_kernels import cli, testing

MOST_NOT_RUN = 2  # blocks with a marker, over all pages that are not written for a framework that is absent here
# Run by a test of their own, which alone has what they need: here they would run twice.
ELSEWHERE = {
    "README.md": ("tests/packaging/test_readme.py", r"\Aimport torch\n"),
    "detectors.md": ("tests/detection/test_export.py", r"\Aimport json\n"),
    # With mmcv's compiled part and Detectron2 stood in for.
    "mmdetection.md": ("tests/integrations/test_framework_pages.py", r""),
    "detectron2.md": ("tests/integrations/test_framework_pages.py", r""),
}


def python_blocks(page: Path) -> list[Block]:
    own = ELSEWHERE.get(page.name)
    return [
        block
        for block in blocks(page, "python")
        if block.reason is None and not (own and re.search(own[1], block.text))
    ]


def readme_names() -> dict[str, Any]:
    """What the README's fragments speak of: the names of the text around them."""
    inputs = testing.detection_inputs(images=2, classes=3).requiring_grad()
    logits, deltas, anchors, matched, gt_boxes, gt_labels = inputs.arguments()
    from torchvision.ops import box_iou

    return {
        "torch": torch, "F": F, "ik": ik, "box_iou": box_iou, "logits": logits, "deltas": deltas, "anchors": anchors,
        "matched": matched, "matched_idxs": matched, "gt_boxes": gt_boxes, "gt_labels": gt_labels,
        "cls_logits": logits, "bbox_deltas": deltas,
    }  # fmt: skip


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("torchvision")
    names: dict[str, Any] = {"__name__": "__main__"}
    if page.name == "README.md":
        names.update(readme_names())
    torch.manual_seed(0)
    for block in python_blocks(page):
        # Line numbers of a traceback are the page's.
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)


@pytest.mark.parametrize("page", [DOCS / "method.md", DOCS / "api.md"], ids=lambda page: page.name)
def test_what_a_block_prints_is_what_the_page_shows(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A block `text` right after one of Python is its output."""
    pairs = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert pairs
    for code, shown in pairs:
        exec(code, {})
        assert capsys.readouterr().out == shown


def test_the_blocks_left_to_other_tests_are_theirs() -> None:
    for name, (test, pattern) in ELSEWHERE.items():
        page = ROOT / name if name == "README.md" else DOCS / name
        assert [block for block in blocks(page, "python") if re.search(pattern, block.text)]
        assert name in (ROOT / test).read_text(encoding="utf-8")


def test_few_blocks_are_not_run_and_each_says_why() -> None:
    marked = [block for page in PAGES for block in blocks(page, "python", "sh", "bash") if block.reason is not None]
    assert all(len(block.reason) > 10 for block in marked)
    # A page for a framework that CI does not install says so in every marker.
    absent = [block for block in marked if re.search("mmdet|mmcv|detectron2|GPU", block.reason, re.IGNORECASE)]
    assert len(marked) - len(absent) <= MOST_NOT_RUN, [str(block) for block in marked]


def test_every_fence_has_a_language() -> None:
    """A block without one would be run by nobody."""
    bare = [str(block) for page in PAGES for block in blocks(page, "")]
    assert bare == []


# ------------------------------------------------------------------------------------------------- command lines


def joined_lines(text: str) -> list[str]:
    return re.sub(r"\\\n\s*", " ", text).splitlines()


def command_lines() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(page, line without the program's name): those to be typed, of blocks fenced or indented, and those that a
    sentence or a table names."""
    typed, named = [], []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        shell = [block.text for block in blocks(page, "sh", "bash")]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        indented = [line for line in joined_lines(prose) if line.startswith("    ")]
        for line in (*(line for part in shell for line in joined_lines(part)), *indented):
            at = re.match(r"(?:torchrun .*? -m ioubal_kernels|python -m ioubal_kernels|ioubal) (.*)", line.strip())
            if at:
                typed.append((page.name, at[1]))
        named += [(page.name, code[7:]) for code in re.findall(r"(?<!`)`(ioubal [^`\n]+)`(?!`)", prose)]
    return list(dict.fromkeys(typed)), list(dict.fromkeys(named))


def arguments_of(line: str) -> list[str]:
    """Of a line as it is written for people: optional parts are there, the first of several alternatives is taken, and
    what stands for more of the same is left out. Nothing after a pipe or an `&&` is the program's."""
    line = re.sub(r"(?<=\w)(\|[\w./-]+)+", "", line)
    line = re.sub(r"\[(-[^\]]*|[A-Z]+)\]", r"\1", line)
    words = shlex.split(line, comments=True)
    return [word.rstrip(",") for word in words if word not in ("...", "…")]


class Parsed(Exception):
    """The command line was taken."""


class Incomplete(Exception):
    """Command and options are there, but something that it needs was not given."""


def parse(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise Parsed when the program takes these arguments; nothing is run. Another exception if it does not."""
    if arguments[0] == "bench":
        parse_bench(arguments, monkeypatch)
    else:
        parse_typer(arguments)


def parse_bench(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`ioubal bench` and its parsers of argparse: stopped as soon as a parser is through."""
    from ioubal_kernels.bench import program

    if len(arguments) == 1:
        raise Incomplete
    assert arguments[1] in program.COMMANDS, arguments[1]
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        raise Parsed

    def error(self: argparse.ArgumentParser, message: str) -> None:
        raise Incomplete(message) if "are required" in message else ValueError(message)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(argparse.ArgumentParser, "error", error)
    program.main(arguments[1:])


def parse_typer(arguments: list[str]) -> None:
    import typer

    from ioubal_kernels import commands  # noqa: F401  registers them
    from ioubal_kernels.commands.app import app

    command, context = typer.main.get_command(app), None
    try:
        while True:
            context = command.make_context(command.name, list(arguments), parent=context)
            if not hasattr(command, "commands"):
                raise Parsed
            rest = [*getattr(context, "_protected_args", []), *context.args]
            _, command, arguments = command.resolve_command(context, rest)
    except Exception as error:  # of the parser that typer brings, which has no public name
        if type(error).__name__ in ("MissingParameter", "NoArgsIsHelpError"):
            raise Incomplete from error
        raise


TYPED, NAMED = command_lines()


def names_of(lines: list[tuple[str, str]]) -> list[str]:
    return [f"{page}: {line[:50]}" for page, line in lines]


@pytest.mark.parametrize(("page", "line"), TYPED, ids=names_of(TYPED))
def test_command_lines_are_taken(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Parsed):
        parse(arguments_of(line), monkeypatch)


@pytest.mark.parametrize(("page", "line"), NAMED, ids=names_of(NAMED))
def test_commands_that_a_sentence_names_exist(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their options; what they need beyond that may be missing."""
    with pytest.raises((Parsed, Incomplete)):
        parse(arguments_of(line), monkeypatch)


def test_there_are_command_lines() -> None:
    assert len(TYPED) > 40 and len(NAMED) > 20


@pytest.mark.parametrize("line", ["train --dataa x", "trian --data x", "bench run --onyl x", "bench lst", "data chek"])
def test_a_wrong_command_line_is_noticed(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Exception) as caught:
        parse(line.split(), monkeypatch)
    assert not isinstance(caught.value, (Parsed, Incomplete))


@pytest.mark.parametrize("line", ["doctor", "configs", "configs ssd_tiny", "bench list", "--version"])
def test_cheap_commands_run(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) == 0
    assert capsys.readouterr().out


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    named = {
        name
        for page in PAGES
        for name in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert {"docs", "demo", "test"} <= targets and len(named) > 4
    assert named <= targets, named - targets
