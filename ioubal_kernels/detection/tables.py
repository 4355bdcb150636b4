"""What the program shows of metrics on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from .evaluate import MAIN_METRICS, percent
from .voc_metric import PERCENTS


def metrics_table(metrics: Mapping[str, Mapping[str, Any]], title: str | None = None) -> Table:
    """Runs as rows, the main metrics in per cent as columns."""
    table = Table(title=title, title_justify="left")
    table.add_column("run", no_wrap=True)
    for name in MAIN_METRICS:
        table.add_column(name, justify="right", no_wrap=True)
    for run, values in metrics.items():
        table.add_row(run, *(percent(values[name]) for name in MAIN_METRICS))
    return table


def voc_table(metrics: Mapping[str, Mapping[str, Any]]) -> Table:
    """Runs as rows, the VOC 2007 metric by IoU threshold in per cent as columns."""
    table = Table(title="Pascal VOC 2007, 11 points", title_justify="left")
    table.add_column("run", no_wrap=True)
    names = ("AP", *(f"AP{p}" for p in PERCENTS))
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for run, values in metrics.items():
        table.add_row(run, *(percent(values["VOC07"][name]) for name in names))
    return table


def class_table(metrics: Mapping[str, Any]) -> Table:
    """AP by class."""
    table = Table(title="by class", title_justify="left")
    table.add_column("class")
    for name in ("boxes", "AP", "AP50", "AP75"):
        table.add_column(name, justify="right")
    for name, values in metrics["per_class"].items():
        table.add_row(name, str(values["boxes"]), *(percent(values[key]) for key in ("AP", "AP50", "AP75")))
    return table
