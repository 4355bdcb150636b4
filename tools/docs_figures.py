"""Writes what the pages of docs/ show of the stored results: `python tools/docs_figures.py`, with --check nothing.

- between `<!-- bench NAME -->` and its end: the tables of `ioubal bench report`, from bench/results/*.jsonl;
- between `<!-- results NAME -->` and its end: sentences and tables of this file's `BLOCKS`, from the same folder;
- docs/figure_2.svg: Eq. 13 and 14, drawn by `ioubal_kernels.experiments.figures`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from ioubal_kernels.bench import report, results
from ioubal_kernels.bench.report import HEADS, Stored
from ioubal_kernels.bench.table import milliseconds

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FIGURE_2 = DOCS / "figure_2.svg"
RESULTS = ROOT / "bench" / "results"


def headline(stored: Stored) -> str:
    """The fused loss against eager PyTorch, in one sentence."""
    case = f"{HEADS}/flat/float32"
    ours, eager = stored.find(case, "fused"), stored.find(case, "eager PyTorch (README)")
    if ours is None or eager is None:
        return report.NOT_MEASURED
    return (
        f"One 800 x 1333 image, 200,700 anchors x 80 classes, float32, forward and backward on one thread of an"
        f" {ours['device']} ({ours['isa']}): **{milliseconds(ours['median_ms'])}** instead of"
        f" {milliseconds(eager['median_ms'])} for the same loss in eager PyTorch, and"
        f" **{ours['extra_memory_x_logits']:.2f}** instead of {eager['extra_memory_x_logits']:.1f} times the logits'"
        " memory."
    )


def table_2(stored: Stored) -> str:
    """The synthetic reproduction of the paper's Table 2: differences to the baseline with their 95 % intervals."""
    (row,) = json.loads((RESULTS / "table2-cpu" / "results.json").read_text(encoding="utf-8"))["rows"]
    names = ("AP", "AP50", "AP75", "AP80", "AP90")
    lines = [f"| difference to the baseline | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for arm in row["arms"][1:]:
        found = [arm["difference"][name] for name in names]
        cells = [f"{signed(d['mean'])} [{signed(d['low'])}, {signed(d['high'])}]" for d in found]
        lines.append(f"| {arm['label']} | {' | '.join(cells)} |")
    runs = len(row["arms"][0]["runs"])
    return "\n".join([f"{row['label']} on {row['data']}, {runs} seeds:", "", *lines])


def signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}"


BLOCKS: dict[str, Callable[[Stored], str]] = {"headline": headline, "table 2": table_2}


def filled(text: str, stored: dict[bool, Stored]) -> str:
    """The text with every block of stored results written anew. Raises ValueError for an unknown or open block."""

    def block(match: re.Match[str]) -> str:
        name = match[1]
        if name not in BLOCKS:
            raise ValueError(f"no block {name!r}; there are: {', '.join(BLOCKS)}")
        return f"<!-- results {name} -->\n{BLOCKS[name](stored[False])}\n<!-- end of results {name} -->"

    pattern = r"<!-- results ([a-z0-9 ]+) -->\n.*?<!-- end of results \1 -->"
    if len(re.findall(pattern, text, re.DOTALL)) != text.count("<!-- results "):
        raise ValueError("a block of results has no end")
    return re.sub(pattern, block, report.filled(text, stored), flags=re.DOTALL)


def figure_2() -> str:
    """The picture's SVG. Its bytes depend on the version of matplotlib as well."""
    from ioubal_kernels.experiments.figures import plot_gradient_norms

    return plot_gradient_norms(None).svg


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__.split(": ", 1)[0])
    made.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page would change")
    check = made.parse_args().check
    stale, stored = [], results.by_device(RESULTS)
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        new = filled(text, stored)
        if new != text:
            stale.append(page)
            if not check:
                page.write_text(new, encoding="utf-8")
    if not check:
        FIGURE_2.write_text(figure_2(), encoding="utf-8")
    for page in stale:
        print(f"{page.relative_to(ROOT)}{' would change' if check else ''}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
