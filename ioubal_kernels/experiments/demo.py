"""`ioubal demo`: both losses on the synthetic set, same seed and data order, one table and one page."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from ..detection.data import make_synthetic
from ..detection.errors import UsageError
from ..detection.presets import preset
from ..detection.progress import Reporter
from ..detection.rundir import RunLock, prepare_run_folder
from ..detection.train import train
from .options import check_options
from .page import tables_of, write_page
from .study import study_of_runs
from .tables import to_rich

TRAIN_IMAGES, VAL_IMAGES, IMAGE_SIZE, CLASSES = 1500, 200, 128, 3
ARMS = ("baseline", "both")
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
        folder: gets data/, baseline/, both/, report.html. Runs of an earlier demo in it are replaced.
        seed: of both trainings; the synthetic set is always the same.
        changes: (key, value) over the preset "demo".
        reporter: where messages go.

    Raises:
        UsageError: `folder` holds something else than a demo; a change has no effect.
        OutputError: it cannot be written.
    """
    reporter = reporter or Reporter()
    began = time.monotonic()
    config = preset("demo")
    config.set("train.seed", seed)
    config.set_by_hand(changes or [])
    config.validate()
    arms = {loss: config.copy() for loss in ARMS}
    for loss, arm in arms.items():
        arm.set_loss(loss)
    check_options(dict(changes or []), list(arms.values()), {"data.path": "the demo makes its own data"})
    _clear_earlier_demo(folder)
    prepare_run_folder(folder)
    data = _make_data(folder, reporter)
    for loss, arm in arms.items():
        arm.set("data.path", data)
        train(arm, folder / loss, reporter=reporter)
    study = study_of_runs([folder / loss for loss in ARMS], title="IoU-balanced losses: the demo on synthetic images")
    for table in tables_of(study):
        reporter.show(to_rich(table))
    page = write_page(study, folder / "report.html", notes=[NOTE])
    reporter.info(f"report: {page}   ({time.monotonic() - began:.0f} s)")
    return page


def _clear_earlier_demo(folder: Path) -> None:
    """Remove the two runs of an earlier demo; refuse a folder that holds anything else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    # The pictures beside the page are an earlier version's.
    ours = {"data", "report.html", "loss.png", "ap.png", "ap_by_threshold.png", "detections.png", *ARMS}
    foreign = sorted(p.name for p in folder.iterdir() if p.name not in ours)
    if foreign:
        raise UsageError(
            f"{folder} holds other files than a demo's ({', '.join(foreign[:5])}): choose another folder with -o"
        )
    for name in ARMS:
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
