"""The pages of the documentation and their code blocks, as the tests of this folder see them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
# In the line before a block that cannot run here, with the reason.
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^>]+) -->\n\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: its file.
        line: of its first line of text.
        reason: why it is not run; None if it is.
    """

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in these languages, from top to bottom."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        if match["language"] in languages:
            marker = NOT_RUN.search(text, 0, match.start())
            line = text.count("\n", 0, match.start()) + 2
            found.append(Block(page, line, match["language"], match["text"], marker and marker["reason"]))
    return found
