"""How the figures look: matplotlib's SVG backend, one palette, quiet axes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers too.
ARM_COLORS = {
    "baseline": "#0072B2",
    "cls": "#E69F00",
    "loc": "#009E73",
    "both": "#D55E00",
    "control": "#8A94A0",
}
MORE_COLORS = ("#CC79A7", "#56B4E9", "#7F5539", "#009E73", "#E69F00", "#D55E00", "#6A4C93", "#A0A000", "#C1121F")
GREY, DARK, LINE = "#5F6B76", "#1F2A33", "#B8C0C8"
MARKERS = "osD^vP*X<>"


@dataclass(frozen=True)
class Plot:
    """A finished figure.

    Attributes:
        name: of its file, without the ending.
        heading, caption: in words.
        svg: the picture.
    """

    name: str
    heading: str
    caption: str
    svg: str


def colors(names: Sequence[str]) -> dict[str, str]:
    """A colour for each arm: the usual ones have their own."""
    others = iter(MORE_COLORS * (1 + len(names) // len(MORE_COLORS)))
    return {name: ARM_COLORS.get(name) or next(others) for name in names}


def panels(count: int, *, width: float = 9.0, height: float = 3.5) -> tuple[Figure, list[Any]]:
    """A figure with `count` axes side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False).ravel().tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(LINE)
        ax.tick_params(colors=GREY, labelsize=9)
        ax.grid(axis="y", color="#E3E7EA", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def label(ax: Any, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=11, loc="left", color=DARK)
    ax.set_xlabel(x, fontsize=9, color=GREY)
    ax.set_ylabel(y, fontsize=9, color=GREY)


def legend(ax: Any, **options: Any) -> None:
    """A legend, unless nothing was drawn."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(**{"frameon": False, "fontsize": 9, **options})


def svg_of(figure: Figure) -> str:
    """The figure as SVG: letters as shapes, so that it looks alike everywhere; the same bytes for the same figure."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "ioubal_kernels"}):
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def smooth(values: Sequence[float], share: float = 0.05) -> np.ndarray:
    """Running mean over `share` of the series; shorter windows at its ends."""
    data = np.asarray(values, dtype=float)
    half = max(1, round(share * len(data) / 2))
    return np.array([data[max(0, i - half) : i + half + 1].mean() for i in range(len(data))])
