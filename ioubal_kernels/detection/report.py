"""What a comparison of runs looks like: rich tables on the terminal, one HTML page with PNGs in a folder."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from .checkpoint import atomic_write_text
from .data import Dataset
from .evaluate import MAIN_METRICS, ImageDetections, percent
from .rundir import read_log
from .voc_metric import PERCENTS

SHOWN_SCORE = 0.4  # detections below are not drawn


@dataclass
class RunSummary:
    """One run of a report.

    Attributes:
        name: in tables and legends.
        folder: the run's folder; its log.jsonl gives the curves.
        metrics: the final metrics.
        facts: more rows of the table, text by name.
        detections: by image id, for the pictures.
    """

    name: str
    folder: Path
    metrics: Mapping[str, Any]
    facts: Mapping[str, str]
    detections: Mapping[int, ImageDetections]


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


def choose_images(dataset: Dataset, count: int) -> list[int]:
    """Ids of images to draw: those with the most boxes of a middling size set, evenly spread over the split."""
    filled = [r for r in dataset.records if len(r.labels)] or dataset.records
    step = max(1, len(filled) // count)
    groups = [filled[i : i + step] for i in range(0, step * min(count, len(filled)), step)]
    return [max(group, key=lambda r: min(len(r.labels), 8)).id for group in groups]


def write_report(
    folder: Path,
    runs: Sequence[RunSummary],
    dataset: Dataset,
    *,
    title: str,
    notes: Sequence[str] = (),
    images: int = 4,
) -> Path:
    """Write report.html and its PNGs into `folder`; returns the page's path.

    The first run is the one the others are compared with. The page refers to the PNGs by relative links only.
    """
    from . import plots

    folder.mkdir(parents=True, exist_ok=True)
    logs = {run.name: read_log(run.folder) for run in runs}
    steps = {name: [r for r in log if r["event"] == "step"] for name, log in logs.items()}
    evaluations = {name: [r for r in log if r["event"] == "eval"] for name, log in logs.items()}
    plots.plot_losses(folder / "loss.png", steps)
    plots.plot_ap_curves(folder / "ap.png", evaluations)
    plots.plot_ap_by_threshold(folder / "ap_by_threshold.png", {run.name: run.metrics for run in runs})
    plots.plot_detections(
        folder / "detections.png",
        dataset,
        {run.name: run.detections for run in runs},
        choose_images(dataset, images),
        SHOWN_SCORE,
    )
    pictures = (
        ("loss.png", "Losses", "Thin: logged values. Thick: running mean."),
        (
            "ap.png",
            "Average precision while training",
            f"Evaluated weights on {len(dataset)} images of {dataset.split}.",
        ),
        (
            "ap_by_threshold.png",
            "Average precision by IoU threshold",
            "One training each: differences include its noise.",
        ),
        ("detections.png", "Detections beside the ground truth", f"Scores in per cent, above {100 * SHOWN_SCORE:.0f}."),
    )
    page = folder / "report.html"
    atomic_write_text(page, _page(title, runs, notes, pictures))
    return page


def _page(
    title: str, runs: Sequence[RunSummary], notes: Sequence[str], pictures: Sequence[tuple[str, str, str]]
) -> str:
    escape = html.escape
    facts = list(dict.fromkeys(name for run in runs for name in run.facts))
    header = "".join(f"<th>{escape(h)}</th>" for h in ("run", *MAIN_METRICS, *facts))
    rows = []
    for run in runs:
        cells = [percent(run.metrics[name]) for name in MAIN_METRICS] + [run.facts.get(name, "") for name in facts]
        rows.append(f"<tr><th>{escape(run.name)}</th>" + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>")
    if len(runs) > 1:
        for run in runs[1:]:
            cells = [_difference(run.metrics[name], runs[0].metrics[name]) for name in MAIN_METRICS] + [""] * len(facts)
            label = f"{run.name} - {runs[0].name}"
            rows.append(
                f'<tr class="difference"><th>{escape(label)}</th>' + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"
            )
    notes_html = "".join(f"<p>{escape(note)}</p>" for note in notes)
    figures = "".join(
        f'<figure><h2>{escape(heading)}</h2><img src="{escape(file)}" alt="{escape(heading)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for file, heading, caption in pictures
    )
    return _TEMPLATE.format(title=escape(title), header=header, rows="\n".join(rows), notes=notes_html, figures=figures)


def _difference(value: float | None, base: float | None) -> str:
    return "-" if value is None or base is None else f"{100 * (value - base):+.1f}"


_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1f2a33; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.1rem; margin: 2.2rem 0 .4rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; white-space: nowrap; }}
th, td {{ padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #e3e7ea; }}
th:first-child {{ text-align: left; }} thead th {{ border-bottom: 2px solid #b8c0c8; }}
.difference th, .difference td {{ color: #5f6b76; font-weight: normal; }}
figure {{ margin: 0; }} img {{ max-width: 100%; height: auto; }} figcaption {{ color: #5f6b76; font-size: .9rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<div class="scroll"><table>
<thead><tr>{header}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
{notes}
{figures}
</body>
</html>
"""
