"""The tables of a study, once as cells, and as Markdown, HTML and for a terminal."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import rich.table
from rich.console import Group
from rich.text import Text

from ..detection.config import config_diff
from .compare import Difference, Summary
from .grid import LABELS, PRIMARY, TABLES
from .localization import EDGES
from .paper import figures
from .plans import FULL_NAMES
from .results import differences, localization_means, summary_of, values_of
from .study import RowStudy, Run, Study


@dataclass(frozen=True)
class Cells:
    """A table.

    Attributes:
        title: above it.
        header: of the columns.
        rows: as many cells each; the first one names the row. A row of one cell is a heading between the rows.
        note: below it, or "".
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def result_table(study: Study, row: RowStudy) -> Cells:
    """Every arm; below, its difference to the first one; below, what the paper has."""
    # A metric that no run has (APl without large boxes) needs no column.
    names = [name for name in study.metrics if any(values_of(arm, name) for arm in row.arms)]
    rows: list[list[str]] = []
    for arm in row.arms:
        cells = [_summary(summary_of(arm, name)) for name in names]
        rows.append([arm.label, str(len(arm.runs)), *cells])
    others = row.arms[1:]
    paired = {arm.name: differences(row, arm, names) for arm in others}
    if others:
        rows.append([f"difference to the {row.arms[0].label}, paired by seed"])
        for arm in others:
            cells = [_difference(paired[arm.name].get(name)) for name in names]
            rows.append([arm.label, str(max((d.n for d in paired[arm.name].values()), default=0)), *cells])
    if study.table is not None:
        rows += _paper_rows(study, row, names)
    return Cells(f"{row.label} on {row.data}", ["", "seeds", *names], rows, _note(row, paired))


def in_short(row: RowStudy) -> str:
    """The primary outcomes in a sentence: the method and the control against the baseline, as they came out."""
    base, parts, seeds = row.arms[0], [], []
    for name in ("both", "control"):
        arm = row.arm(name)
        if arm is None or arm is base:
            continue
        found = differences(row, arm, PRIMARY)
        texts = [f"{metric} {_difference(found[metric])}" for metric in PRIMARY if metric in found]
        if texts:
            parts.append(f"{arm.label}: {', '.join(texts)}")
            seeds.append(max(found[metric].n for metric in PRIMARY if metric in found))
    if not parts:
        return ""
    counts = " and ".join(map(str, dict.fromkeys(seeds)))
    return f"Against the {base.label}, {counts} seed{'s' if max(seeds) > 1 else ''}. {'; '.join(parts)}."


def _paper_rows(study: Study, row: RowStudy, names: list[str]) -> list[list[str]]:
    found = {arm.name: figures(study.table or "", row.name, arm.name) for arm in row.arms}
    base = found[row.arms[0].name]
    shown = [arm for arm in row.arms if found[arm.name]]
    if not shown:
        return []
    what = f"{LABELS[row.name]} on {FULL_NAMES[TABLES[study.table or ''].data]}"
    rows: list[list[str]] = [[f"the paper: {what}"]]
    for arm in shown:
        own = found[arm.name]
        rows.append([arm.label, "", *(f"{own[name]:.1f}" if name in own else "" for name in names)])
    if base and len(shown) > 1:
        rows.append([f"the paper: difference to the {row.arms[0].label}"])
        for arm in shown[1:]:
            own = found[arm.name]
            cells = [_signed(own[name] - base[name]) if name in own and name in base else "" for name in names]
            rows.append([arm.label, "", *cells])
    return rows


def _note(row: RowStudy, paired: dict[str, dict[str, Difference]]) -> str:
    parts = ["In per cent: mean ± standard deviation over seeds; differences with their 95 % interval."]
    if not any(paired.values()):
        parts = ["In per cent: mean ± standard deviation over seeds."]
    if all(len(arm.runs) == 1 for arm in row.arms):
        parts = ["In per cent. One training each: another seed moves AP by one or two points."]
    tested = {name: d for found in paired.values() for name, d in found.items() if name in PRIMARY and d.p is not None}
    if tested:
        parts.append(
            f"p: two-sided permutation test of the primary outcomes {' and '.join(PRIMARY)}, after Holm's correction "
            "for the two; the other columns are described, not tested."
        )
    elif any(d.n > 1 for found in paired.values() for d in found.values()):
        parts.append("No tests below 6 seeds.")
    if row.same_start is not None and len(row.arms) > 1:
        parts.append(
            "Initial weights and data of each seed are the same in all arms: checked by digests."
            if row.same_start
            else "Initial weights or data of a seed differ between arms: their differences are not paired."
        )
    for arm in row.arms:
        for run in arm.runs:
            for change in [change for record in run.events("resume") for change in record.get("changes", ())]:
                parts.append(f"{arm.label}, seed {run.seed}, went on with another configuration: {change}.")
    for arm in row.arms[1:]:
        if others := _beside_the_loss(row.arms[0].runs[0], arm.runs[0]):
            parts.append(f"Not the loss alone differs: {arm.label} has {'; '.join(others)}.")
    return " ".join(parts)


def _beside_the_loss(one: Run, other: Run) -> list[str]:
    """What else tells two runs' configurations apart."""
    changes = config_diff(one.config.to_dict(), other.config.to_dict())
    return [change for change in changes if not change.startswith(("loss.", "train.seed:"))]


def _summary(found: Summary | None) -> str:
    if found is None:
        return "-"
    return f"{found.mean:.1f}" if found.sd is None else f"{found.mean:.1f} ± {found.sd:.1f}"


def _difference(found: Difference | None) -> str:
    if found is None:
        return "-"
    text = _signed(found.mean)
    if found.low is not None and found.high is not None:
        text += f" [{_signed(found.low)}, {_signed(found.high)}]"
    if found.p_holm is not None:
        text += f" p {_p(found.p_holm)}"
    return text


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}"  # + 0.0: no "-0.0"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def correlation_table(row: RowStudy) -> Cells | None:
    """Rank correlation of score and IoU, and how many detections it was taken over."""
    rows = []
    for arm in row.arms:
        found = localization_means(row, arm)
        if found is not None and found["rank_correlation"] is not None:
            above = dict(zip(EDGES, found["share_above"], strict=False))
            shares = [f"{100 * above[iou]:.1f}" for iou in (0.7, 0.8, 0.9)]
            rows.append([arm.label, f"{found['rank_correlation']:.3f}", *shares, f"{found['detections']:.0f}"])
    if not rows:
        return None
    header = ["", "rank correlation", "IoU > 0.7, %", "> 0.8, %", "> 0.9, %", "detections"]
    note = "Detections with IoU from 0.5 on; means over seeds."
    return Cells(f"Score and localisation: {row.label} on {row.data}", header, rows, note)


def cost_table(row: RowStudy) -> Cells | None:
    """Time and memory of training, eager and fused, and time per image."""
    cost = row.cost
    if not cost:
        return None
    labels = {arm.name: arm.label for arm in row.arms}
    rows: list[list[str]] = [["training step"]]
    eager = cost["training"].get(row.arms[0].name, {}).get("eager")
    for arm, by_backend in cost["training"].items():
        for name, figure in by_backend.items():
            ratio = f"{figure['ms'] / eager['ms']:.2f}" if eager else ""
            text = f"{labels.get(arm, arm)}, {name}"
            rounds = f"{min(figure['rounds_ms']):.0f} to {max(figure['rounds_ms']):.0f}"
            rows.append([text, f"{figure['ms']:.1f}", rounds, ratio, f"{figure['peak_mib']:.0f}"])
    if cost["inference_ms"]:
        rows.append(["inference, one image"])
        first = next(iter(cost["inference_ms"].values()))
        for arm, ms in cost["inference_ms"].items():
            rows.append([labels.get(arm, arm), f"{ms:.1f}", "", f"{ms / first:.2f}", ""])
    size = " x ".join(map(str, cost["image_size"]))
    note = (
        f"Batches of {cost['batch_size']} images of {size}, {cost['device']}, threads: {cost['threads']}. A step is "
        f"forward, matching, loss, backward and optimiser; memory: {cost['memory']}, at its peak. Eager: the losses as "
        "plain PyTorch; fused: this package's kernels. Ratios to the first line of each part."
    )
    return Cells(f"Cost: {row.label} on {row.data}", ["", "ms", "medians of rounds", "ratio", "peak MiB"], rows, note)


def to_markdown(table: Cells) -> str:
    """As GitHub shows it."""
    width = len(table.header)
    lines = [f"**{table.title}**", "", _markdown_row(table.header), _markdown_row(["---"] + ["---:"] * (width - 1))]
    for row in table.rows:
        cells = row if len(row) == width else [f"*{row[0]}*", *[""] * (width - 1)]
        lines.append(_markdown_row(cells))
    return "\n".join([*lines, "", *([table.note, ""] if table.note else [])])


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def to_html(table: Cells) -> str:
    """A <figure> with the table in it."""
    escape = html.escape
    width = len(table.header)
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    body = []
    for row in table.rows:
        if len(row) == 1:
            body.append(f'<tr class="part"><th colspan="{width}" scope="colgroup">{escape(row[0])}</th></tr>')
        else:
            cells = "".join(f"<td>{_html_cell(cell)}</td>" for cell in row[1:])
            body.append(f'<tr><th scope="row">{escape(row[0])}</th>{cells}</tr>')
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    return (
        f'<figure class="table"><figcaption><h3>{escape(table.title)}</h3></figcaption><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{''.join(body)}</tbody></table></div>{note}</figure>"
    )


def _html_cell(text: str) -> str:
    """Interval and p of a difference are small print below it."""
    first, bracket, rest = text.partition(" [")
    if not bracket:
        return html.escape(text)
    interval, _, p = f"[{rest}".partition(" p ")
    small = [interval, f"p {p}"] if p else [interval]
    return html.escape(first) + "".join(f"<small>{html.escape(part)}</small>" for part in small)


def to_rich(table: Cells) -> Group:
    """For a terminal: each part a table of its own, so that headings need not fit into the first column."""
    parts: list[rich.table.Table] = []

    def begin(title: str) -> None:
        shown = rich.table.Table(title=title, title_justify="left")
        for index, name in enumerate(table.header):
            shown.add_column(name, justify="right" if index else "left", no_wrap=not index)
        parts.append(shown)

    if table.rows and len(table.rows[0]) > 1:
        begin(table.title)
    for row in table.rows:
        if len(row) == 1:
            begin(f"{table.title}: {row[0]}" if not parts else row[0])
        else:
            parts[-1].add_row(*(cell.replace(" [", "\n[").replace("] p", "]\np") for cell in row))
    return Group(*parts, *([Text(table.note)] if table.note else []))
