"""The messages of docs/troubleshooting.md are those of the package: raised by a mistake, or a text of the source."""

from __future__ import annotations

import ast
import re

import pytest
from doc_pages import DOCS, ROOT
from provoked import PROVOKED, on_page, raised

PAGE = DOCS / "troubleshooting.md"
LITERAL = 20  # characters that a text of the source shares with a message at least


@pytest.fixture(scope="module")
def raised_here() -> set[str]:
    pytest.importorskip("torchvision")
    return {raised(mistake) for mistake in PROVOKED}


def texts_of(node: ast.AST) -> list[object]:
    """The fixed parts of a text, with None for what is put in between; [None] for anything else."""
    if isinstance(node, ast.JoinedStr):
        return [text for value in node.values for text in texts_of(value)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*texts_of(node.left), *texts_of(node.right)]
    return [node.value if isinstance(node, ast.Constant) else None]


@pytest.fixture(scope="module")
def patterns() -> list[re.Pattern[str]]:
    """Every text of the package's source as an expression: what is put in may be anything."""
    found = set()
    for path in (ROOT / "ioubal_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            texts = texts_of(node)
            if sum(len(text) for text in texts if isinstance(text, str)) >= LITERAL:
                found.add("".join(re.escape(text) if isinstance(text, str) else ".+" for text in texts))
    return [re.compile(each) for each in found]


def test_each_message_is_the_packages(raised_here: set[str], patterns: list[re.Pattern[str]]) -> None:
    unknown = [
        message
        for message in on_page(PAGE)
        if message not in raised_here and not any(pattern.fullmatch(message) for pattern in patterns)
    ]
    assert unknown == []


def test_there_are_many_and_most_are_raised(raised_here: set[str]) -> None:
    messages = on_page(PAGE)
    assert len(messages) == len(set(messages)) >= 40
    assert raised_here <= set(messages), sorted(raised_here - set(messages))
    assert len(raised_here) >= 25


def test_each_section_ends_with_what_to_do() -> None:
    """Several messages may share their text, but none is the last thing of its section."""
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        assert not section.rstrip().endswith("```"), section.splitlines()[0]


def test_an_invented_message_is_noticed(patterns: list[re.Pattern[str]]) -> None:
    for message in (
        "eta should not be negative",
        "runs/mine holds a run already",
        "backend 'cuda' cannot be found here",
    ):
        assert not any(pattern.fullmatch(message) for pattern in patterns)
