"""The pictures of the stored rows: speed and memory of one batch, and their growth with the batch."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.ticker import LogFormatter

from .results import Stored
from .table import milliseconds
from .timing import Row
from .work import COPY

matplotlib.use("Agg")
OURS, INK = "#1f6feb", "#9aa5b1"
# Path in the rows -> its name in the picture, the cheapest last.
SHOWN = {
    "eager, authors' style": "eager, authors' formulation\n(classification alone)",
    "torchvision heads": "torchvision heads\n(plain losses)",
    "eager PyTorch (README)": "eager PyTorch\n(30 lines)",
    "torch.compile, static form": "torch.compile\n(the best form found)",
    "fused": "ioubal_kernels\n(one call)",
    COPY: "copy of the logits\n(the floor)",
}
LINES = {
    "eager, authors' style": ("eager, authors' formulation", "#6e7781", ":"),
    "torchvision heads": ("torchvision heads (plain)", "#bf8700", "-."),
    "eager PyTorch (README)": ("eager PyTorch", "#6e7781", "--"),
    "torch.compile, static form": ("torch.compile", "#8250df", "--"),
    "fused": ("ioubal_kernels", OURS, "-"),
    COPY: ("copy of the logits", "#57606a", "-"),
}
BATCHES = (1, 2, 4, 8, 16)


class PlainLogFormatter(LogFormatter):
    """Plain numbers, few of them."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def draw(stored: Stored, folder: Path) -> list[Path]:
    """Draws what there are rows for; the files written. A GPU's are named so."""
    kind = "-gpu" if stored.gpu else ""
    folder.mkdir(exist_ok=True)
    return [*cost(stored, folder / f"cost{kind}.png"), *scaling(stored, folder / f"scaling{kind}.png")]


def where(stored: Stored, row: Row) -> str:
    """What a picture's title says of the machine, by one of the rows that it shows."""
    return stored.device if stored.gpu else f"1 thread of {stored.device} ({row['isa']})"


def cost(stored: Stored, target: Path) -> list[Path]:
    """Bars: time and extra memory of one batch, forward and backward."""
    batch = 16 if stored.gpu else 1
    name = f"retinanet/b{batch}/flat/float32"
    rows = {path: row for path in SHOWN if (row := stored.find(name, path))}
    if "fused" not in rows:
        return []
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 0.6 * len(rows) + 1.0), sharey=True, gridspec_kw={"width_ratios": (3, 2)}
    )
    names = [SHOWN[path] for path in rows]
    colours = [OURS if path == "fused" else INK for path in rows]
    times = [row["median_ms"] for row in rows.values()]
    memory = [row.get("extra_memory_x_logits", 0.0) for row in rows.values()]
    for axis, values, texts in (
        (left, times, [milliseconds(value) for value in times]),
        (right, memory, [f"{value:.2f}x" if value else "none" for value in memory]),
    ):
        axis.barh(names, values, color=colours)
        for i, (value, text) in enumerate(zip(values, texts, strict=True)):
            axis.text(value, i, f"  {text}", va="center", fontsize=9)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    left.set_title("time, forward + backward (ms)", fontsize=10, loc="left")
    right.set_title("extra memory, in units of the logits", fontsize=10, loc="left")
    images = "one image" if batch == 1 else f"{batch} images"
    title = f"RetinaNet 800 x 1333: 200,700 anchors x 80 classes, float32, {images}, {where(stored, rows['fused'])}"
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.tight_layout()
    return saved(figure, target)


def scaling(stored: Stored, target: Path) -> list[Path]:
    """Lines over the batch: milliseconds an image, and extra memory."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    shown: Row | None = None
    for path, (label, colour, style) in LINES.items():
        rows = [(b, stored.find(f"retinanet/b{b}/flat/float32", path)) for b in BATCHES]
        rows = [(batch, row) for batch, row in rows if row]
        if len(rows) < 2:
            continue
        shown = rows[-1][1]
        look = {"color": colour, "linestyle": style, "marker": "o", "markersize": 3.5, "label": label}
        left.plot([b for b, _ in rows], [row["median_ms"] / b for b, row in rows], **look)
        if path != COPY:
            right.plot([b for b, _ in rows], [row["peak_extra_bytes"] / 2**30 for _, row in rows], **look)
    if shown is None:
        plt.close(figure)
        return []
    for axis, title in ((left, "time an image, forward + backward (ms)"), (right, "peak extra memory (GiB)")):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        for side in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            side(PlainLogFormatter(minor_thresholds=(2, 0.5)))
        axis.set_xticks(BATCHES, [str(b) for b in BATCHES])
        axis.set_xlabel("images in the batch", fontsize=9)
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
        axis.grid(alpha=0.25)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=9, frameon=False, loc="center right")
    figure.suptitle(f"RetinaNet 800 x 1333, float32, {where(stored, shown)}", fontsize=10, x=0.01, ha="left")
    figure.tight_layout(rect=(0, 0, 0.79, 1))
    return saved(figure, target)


def saved(figure: plt.Figure, target: Path) -> list[Path]:
    figure.savefig(target, dpi=130)
    plt.close(figure)
    return [target]
