"""`ioubal bench compare A B`: what changed between two commits or runs, from the stored rows.

A time means little on another day of a shared machine: the times over the copy's in the same rounds are compared. A
difference counts where the middle 60 % of the rounds of one lie beyond those of the other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import results
from .results import Key
from .table import name_of
from .timing import Row
from .work import COPY

PROGRAM = "ioubal bench compare"


def of(rows: list[Row], which: str) -> list[Row]:
    """The rows of a commit (or its first letters) or a run (its time, or the beginning of it)."""
    return [row for row in rows if row["commit"].startswith(which) or row["run"].startswith(which)]


def span(row: Row) -> tuple[float, float, float]:
    """20 %, 50 % and 80 % quantile in copies."""
    copy = row["median_ms"] / row["x_copy"]
    return row["q20_ms"] / copy, row["x_copy"], row["q80_ms"] / copy


def verdict(before: Row, after: Row) -> str:
    (low, _, high), (new_low, _, new_high) = span(before), span(after)
    return "faster" if new_high < low else "slower" if new_low > high else ""


def lines_of(before: dict[Key, Row], after: dict[Key, Row], changed_only: bool) -> list[str]:
    """A line for each key that both have."""
    lines = []
    for key in sorted(before.keys() & after.keys(), key=str):
        a, b = before[key], after[key]
        found = verdict(a, b)
        if a["path"] == COPY or (changed_only and not found):
            continue
        lines.append(
            f"{a['name']:34.34s} {name_of(a):52.52s} {a['x_copy']:9.3f} {b['x_copy']:9.3f}"
            f" {b['x_copy'] / a['x_copy']:7.3f}  {found}".rstrip()
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog=PROGRAM, description=__doc__.split(": ", 1)[1].split("\n")[0])
    made.add_argument("before", metavar="A", help="a commit or a run's time, or the beginning of one")
    made.add_argument("after", metavar="B", help="likewise")
    made.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="cases whose name contains one of these")
    made.add_argument("--changed", action="store_true", help="leave out what is the same within its spread")
    made.add_argument("--results", type=Path, help="folder of the rows (default: the package's bench/results)")
    options = made.parse_args(arguments)
    try:
        rows = results.load(options.results)
    except ValueError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    rows = [row for row in rows if "x_copy" in row]  # a training step has no copy beside it
    rows = [row for row in rows if not options.only or any(text in row["name"] for text in options.only)]
    chosen = []
    for which in (options.before, options.after):
        found = results.newest(of(rows, which))
        if not found:
            known = dict.fromkeys(f"{row['commit']} ({row['run']})" for row in reversed(rows))
            shown = ", ".join(list(known)[:10]) or "none at all"
            print(f"{PROGRAM}: no measured rows of {which!r}; there are: {shown}", file=sys.stderr)
            return 2
        chosen.append(found)
    before, after = chosen
    lines = lines_of(before, after, options.changed)
    print(
        f"{'case':34s} {'path':52s} {'A':>9s} {'B':>9s} {'B / A':>7s}"
        f"   (A = {options.before}, B = {options.after}; copies)"
    )
    print("\n".join(lines) if lines else "nothing changed beyond its spread")
    for name, own, other in (("A", before, after), ("B", after, before)):
        if alone := len(own.keys() - other.keys()):
            print(f"{alone} rows of {name} have no counterpart")
    return 0


if __name__ == "__main__":
    sys.exit(main())
