"""docs/cost.png and the README's table from the newest rows of bench/results/cpu.jsonl.

Run as ``python -m ioubal_kernels.bench.report`` after ``make bench-cpu SAVE=1``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from . import timing

# Path in the rows -> its name in the picture, the cheapest last.
SHOWN = {
    "eager authors": "eager, authors' formulation\n(classification alone)",
    "eager": "eager PyTorch\n(30 lines)",
    "fused": "ioubal_kernels\n(one call)",
    "copy": "copy of the logits\n(the floor)",
}
MEMORY_OF = {"eager authors": "eager, authors' style", "eager": "eager", "fused": "fused"}


def newest_rows() -> list[dict[str, Any]]:
    """The rows of the last run in the file."""
    rows = [json.loads(line) for line in (timing.RESULTS / "cpu.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("run") == rows[-1]["run"]]


def timing_row(rows: list[dict[str, Any]], path: str, dtype: str = "float32", layout: str = "flat") -> dict[str, Any]:
    """The row of a path on the best instruction set of the run."""
    best = rows[-1]["best_isa"]
    fits = lambda r: r.get("layout", layout) == layout and r.get("isa", best) == best and r.get("dtype") == dtype  # noqa: E731
    return next(r for r in rows if r["case"] == "retinanet" and r["path"] == path and fits(r))


def table(rows: list[dict[str, Any]]) -> str:
    """The README's table, Markdown."""
    facts = rows[-1]
    memory = {r["path"]: r["extra_memory_x_logits"] for r in rows if r["case"] == "retinanet memory"}
    lines = ["| path | ms | ns/logit | x copy | extra memory |", "|---|---|---|---|---|"]
    shown = [
        ("copy of the logits, float32", timing_row(rows, "copy"), None),
        ("**fused, flat**", timing_row(rows, "fused"), "fused"),
        ("**fused, NCHW, five levels**", timing_row(rows, "fused", layout="nchw"), None),
        ("**fused, channels_last**", timing_row(rows, "fused", layout="channels_last"), None),
        ("**fused, flat, `inplace=True`**", timing_row(rows, "fused in place"), "fused in place"),
        ("fused, flat, gamma 1.5", timing_row(rows, "fused gamma 1.5"), None),
        ("fused, flat, forward only", timing_row(rows, "fused forward"), None),
        ("eager PyTorch, the 30 lines above", timing_row(rows, "eager"), "eager"),
        (
            "eager, authors' formulation, classification alone",
            timing_row(rows, "eager authors"),
            MEMORY_OF["eager authors"],
        ),
        ("copy of the logits, bfloat16", timing_row(rows, "copy", "bfloat16"), None),
        ("**fused, flat, bfloat16**", timing_row(rows, "fused", "bfloat16"), None),
    ]
    for name, row, of_memory in shown:
        extra = f"{memory[of_memory]:.2f}x logits" if of_memory in memory else ""
        lines.append(f"| {name} | {row['median_ms']:.1f} | {row['ns_per_logit']:.2f} | {row['x_copy']:.2f} | {extra} |")
    note = (
        f"{facts['device']} ({facts['best_isa']}), {facts['threads']} thread, {facts['heap']} heap,"
        f" torch {facts['torch']},"
        f" commit {facts['commit']}; RetinaNet at 800 x 1333, one image: 200,700 anchors x 80 classes,"
        f" forward + backward, medians of {rows[0]['rounds']} interleaved rounds."
    )
    return "\n".join([note, "", *lines])


def write_readme(text: str) -> None:
    """Puts the table between its markers."""
    path = timing.RESULTS.parent.parent / "README.md"
    readme = path.read_text()
    begin, end = "<!-- cpu table -->", "<!-- end of cpu table -->"
    head, rest = readme.split(begin)
    path.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def main() -> int:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = newest_rows()
    timed = [
        r for r in rows if r["case"] == "retinanet" and r["dtype"] == "float32" and r.get("layout", "flat") == "flat"
    ]
    best = [r for r in timed if r.get("isa") in (None, rows[-1]["best_isa"])]
    times = {path: next(r["median_ms"] for r in best if r["path"] == path) for path in SHOWN}
    memory = {r["path"]: r["extra_memory_x_logits"] for r in rows if r["case"] == "retinanet memory"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.0), sharey=True, gridspec_kw={"width_ratios": (3, 2)})
    names, ink, ours = list(SHOWN.values()), "#9aa5b1", "#1f6feb"
    colours = [ours if path == "fused" else ink for path in SHOWN]
    left.barh(names, [times[p] for p in SHOWN], color=colours)
    right.barh(names, [memory.get(MEMORY_OF.get(p, ""), 0.0) for p in SHOWN], color=colours)
    for axis, values, unit in (
        (left, [times[p] for p in SHOWN], "{:.0f} ms"),
        (right, [memory.get(MEMORY_OF.get(p, "")) for p in SHOWN], "{:.1f}x"),
    ):
        for i, value in enumerate(values):
            axis.text(
                value or 0, i, "  " + (unit.format(value) if value is not None else "none"), va="center", fontsize=9
            )
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    left.set_title("time, forward + backward", fontsize=10, loc="left")
    right.set_title("extra memory, in units of the logits", fontsize=10, loc="left")
    facts = rows[-1]
    figure.suptitle(
        f"RetinaNet 800 x 1333: 200,700 anchors x 80 classes, float32, one image, {facts['threads']} thread,"
        f" {facts['device']} ({facts['best_isa']})",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    figure.tight_layout()
    target = timing.RESULTS.parent.parent / "docs" / "cost.png"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=130)
    write_readme(table(rows))
    print(f"{target} and the table in README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
