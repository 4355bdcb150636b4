"""The report's pictures: PNG files by matplotlib's Agg backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from .data import Dataset, ImageRecord
from .evaluate import THRESHOLDS, ImageDetections

# Okabe and Ito's palette: told apart by colour-blind readers too.
RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CLASS_COLORS = ("#F0C419", "#E8505B", "#2FA8D8", "#27AE60", "#B05CC6", "#F08A24", "#12C2A9", "#F2A2C0")
_GREY = "#5F6B76"


def _axes(figure: Figure, rows: int = 1, columns: int = 1) -> list[Any]:
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#B8C0C8")
        ax.tick_params(colors=_GREY, labelsize=9)
        ax.grid(axis="y", color="#E3E7EA", linewidth=0.8)
        ax.set_axisbelow(True)
    return axes


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150, facecolor="white")


def _label(ax: Any, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=11, loc="left", color="#1F2A33")
    ax.set_xlabel(x, fontsize=9, color=_GREY)
    ax.set_ylabel(y, fontsize=9, color=_GREY)


def _legend(ax: Any, **options: Any) -> None:
    """A legend, unless nothing was drawn (a run without evaluations has no curve)."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=9, **options)


def smooth(values: Sequence[float], share: float = 0.05) -> np.ndarray:
    """Running mean over `share` of the series; shorter windows at its ends."""
    data = np.asarray(values, dtype=float)
    half = max(1, round(share * len(data) / 2))
    return np.array([data[max(0, i - half) : i + half + 1].mean() for i in range(len(data))])


def plot_losses(path: Path, logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Both losses over the steps: every logged value thin, the running mean thick.

    Args:
        path: the PNG.
        logs: by run name, the "step" records of its log.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for ax, key, title in zip(
        _axes(figure, 1, 2), ("cls", "loc"), ("Classification loss", "Localisation loss, with w_loc")
    ):
        for color, (name, records) in zip(RUN_COLORS, logs.items()):
            points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
            if points:
                steps, values = zip(*points)
                ax.plot(steps, values, color=color, linewidth=0.7, alpha=0.3)
                ax.plot(steps, smooth(values), color=color, linewidth=1.8, label=name)
        ax.set_ylim(bottom=0)
        _label(ax, title, "step", "")
        _legend(ax)
    _save(figure, path)


def plot_ap_curves(path: Path, evaluations: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """AP, AP50 and AP75 over the steps.

    Args:
        path: the PNG.
        evaluations: by run name, the "eval" records of its log.
    """
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for ax, metric in zip(_axes(figure, 1, 3), ("AP", "AP50", "AP75")):
        for color, (name, records) in zip(RUN_COLORS, evaluations.items()):
            points = [(r["step"], 100 * r["metrics"][metric]) for r in records if r["metrics"][metric] is not None]
            if points:
                steps, values = zip(*points)
                ax.plot(steps, values, color=color, linewidth=1.8, marker="o", markersize=4, label=name)
        ax.set_ylim(bottom=0)
        ax.set_xlim(left=0)
        _label(ax, metric, "step", "%")
    _legend(figure.axes[0], loc="lower right")
    _save(figure, path)


def plot_ap_by_threshold(path: Path, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """AP at every IoU threshold, and its difference to the first run.

    Args:
        path: the PNG.
        metrics: by run name, the final metrics.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = _axes(figure, 1, 2)
    curves = {n: np.array([100 * (v or 0.0) for v in m["thresholds"].values()]) for n, m in metrics.items()}
    first = next(iter(curves.values()))
    width = 0.04 / max(1, len(curves) - 1)
    for index, (color, (name, values)) in enumerate(zip(RUN_COLORS, curves.items())):
        left.plot(THRESHOLDS, values, color=color, linewidth=1.8, marker="o", markersize=4, label=name)
        if index:
            shift = (index - 1 - (len(curves) - 2) / 2) * width
            right.bar(np.array(THRESHOLDS) + shift, values - first, width=0.85 * width, color=color, label=name)
    left.set_ylim(bottom=0)
    _legend(left)
    _label(left, "AP by IoU threshold", "IoU threshold", "%")
    right.axhline(0, color=_GREY, linewidth=0.8)
    low, high = right.get_ylim()
    right.set_ylim(min(low, -1), max(high, 1))
    _label(right, f"Difference to {next(iter(curves))}", "IoU threshold", "points")
    _save(figure, path)


def plot_detections(
    path: Path,
    dataset: Dataset,
    detections: Mapping[str, Mapping[int, ImageDetections]],
    image_ids: Sequence[int],
    score_threshold: float,
) -> None:
    """Rows of images: ground truth, then each run's detections above `score_threshold`.

    Args:
        path: the PNG.
        dataset: where the images and their boxes are.
        detections: by run name, then by image id.
        image_ids: which images, one a row.
        score_threshold: detections below are not drawn.
    """
    from PIL import Image

    records = {r.id: r for r in dataset.records}
    columns = 1 + len(detections)
    first = records[image_ids[0]]
    edge = 2.7
    height = edge * first.height / first.width * len(image_ids) + 0.7
    figure = Figure(figsize=(edge * columns, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.0, hspace=0.0)
    axes = figure.subplots(len(image_ids), columns, squeeze=False)
    for number, (row, image_id) in enumerate(zip(axes, image_ids)):
        record = records[image_id]
        with Image.open(record.path) as image:
            pixels = np.asarray(image.convert("RGB"))
        titles = ["ground truth", *detections] if number == 0 else [""] * columns
        for ax, title in zip(row, titles):
            ax.imshow(pixels, interpolation="nearest")
            ax.set_axis_off()
            if title:
                ax.set_title(title, fontsize=11, color="#1F2A33")
        _draw_truth(row[0], record)
        for ax, found in zip(row[1:], detections.values()):
            _draw_detections(ax, found.get(image_id), score_threshold, record.width)
    names = [Patch(color=CLASS_COLORS[k % len(CLASS_COLORS)], label=n) for k, n in enumerate(dataset.classes[:12])]
    figure.legend(handles=names, loc="outside lower center", ncols=min(6, len(names)), frameon=False, fontsize=9)
    _save(figure, path)


def _draw_box(ax: Any, box: Sequence[float], label: int, style: str = "-") -> None:
    x1, y1, x2, y2 = box
    color = CLASS_COLORS[label % len(CLASS_COLORS)]
    # Dark below bright: visible on any background.
    ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="black", linewidth=2.6, alpha=0.6))
    ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=1.4, linestyle=style))


def _draw_truth(ax: Any, record: ImageRecord) -> None:
    for box, label, trained in zip(record.boxes.tolist(), record.labels.tolist(), record.trainable.tolist()):
        _draw_box(ax, box, label, "-" if trained else ":")


def _draw_detections(ax: Any, found: ImageDetections | None, score_threshold: float, width: int) -> None:
    if found is None:
        return
    for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist()):
        if score >= score_threshold:
            _draw_box(ax, box, label)
            color = CLASS_COLORS[label % len(CLASS_COLORS)]
            ax.text(
                min(box[0], 0.88 * width),
                max(box[1] - 0.01 * width, 0.045 * width),
                f"{100 * score:.0f}",
                fontsize=6.5,
                color="black",
                verticalalignment="bottom",
                bbox={"facecolor": color, "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
            )
