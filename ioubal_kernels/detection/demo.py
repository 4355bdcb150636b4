"""`ioubal demo`: both losses on the synthetic set, same seed and data order, one table and one page."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from .checkpoint import find_checkpoint
from .config import Config
from .data import Dataset, load_pair, make_synthetic
from .errors import UsageError
from .predict import make_eval_loader, model_from_state, predict_dataset
from .presets import preset
from .progress import Reporter
from .report import RunSummary, choose_images, metrics_table, write_report
from .resources import resolve_amp, resolve_device
from .rundir import RunLock, prepare_run_folder
from .train import TrainResult, train

TRAIN_IMAGES, VAL_IMAGES, IMAGE_SIZE, CLASSES = 1500, 200, 128, 3
ARMS = (("baseline", "baseline"), ("IoU-balanced", "both"))
NOTE = (
    "One training each of a 1 M parameter detector from scratch, with the same initialisation and the same images in "
    "the same order. Another seed moves AP by one or two points, so a difference of this size in one pair of runs is "
    "no evidence for either loss."
)


def run_demo(
    folder: Path, *, seed: int = 0, changes: list[tuple[str, Any]] | None = None, reporter: Reporter | None = None
) -> Path:
    """Make the data, train the baseline and the IoU-balanced model, compare. Returns the path of report.html.

    Args:
        folder: gets data/, baseline/, both/, report.html and its PNGs. Runs of an earlier demo in it are replaced.
        seed: of both trainings; the synthetic set is always the same.
        changes: (key, value) over the preset "demo".
        reporter: where messages go.

    Raises:
        UsageError: `folder` holds something else than a demo.
        OutputError: it cannot be written.
    """
    reporter = reporter or Reporter()
    began = time.monotonic()
    config = preset("demo")
    config.set("train.seed", seed)
    for key, value in changes or []:
        config.set(key, value)
    config.validate()
    _clear_earlier_demo(folder)
    prepare_run_folder(folder)
    data = _make_data(folder, reporter)
    config.set("data.path", data)
    results: dict[str, TrainResult] = {}
    for name, loss in ARMS:
        arm = _copy(config)
        arm.set_loss(loss)
        results[name] = train(arm, folder / loss, reporter=reporter)
    summaries, dataset = _summaries(results, config)
    reporter.show(metrics_table({s.name: s.metrics for s in summaries}, f"AP in per cent on {len(dataset)} images"))
    page = write_report(
        folder, summaries, dataset, title="IoU-balanced losses: the demo on synthetic images", notes=[NOTE]
    )
    reporter.info(f"report: {page}   ({time.monotonic() - began:.0f} s)")
    return page


def _copy(config: Config) -> Config:
    copied = Config()
    copied.update(config.to_dict(), "demo")
    return copied


def _clear_earlier_demo(folder: Path) -> None:
    """Remove the two runs of an earlier demo; refuse a folder that holds anything else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    ours = {"data", "report.html", "loss.png", "ap.png", "ap_by_threshold.png", "detections.png", *(a for _, a in ARMS)}
    foreign = sorted(p.name for p in folder.iterdir() if p.name not in ours)
    if foreign:
        raise UsageError(
            f"{folder} holds other files than a demo's ({', '.join(foreign[:5])}): choose another folder with -o"
        )
    for _, name in ARMS:
        run = folder / name
        if run.exists():
            with RunLock(run):  # not under the hands of a demo that is still running
                pass
            shutil.rmtree(run)


def _make_data(folder: Path, reporter: Reporter) -> str:
    total = TRAIN_IMAGES + VAL_IMAGES
    with reporter.task("make images", total) as task:
        return make_synthetic(
            folder / "data",
            train=TRAIN_IMAGES,
            val=VAL_IMAGES,
            size=IMAGE_SIZE,
            classes=CLASSES,
            seed=0,
            progress=lambda done, _: task.advance_to(done),
        )


def _summaries(results: dict[str, TrainResult], config: Config) -> tuple[list[RunSummary], Dataset]:
    """The runs for the report, with detections of the images that it draws."""
    dataset = load_pair(config.data.path).evaluation
    drawn = set(choose_images(dataset, 4))
    subset = replace(dataset, records=[r for r in dataset.records if r.id in drawn])
    device = resolve_device(config.train.device)
    amp = resolve_amp(config.train.amp, device)
    summaries = []
    for name, result in results.items():
        path, state = find_checkpoint(result.run)
        trained = model_from_state(state, path, device)
        loader = make_eval_loader(config, subset, 0, "none")
        found = predict_dataset(trained.model, loader, config.inference, device, amp)
        facts = {"w_loc": f"{result.w_loc:.2f}", "minutes": f"{result.seconds / 60:.1f}"}
        summaries.append(RunSummary(name, result.run, result.metrics, facts, {d.image_id: d for d in found}))
    return summaries, dataset
