"""Commands that compare losses: demo, reproduce, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app, guarded


@app.command("demo")
@guarded
def demo_command(
    out: Annotated[str, typer.Option("--out", "-o", help="The demo's folder.")] = "runs/demo",
    seed: Annotated[int, typer.Option(help="Of initialisation, order and augmentation.", min=0)] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
) -> None:
    """Make the synthetic set, train the baseline and the IoU-balanced model, compare them: REPORT in
    OUT/report.html.
    """
    from ..detection.config import parse_assignment
    from ..experiments.demo import run_demo

    run_demo(Path(out), seed=seed, changes=[parse_assignment(a) for a in set_ or []])


def _names(text: str | None) -> list[str] | None:
    """A list of names between commas."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


@app.command("reproduce")
@guarded
def reproduce_command(
    table: Annotated[str, typer.Argument(metavar="TABLE", help="The paper's: table1 .. table7.")],
    preset: Annotated[
        str, typer.Option(help="cpu: minutes a training; gpu: more seeds and images; paper: the full schedules.")
    ] = "cpu",
    out: Annotated[str | None, typer.Option("--out", "-o", help="Its folder. (default: runs/TABLE-PRESET)")] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Dataset folder: the paper's (paper), photographs (gpu), yours (cpu).")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Trainings of each arm, instead of the preset's number.")] = None,
    rows: Annotated[str | None, typer.Option(help="Only these detectors of the table: NAME,NAME.")] = None,
    arms: Annotated[str | None, typer.Option(help="Only these losses: NAME,NAME; the first one stays.")] = None,
    backbones: Annotated[
        str | None, typer.Option(metavar="DIR", help="paper: folder of ImageNet weights (docs/detectors.md).")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value over all trainings; may be repeated.")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="Trainings at a time. (default: by the machine)")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each. (default: by the machine)")] = None,
    time_budget: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Stop in time; the same command continues.")
    ] = None,
    results_split: Annotated[
        str | None, typer.Option(metavar="SPLIT", help="Also write detections on this unlabelled split (test-dev).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and its expected time.")] = False,
) -> None:
    """Train what is behind one of the paper's tables, with several seeds: results.json, a table, plots, a page."""
    from ..detection.config import parse_assignment
    from ..detection.progress import Reporter
    from ..detection.provenance import command_line
    from ..experiments.plans import make_plan

    plan = make_plan(
        table,
        preset,
        data=data,
        seeds=seeds,
        rows=_names(rows),
        arms=_names(arms),
        backbones=backbones,
        options=dict(parse_assignment(a) for a in set_ or []),
    )
    folder = Path(out) if out is not None else Path("runs", f"{table}-{preset}")
    reporter = Reporter()
    if dry_run:
        from ..experiments.expected import show_plan

        show_plan(plan, folder, processes, threads, reporter)
        return
    from ..experiments.reproduce import reproduce

    reproduce(
        plan,
        folder,
        processes=processes,
        threads=threads,
        time_budget=time_budget,
        results_split=results_split,
        command=command_line(),
        reporter=reporter,
    )


@app.command("report")
@guarded
def report_command(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN ...", help="Runs' folders, or one reproduction's (runs/table2-cpu).")
    ],
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="FILE.html", help="(default: report.html in the one folder)")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
) -> None:
    """Write one HTML page of finished runs: tables, curves, detections beside the ground truth, commands, versions. It
    needs no network and no other file.
    """
    from ..detection.progress import Reporter
    from ..experiments.report import report

    reporter = Reporter()
    page = report([Path(run) for run in runs], None if out is None else Path(out), title=title, reporter=reporter)
    reporter.info(f"report: {page}")
