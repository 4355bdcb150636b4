"""The commands of `ioubal`: options in, one clear error out. Heavy modules are imported by the command that needs
them.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._version import __version__
from .errors import TrainerError

if TYPE_CHECKING:
    from .config import Config

CONTEXT = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    name="ioubal",
    help="Train and compare detectors with IoU-balanced losses.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
)
data_app = typer.Typer(help="Make and check datasets.", no_args_is_help=True, context_settings=CONTEXT)
app.add_typer(data_app, name="data")


def run(arguments: Sequence[str]) -> int:
    """Parse and run; returns the exit code."""
    try:
        app(list(arguments), prog_name="ioubal")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn exceptions into one message on stderr and the exit code; IOUBAL_TRACEBACK=1 shows the traceback instead."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        warnings.showwarning = _show_warning
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except (typer.Exit, typer.BadParameter):
            raise
        except BrokenPipeError:
            # Whoever read the output has gone. Python would complain once more when it flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(3) from None
        except BaseException as error:
            if os.environ.get("IOUBAL_TRACEBACK", "0") not in ("", "0"):
                raise
            code, message = _explain(error)
            print(f"error: {message}", file=sys.stderr)
            raise typer.Exit(code) from None

    return wrapper


def _explain(error: BaseException) -> tuple[int, str]:
    """Exit code and message of an exception."""
    from .data import DataError

    if isinstance(error, TrainerError):
        return error.exit_code, str(error)
    if isinstance(error, DataError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, OSError):
        return 3, f"{error.filename or 'input/output'}: {error.strerror or error}"
    hint = "(IOUBAL_TRACEBACK=1 shows where)"
    return 1, f"{type(error).__name__}: {error} {hint}"


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _version(value: bool) -> None:
    if value:
        print(f"ioubal {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command("doctor")
@guarded
def doctor_command() -> None:
    """Show what this installation has and lacks."""
    from .. import doctor

    raise typer.Exit(doctor.main())


@app.command("bench", help="Measure the losses: list, run, compare, report, train-step.")
def bench_command() -> None:
    """In the list of commands only: the benchmark is a layer above this one, and the program calls it before."""


@app.command("train")
@guarded
def train_command(
    data: Annotated[
        str | None, typer.Option("--data", help="Dataset folder: COCO JSON, Pascal VOC, Cityscapes, synthetic.")
    ] = None,
    config: Annotated[str | None, typer.Option("--config", "-c", help="Preset (see configs) or FILE.yaml.")] = None,
    loss: Annotated[str | None, typer.Option("--loss", help="baseline, cls, loc or both.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="The run's folder. [default: runs/DATA-LOSS]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder of -o.")] = False,
    allow_config_change: Annotated[
        bool, typer.Option("--allow-config-change", help="Resume although the configuration differs.")
    ] = False,
    amp: Annotated[str | None, typer.Option("--amp", help="auto, off or bf16.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of initialisation, order and augmentation.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Loader processes.")] = None,
    init_from: Annotated[
        str | None, typer.Option("--init-from", metavar="RUN|CKPT", help="Start from these weights.")
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Accept a full-size detector without pretrained weights.")
    ] = False,
) -> None:
    """Train a detector and evaluate it. The defaults learn a small dataset from scratch within minutes on a CPU."""
    from .config import parse_assignment
    from .errors import UsageError
    from .presets import load_config
    from .processes import launched_as
    from .progress import Reporter
    from .rundir import CONFIG_FILE

    if resume and out is None:
        raise UsageError("--resume: name the run's folder with -o")
    if resume and not Path(out).is_dir():
        raise UsageError(f"--resume: {out} is not a folder")
    saved_config = Path(out, CONFIG_FILE) if resume else None
    if config is not None or saved_config is None or not saved_config.is_file():
        settings = load_config(config or "retinanet_tiny")
    else:
        settings = load_config(str(saved_config))
    if data is not None:
        settings.set("data.path", data)
    if loss is not None:
        settings.set_loss(loss)
    given = {
        "train.amp": amp, "train.device": device, "train.seed": seed, "data.workers": workers,
        "model.init_from": init_from, "model.from_scratch": from_scratch or None,
    }  # fmt: skip
    for key, value in given.items():
        if value is not None:
            settings.set(key, value)
    for assignment in set_ or []:
        settings.set(*parse_assignment(assignment))
    settings.validate()
    from .train import train

    rank, processes, _ = launched_as()
    if out is None and processes > 1:
        raise UsageError("-o: with several processes name the run's folder: all must use the same")
    reporter = Reporter(quiet=rank > 0)
    folder = Path(out) if out is not None else _default_folder(settings)
    result = train(settings, folder, resume=resume, allow_config_change=allow_config_change, reporter=reporter)
    if result.metrics is not None:
        from .report import metrics_table

        reporter.show(metrics_table({folder.name: result.metrics}))
    reporter.info(f"{result.steps} steps in {result.seconds:.0f} s; everything is in {folder}")


def _default_folder(settings: Config) -> Path:
    """runs/DATA-LOSS, with a number when that exists."""
    stem = f"{Path(settings.data.path or 'run').resolve().name}-{settings.loss.label()}"
    folder, number = Path("runs", stem), 1
    while folder.exists():
        number += 1
        folder = Path("runs", f"{stem}-{number}")
    return folder


def _changes(assignments: list[str] | None, amp: str, device: str, workers: int | None) -> list[tuple[str, Any]]:
    """(key, value) over a checkpoint's configuration: --set, and the options of what uses a trained model."""
    from .config import parse_assignment

    changes = [parse_assignment(a) for a in assignments or []]
    changes += [("train.amp", amp), ("train.device", device)]
    return changes if workers is None else [*changes, ("data.workers", workers)]


@app.command("eval")
@guarded
def eval_command(
    model: Annotated[str, typer.Argument(metavar="RUN|CKPT", help="A run's folder or one checkpoint file.")],
    data: Annotated[str, typer.Option("--data", help="Dataset folder.")],
    split: Annotated[
        str | None, typer.Option("--split", help="Which split. [default: found from what is on disk]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON and nothing else.")] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    amp: Annotated[str, typer.Option("--amp", help="auto, off or bf16.")] = "auto",
    workers: Annotated[int | None, typer.Option("--workers", help="Loader processes.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="inference.key=value; may be repeated.")] = None,
    save_results: Annotated[
        str | None, typer.Option("--save-results", metavar="FILE.json", help="Write the detections as COCO results.")
    ] = None,
    voc07: Annotated[
        bool | None, typer.Option("--voc07/--no-voc07", help="VOC 2007's metric too. [default: for Pascal VOC]")
    ] = None,
) -> None:
    """Evaluate a trained model: AP by threshold, size and class; on a split without annotations, its detections."""
    from .predict import evaluate_checkpoint
    from .progress import Reporter

    reporter = Reporter(quiet=as_json)
    changes = _changes(set_, amp, device, workers)
    metrics = evaluate_checkpoint(model, data, split, changes, reporter, save_results=save_results, voc07=voc07)
    if as_json:
        import json

        print(json.dumps(metrics, indent=1, allow_nan=False))
        return
    if "AP" not in metrics:
        return
    from .report import class_table, metrics_table, voc_table

    reporter.show(metrics_table({Path(model).name: metrics}))
    if "VOC07" in metrics:
        reporter.show(voc_table({Path(model).name: metrics}))
    reporter.show(class_table(metrics))


@app.command("predict")
@guarded
def predict_command(
    model: Annotated[str, typer.Argument(metavar="RUN|CKPT", help="A run's folder or one checkpoint file.")],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE|DIR ...", help="Image files, folders of images.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Where pictures and predictions.json go.")],
    score: Annotated[float, typer.Option("--score", help="Smallest score shown.")] = 0.3,
    as_json: Annotated[bool, typer.Option("--json", help="Print the detections as JSON and nothing else.")] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    amp: Annotated[str, typer.Option("--amp", help="auto, off or bf16.")] = "auto",
    workers: Annotated[int | None, typer.Option("--workers", help="Loader processes.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="inference.key=value; may be repeated.")] = None,
) -> None:
    """Detect on images: pictures with the boxes drawn, and their numbers as JSON."""
    from .predict_files import predict_files
    from .progress import Reporter

    reporter = Reporter(quiet=as_json)
    changes = _changes(set_, amp, device, workers)
    result = predict_files(model, images, Path(out), score=score, changes=changes, reporter=reporter)
    if as_json:
        import json

        print(json.dumps(result, indent=1, allow_nan=False))


@app.command("export")
@guarded
def export_command(
    model: Annotated[str, typer.Argument(metavar="RUN|CKPT", help="A run's folder or one checkpoint file.")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="The file of weights.")],
) -> None:
    """Write the evaluated weights for stock torchvision, with class names and configuration, into one file."""
    from .export import export_weights
    from .progress import Reporter

    content = export_weights(model, Path(out))
    Reporter().info(f"{content['model']}, step {content['step']}, {len(content['classes'])} classes: {out}")


@app.command("configs")
@guarded
def configs_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this one as YAML.")] = None,
) -> None:
    """List the named configurations, or print one as YAML to start a file from."""
    from .presets import PRESETS, preset

    if name is not None:
        print(preset(name).to_yaml(), end="")
        return
    for key, (text, _) in PRESETS.items():
        print(f"{key:30} {text}")


@data_app.command("synth")
@guarded
def synth_command(
    out: Annotated[str, typer.Option("--out", "-o", help="Where the set goes.")],
    train: Annotated[int, typer.Option(help="Training images.", min=1)] = 1500,
    val: Annotated[int, typer.Option(help="Validation images.", min=1)] = 300,
    size: Annotated[int, typer.Option(help="Edge of an image in pixels.", min=32, max=4096)] = 128,
    classes: Annotated[int, typer.Option(help="Number of classes.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="The same seed gives the same images.", min=0)] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes. [default: all cores]", min=0)] = None,
) -> None:
    """Make the synthetic set: image files and COCO JSON."""
    from .data import make_synthetic
    from .progress import Reporter
    from .rundir import prepare_run_folder

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
    from .data import check_dataset

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
    from .data import convert_dataset
    from .progress import Reporter

    splits = tuple(split) if split else None
    result = convert_dataset(root, out, kind, images=images, splits=splits, allow_symlinks=allow_symlinks)
    reporter = Reporter()
    for name, (count, boxes) in result.items():
        reporter.info(f"{name}: {count} images, {boxes} boxes")


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
    from .config import parse_assignment
    from .demo import run_demo

    run_demo(Path(out), seed=seed, changes=[parse_assignment(a) for a in set_ or []])
