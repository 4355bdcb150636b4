"""One self-contained HTML page of a study: tables, figures, detections, commands. It loads nothing from anywhere."""

from __future__ import annotations

import base64
import html
import string
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path

from ..detection.checkpoint import atomic_write_text
from ..detection.config import config_diff
from ..detection.data import DataError
from ..detection.errors import TrainerError
from ..detection.rundir import prepare_run_folder
from . import figures
from .drawing import Plot
from .gradients import real_targets
from .pictures import choose_images, detections_svg
from .study import RowStudy, Run, Study
from .tables import Cells, correlation_table, cost_table, in_short, result_table, to_html, to_markdown

SHOWN_SCORE = 0.2  # the paper's Figure 4
IMAGES = 4


def tables_of(study: Study) -> list[Cells]:
    """Every table of a study."""
    found: list[Cells | None] = []
    for row in study.rows:
        found += [result_table(study, row), correlation_table(row), cost_table(row)]
    return [table for table in found if table is not None]


def write_tables(study: Study, folder: Path) -> Path:
    """Write table.md; returns its path."""
    path = folder / "table.md"
    text = "\n".join([f"# {study.title}", "", *(to_markdown(table) for table in tables_of(study))])
    atomic_write_text(path, text.rstrip() + "\n")
    return path


def write_page(study: Study, path: Path, *, notes: Sequence[str] = (), plots: Path | None = None) -> Path:
    """Write the page.

    Args:
        study: with at least one run.
        path: of the HTML file.
        notes: paragraphs below the heading.
        plots: a folder that gets the figures as files too.

    Returns:
        `path`.

    Raises:
        OutputError: something cannot be written.
    """
    sections: list[tuple[str, str]] = []  # heading, HTML
    drawn: list[Plot] = []

    def show(*found: Plot | None) -> str:
        present = [plot for plot in found if plot is not None]
        drawn.extend(present)
        return "\n".join(_figure(plot) for plot in present)

    many = len(study.rows) > 1
    for row in study.rows:
        where = f": {row.label} on {row.data}" if many else ""
        prefix = f"{row.block or row.name}-{row.name}-" if many else ""
        sections.append((f"Results{where}", f"<p>{html.escape(in_short(row))}</p>" + to_html(result_table(study, row))))
        training = [figures.plot_losses(row), figures.plot_ap_curves(row), figures.plot_normalizers(row)]
        located = [figures.plot_score_by_iou(row), figures.plot_share_above(row), figures.plot_rank_correlation(row)]
        accuracy = [figures.plot_ap_by_threshold(row)]
        table = correlation_table(row)
        sections.append(
            (
                f"Localisation{where}",
                show(*_named(prefix, [*accuracy, *located])) + (to_html(table) if table else ""),
            )
        )
        sections.append((f"Training{where}", show(*_named(prefix, training))))
        sections.append((f"Detections{where}", _detections(row, drawn, f"{prefix}figure_4_detections")))
        cost = cost_table(row)
        if cost is not None:
            sections.append((f"Cost{where}", to_html(cost)))
    sections.append(("The losses", show(figures.plot_speed(study), _gradient_norms(study), figures.plot_weight(study))))
    sections.append(("Commands and versions", _provenance(study)))
    _write(study, path, notes, sections)
    if plots is not None:
        prepare_run_folder(plots)
        for plot in drawn:
            atomic_write_text(plots / f"{plot.name}.svg", plot.svg)
    return path


def _named(prefix: str, plots: Sequence[Plot | None]) -> list[Plot | None]:
    return [plot and Plot(prefix + plot.name, plot.heading, plot.caption, plot.svg) for plot in plots]


def _gradient_norms(study: Study) -> Plot:
    """Figure 2, measured on the boxes of the first row whose detector has deltas to anchors."""
    targets = None
    for row in study.rows:
        if not row.first.config.model.name.startswith("foveabox"):
            try:
                targets = real_targets(row)
            except (TrainerError, DataError, OSError):  # the data or the checkpoint is gone: Eq. 13 and 14 alone
                continue
            if len(targets):
                break
    return figures.plot_gradient_norms(targets)


def _figure(plot: Plot) -> str:
    heading, caption = html.escape(plot.heading), html.escape(plot.caption)
    data = base64.b64encode(plot.svg.encode()).decode()
    return (
        f'<figure><h3>{heading}</h3><img src="data:image/svg+xml;base64,{data}" alt="{heading}. {caption}">'
        f"<figcaption><p>{caption}</p></figcaption></figure>"
    )


def _detections(row: RowStudy, drawn: list[Plot], name: str) -> str:
    """The same images from the first arm and the method, one seed."""
    if row.dataset is None:
        return f"<p>No pictures: {html.escape(row.dataset_problem or '')}</p>"
    arms = row.compared
    seeds = set.intersection(*(set(arm.by_seed) for arm in arms))
    seed = min(seeds) if seeds else arms[0].runs[0].seed
    shown = {arm.label: arm.by_seed[seed].detections for arm in arms if seed in arm.by_seed}
    present = {label: found for label, found in shown.items() if found is not None}
    if not present:
        return "<p>No pictures: these runs kept no detections.</p>"
    chosen = choose_images(row.dataset, IMAGES)
    svg = detections_svg(row.dataset, present, chosen, SHOWN_SCORE)
    plot = Plot(
        name,
        "Figure 4: detections" if len(present) == 1 else "Figure 4: the same images from both models",
        f"Images of {row.dataset.split}, seed {seed}; detections scored {SHOWN_SCORE} and more, scores in per cent.",
        svg,
    )
    drawn.append(plot)
    return _figure(plot)


def _provenance(study: Study) -> str:
    first = study.runs[0].start
    facts = {**first.get("versions", {}), **first.get("machine", {})}
    names = {"device": "device", "amp": "numbers", "threads": "threads of a training"}
    facts |= {name: first.get(key, "?") for key, name in names.items()}
    listed = "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
    parts = [f"<dl>{listed}</dl>"]
    if study.command:
        parts.append(f"<p>All of it:</p><pre>{html.escape(study.command)}</pre>")
    commands = "\n".join(str(run.start.get("command", run.folder)) for run in study.runs)
    parts.append(_details(f"Each of the {len(study.runs)} trainings", _pre(commands)))
    for row in study.rows:
        base, where = row.arms[0], f"{row.label} on {row.data}"
        lines = []
        for arm in row.arms[1:]:
            changes = config_diff(row.first.config.to_dict(), arm.runs[0].config.to_dict())
            lines += [f"{arm.label}:", *(f"  {change}" for change in changes if not change.startswith("train.seed"))]
        if lines:
            parts.append(_details(f"What the arms change of the {base.label} ({where})", _pre("\n".join(lines))))
        parts.append(_details(f"Configuration of the {base.label} ({where})", _pre(row.first.config.to_yaml())))
        parts.append(_details(f"Runs of {where}", to_html(_runs_table(row))))
    return "\n".join(parts)


def _pre(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def _runs_table(row: RowStudy) -> Cells:
    def cells(arm_label: str, run: Run) -> list[str]:
        ap = run.metrics["AP"]
        step = run.step_seconds
        return [
            arm_label,
            str(run.seed),
            "-" if ap is None else f"{100 * ap:.1f}",
            f"{run.end.get('w_loc', 1.0):.3f}",
            f"{run.end.get('seconds', 0.0):.0f}",
            "-" if step is None else f"{1000 * step:.0f}",
            str(run.start.get("weights", "?"))[:8],
        ]

    rows = [cells(arm.label, run) for arm in row.arms for run in arm.runs]
    header = ["", "seed", "AP", "w_loc", "seconds", "ms a step", "initial weights"]
    note = "Seconds: the whole training with its evaluations; several ran at a time where the plan says so."
    return Cells("Runs", header, rows, note)


def _write(study: Study, path: Path, notes: Sequence[str], sections: Sequence[tuple[str, str]]) -> None:
    template = string.Template(resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    count = len(study.runs)
    of = f" of {study.planned}" if study.planned not in (None, count) else ""
    lead = f"{count}{of} training{'s' if count != 1 else ''}, made {made}."
    navigation = "".join(f'<a href="#s{i}">{html.escape(heading)}</a>' for i, (heading, _) in enumerate(sections))
    body = "".join(f"<p>{html.escape(note)}</p>\n" for note in notes)
    body += "\n".join(
        f'<section id="s{i}"><h2>{html.escape(heading)}</h2>\n{content}</section>'
        for i, (heading, content) in enumerate(sections)
    )
    text = template.substitute(title=html.escape(study.title), lead=lead, navigation=navigation, body=body)
    atomic_write_text(path, text)
