"""Commands around data sets: data synth, check, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..detection.limits import SYNTHETIC_EDGE
from .app import data_app, guarded


@data_app.command("synth")
@guarded
def synth_command(
    out: Annotated[str, typer.Option("--out", "-o", help="Where the set goes.")],
    train: Annotated[int, typer.Option(help="Training images.", min=1)] = 1500,
    val: Annotated[int, typer.Option(help="Validation images.", min=1)] = 300,
    size: Annotated[
        int, typer.Option(help="Edge of an image in pixels.", min=SYNTHETIC_EDGE[0], max=SYNTHETIC_EDGE[1])
    ] = 128,
    classes: Annotated[int, typer.Option(help="Number of classes.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="The same seed gives the same images.", min=0)] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes. (default: all cores)", min=0)] = None,
) -> None:
    """Make the synthetic set: image files and COCO JSON."""
    from ..detection.data import make_synthetic
    from ..detection.progress import Reporter
    from ..detection.rundir import prepare_run_folder

    reporter = Reporter()
    prepare_run_folder(Path(out))
    with reporter.task("make images", train + val) as task:
        path = make_synthetic(
            out, train, val, size, classes, seed, workers, progress=lambda done, total: task.advance_to(done)
        )
    reporter.info(f"{train} training and {val} validation images in {path}")


@data_app.command("check")
@guarded
def check_command(
    root: Annotated[str, typer.Argument(metavar="DIR", help="Dataset folder.")],
    kind: Annotated[str, typer.Option("--format", help="auto, coco, voc or cityscapes.")] = "auto",
    split: Annotated[list[str] | None, typer.Option("--split", help="Only this split; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print findings and statistics as JSON.")] = False,
    workers: Annotated[int | None, typer.Option("--workers", help="Processes.")] = None,
) -> None:
    """Check a dataset in full: annotations of every split, every image decoded. Exit code 2 when something is wrong."""
    from ..detection.data import check_dataset

    report = check_dataset(root, kind, splits=tuple(split) if split else None, workers=workers)
    if as_json:
        import json

        findings = {"ok": report.ok, "problems": report.problems, "warnings": report.warnings, "stats": report.stats}
        print(json.dumps(findings, indent=1))
    else:
        print(report.text)
    raise typer.Exit(0 if report.ok else 2)


@data_app.command("convert")
@guarded
def convert_command(
    kind: Annotated[str, typer.Argument(metavar="voc|cityscapes", help="What is in DIR.")],
    root: Annotated[str, typer.Argument(metavar="DIR", help="Dataset folder.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Where the COCO set goes; must not exist or be empty.")],
    images: Annotated[
        str,
        typer.Option(help="copy; link: hard links where possible, else copies; none: paths relative to DIR."),
    ] = "link",
    split: Annotated[list[str] | None, typer.Option("--split", help="Only this split; may be repeated.")] = None,
    allow_symlinks: Annotated[bool, typer.Option(help="Image files may be links to outside DIR.")] = False,
) -> None:
    """Write a Pascal VOC or Cityscapes folder as COCO JSON, with the same boxes and classes."""
    from ..detection.data import convert_dataset
    from ..detection.progress import Reporter

    splits = tuple(split) if split else None
    result = convert_dataset(root, out, kind, images=images, splits=splits, allow_symlinks=allow_symlinks)
    reporter = Reporter()
    for name, (count, boxes) in result.items():
        reporter.info(f"{name}: {count} images, {boxes} boxes")
