"""docs/cost.png from the newest rows of bench/results/cpu.jsonl: ``python -m ioubal_kernels.bench.plot``."""

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
    last = (rows[-1]["commit"], rows[-1]["date"])
    return [row for row in rows if (row["commit"], row["date"]) == last]


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
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
