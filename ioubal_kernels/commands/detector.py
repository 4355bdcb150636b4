"""Commands around one detector: train, eval, predict, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import app, guarded

if TYPE_CHECKING:
    from ..detection.config import Config


@app.command("train")
@guarded
def train_command(
    data: Annotated[
        str | None, typer.Option("--data", help="Dataset folder: COCO JSON, Pascal VOC, Cityscapes, synthetic.")
    ] = None,
    config: Annotated[str | None, typer.Option("--config", "-c", help="Preset (see configs) or FILE.yaml.")] = None,
    loss: Annotated[str | None, typer.Option("--loss", help="baseline, cls, loc or both.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="The run's folder. (default: runs/DATA-LOSS)")] = None,
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
    from ..detection.architectures import MODELS
    from ..detection.config import parse_assignment
    from ..detection.errors import UsageError
    from ..detection.presets import load_config, recipe_of
    from ..detection.processes import launched_as
    from ..detection.progress import Reporter
    from ..detection.rundir import CONFIG_FILE
    from ..detection.unused_keys import refuse_unused

    if resume and out is None:
        raise UsageError("--resume: name the run's folder with -o")
    if resume and not Path(out).is_dir():
        raise UsageError(f"--resume: {out} is not a folder")
    saved_config = Path(out, CONFIG_FILE) if resume else None
    if config is None:
        config = str(saved_config) if saved_config is not None and saved_config.is_file() else "retinanet_tiny"
    settings = load_config(config)
    recipe = recipe_of(config, settings)
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
    changes = [parse_assignment(assignment) for assignment in set_ or []]
    settings.set_by_hand(changes)
    settings.validate()
    refuse_unused((key for key, _ in changes), settings)
    from ..detection.train import train

    rank, processes, _ = launched_as()
    if out is None and processes > 1:
        raise UsageError("-o: with several processes name the run's folder: all must use the same")
    reporter = Reporter(quiet=rank > 0)
    if MODELS[settings.model.name].family != recipe:
        reporter.warn(
            f"model.name={settings.model.name} is trained with the recipe of another detector ({recipe}); its own comes"
            f" with -c {settings.model.name} or one of `ioubal configs`"
        )
    folder = Path(out) if out is not None else _default_folder(settings)
    result = train(settings, folder, resume=resume, allow_config_change=allow_config_change, reporter=reporter)
    if result.metrics is not None:
        from ..detection.tables import metrics_table

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


# What --set may change of a trained model's configuration besides inference.*: how images are found and read.
_READING = (
    "data.format", "data.image_size", "data.keep_ratio", "data.short_side", "data.long_side", "data.mean", "data.std",
    "data.workers", "data.on_bad_image", "data.bad_image_limit", "data.allow_symlinks", "data.timeout",
)  # fmt: skip


def _changes(
    assignments: list[str] | None,
    amp: str | None,
    device: str,
    workers: int | None,
    idle: tuple[str, ...] = (),
) -> list[tuple[str, Any]]:
    """(key, value) over a checkpoint's configuration: --set, and the options of what uses a trained model. `idle`: what
    the command does not follow.
    """
    from ..detection.config import parse_assignment
    from ..detection.errors import UsageError

    changes = [parse_assignment(a) for a in assignments or []]
    for key, _ in changes:
        if key in idle:
            raise UsageError(f"--set: {key} has no effect here")
        if not key.startswith("inference.") and key not in _READING:
            raise UsageError(
                f"--set: {key} has no effect on a trained model; what has: inference.*, {', '.join(_READING)}"
                " (and --device, --amp, --split)"
            )
    given = {"train.amp": amp, "train.device": device, "data.workers": workers}
    return changes + [(key, value) for key, value in given.items() if value is not None]


@app.command("eval")
@guarded
def eval_command(
    model: Annotated[str, typer.Argument(metavar="RUN|CKPT", help="A run's folder or one checkpoint file.")],
    data: Annotated[str, typer.Option("--data", help="Dataset folder.")],
    split: Annotated[
        str | None, typer.Option("--split", help="Which split. (default: the run's on its data, else found on disk)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON and nothing else.")] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    amp: Annotated[str | None, typer.Option("--amp", help="auto, off or bf16. (default: the run's)")] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Loader processes.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="inference.key=value or one of how images are read.")
    ] = None,
    save_results: Annotated[
        str | None, typer.Option("--save-results", metavar="FILE.json", help="Write the detections as COCO results.")
    ] = None,
    voc07: Annotated[
        bool | None, typer.Option("--voc07/--no-voc07", help="VOC 2007's metric too. (default: for Pascal VOC)")
    ] = None,
) -> None:
    """Evaluate a trained model: AP by threshold, size and class; on a split without annotations, its detections."""
    from ..detection.predict import evaluate_checkpoint
    from ..detection.progress import Reporter

    reporter = Reporter(quiet=as_json)
    changes = _changes(set_, amp, device, workers)
    metrics = evaluate_checkpoint(model, data, split, changes, reporter, save_results=save_results, voc07=voc07)
    if as_json:
        import json

        print(json.dumps(metrics, indent=1, allow_nan=False))
        return
    if "AP" not in metrics:
        return
    from ..detection.tables import class_table, metrics_table, voc_table

    name = Path(model).resolve().name
    reporter.show(metrics_table({name: metrics}))
    if "VOC07" in metrics:
        reporter.show(voc_table({name: metrics}))
    reporter.show(class_table(metrics))


_IDLE_IN_PREDICT = ("inference.score_threshold", "data.format")  # --score; there is no data set to look for


@app.command("predict")
@guarded
def predict_command(
    model: Annotated[str, typer.Argument(metavar="RUN|CKPT", help="A run's folder or one checkpoint file.")],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE|DIR ...", help="Image files, folders of images.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Where pictures and predictions.json go.")],
    score: Annotated[float, typer.Option("--score", help="Smallest score shown.")] = 0.3,
    as_json: Annotated[bool, typer.Option("--json", help="Print the detections as JSON and nothing else.")] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    amp: Annotated[str | None, typer.Option("--amp", help="auto, off or bf16. (default: the run's)")] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Loader processes.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="inference.key=value or one of how images are read.")
    ] = None,
) -> None:
    """Detect on images: pictures with the boxes drawn, and their numbers as JSON."""
    from ..detection.predict_files import predict_files
    from ..detection.progress import Reporter

    reporter = Reporter(quiet=as_json)
    changes = _changes(set_, amp, device, workers, _IDLE_IN_PREDICT)
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
    from ..detection.export import export_weights
    from ..detection.progress import Reporter

    content = export_weights(model, Path(out))
    Reporter().info(f"{content['model']}, step {content['step']}, {len(content['classes'])} classes: {out}")
