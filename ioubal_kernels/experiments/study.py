"""Finished runs, grouped for comparison: rows (a detector on a data set) of arms (a loss) of runs (a seed each)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..detection.config import Config, LossConfig, config_diff
from ..detection.data import DataError, Dataset, DatasetPair, load_pair
from ..detection.errors import UsageError
from ..detection.evaluate import THRESHOLDS, ImageDetections
from ..detection.presets import load_config
from ..detection.results import DETECTIONS_FILE, load_detections
from ..detection.rundir import CONFIG_FILE, METRICS_FILE, data_on_record, read_log
from .grid import BASELINE, BOTH, CLS, LOC, LONG
from .localization import Localization, localization
from .plans import Job, Plan
from .runner import is_finished

ARM_LABELS = {arm.name: arm.label for arm in (BASELINE, CLS, LOC, BOTH)}


@dataclass
class Run:
    """One finished training.

    Attributes:
        folder: where it is.
        config: what it was trained with.
        metrics: of its last evaluation.
        log: its records, see `rundir.read_log`.
    """

    folder: Path
    config: Config
    metrics: dict[str, Any]
    log: list[dict[str, Any]]

    @property
    def seed(self) -> int:
        return self.config.train.seed

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log's records of a kind: "step", "eval"."""
        return [record for record in self.log if record["event"] == name]

    @property
    def start(self) -> dict[str, Any]:
        """What the run noted when it began: device, versions, the command."""
        return next(iter(self.events("start")), {})

    @property
    def eval_data(self) -> str | None:
        """The fingerprint of what its metrics were measured on; None if that is not on record."""
        return data_on_record(self.log).get("eval_data")

    @property
    def end(self) -> dict[str, Any]:
        return next(iter(reversed(self.events("end"))), {})

    @property
    def step_seconds(self) -> float | None:
        """Median time of a step in seconds, loading included, between the lines of the log."""
        steps = self.events("step")
        rates = sorted(
            (after["seconds"] - before["seconds"]) / (after["step"] - before["step"])
            for before, after in zip(steps, steps[1:])
            if after["step"] > before["step"]
        )
        return rates[len(rates) // 2] if rates else None

    @cached_property
    def detections(self) -> list[ImageDetections] | None:
        """Of the last evaluation; None for a run of an earlier version, which kept none."""
        file = self.folder / DETECTIONS_FILE
        return load_detections(file) if file.is_file() else None


@dataclass
class ArmRuns:
    """The runs of one loss, by seed."""

    name: str
    label: str
    runs: list[Run]

    @property
    def by_seed(self) -> dict[int, Run]:
        return {run.seed: run for run in self.runs}


@dataclass
class RowStudy:
    """A detector on a data set, with every loss that it was trained with; the first arm is the one to compare with.

    Attributes:
        name, label: of the detector.
        block: the data set's name in folders; None for runs named by hand.
        data: the data set in words.
        arms: those with finished runs.
        cost: what `cost.measure` found, or None.
        data_path: where the data set is, if not where it was for the training.
    """

    name: str
    label: str
    block: str | None
    data: str
    arms: list[ArmRuns]
    cost: dict[str, Any] | None = None
    data_path: str | None = None

    @property
    def compared(self) -> list[ArmRuns]:
        """The first arm and the method (the arm "both", else the last one); one where they are the same."""
        method = self.arm("both") or self.arms[-1]
        return [self.arms[0]] if method is self.arms[0] else [self.arms[0], method]

    def arm(self, name: str) -> ArmRuns | None:
        return next((arm for arm in self.arms if arm.name == name), None)

    @property
    def first(self) -> Run:
        return self.arms[0].runs[0]

    @property
    def dataset(self) -> Dataset | None:
        """The evaluation split; None where it cannot be read any more, see `dataset_problem`."""
        found = self._loaded
        return None if isinstance(found, str) else found

    @property
    def dataset_problem(self) -> str | None:
        """Why `dataset` is None."""
        found = self._loaded
        return found if isinstance(found, str) else None

    def load_data(self) -> DatasetPair:
        """Both splits.

        Raises:
            DataError: they cannot be read (any more).
        """
        data = self.first.config.data
        place = self.data_path or data.path or ""
        return load_pair(place, data.train_split, data.eval_split, data.format, allow_symlinks=data.allow_symlinks)

    @cached_property
    def _loaded(self) -> Dataset | str:
        try:
            pair = self.load_data()
            found = pair.fingerprints()
            if self.first.start.get("data", found["data"]) != found["data"]:
                return f"{pair.training.root} is not the data set that {self.first.folder} was trained on"
            if self.first.eval_data not in (None, found["eval_data"]):
                return f"{pair.training.root} is not the data set that {self.first.folder} was evaluated on"
            return pair.evaluation or f"{pair.training.root} has no evaluation split"
        except (DataError, OSError) as error:
            return str(error).splitlines()[0]

    @cached_property
    def localizations(self) -> dict[str, dict[int, Localization]]:
        """By arm and seed, of the runs that kept their detections."""
        if self.dataset is None:
            return {arm.name: {} for arm in self.arms}
        known = {record.id for record in self.dataset.records}
        return {
            arm.name: {
                run.seed: localization(self.dataset, run.detections)
                for run in arm.runs
                if run.detections is not None and all(found.image_id in known for found in run.detections)
            }
            for arm in self.arms
        }

    @property
    def same_start(self) -> bool | None:
        """Whether the arms of each seed began with the same weights on the same data; None if that is not on record."""
        starts: dict[int, list[tuple[Any, Any]]] = {}
        for arm in self.arms:
            for run in arm.runs:
                if "weights" not in run.start:
                    return None
                starts.setdefault(run.seed, []).append((run.start["weights"], run.start["data"]))
        shared = [found for found in starts.values() if len(found) > 1]
        return all(len(set(found)) == 1 for found in shared) if shared else None


@dataclass
class Study:
    """Everything that a results file and a page are made of.

    Attributes:
        title: in words.
        rows: see `RowStudy`.
        metrics: that are shown.
        table, preset: of the plan; None for runs named by hand.
        command: what made the runs, or None.
        planned: number of trainings of the plan, None without one.
    """

    title: str
    rows: list[RowStudy]
    metrics: Sequence[str] = LONG
    table: str | None = None
    preset: str | None = None
    command: str | None = None
    planned: int | None = None

    @property
    def runs(self) -> list[Run]:
        return [run for row in self.rows for arm in row.arms for run in arm.runs]


VOC07_TABLE = "table5"  # the one that the paper gives in VOC 2007's metric


def load_run(folder: Path, table: str | None = None) -> Run:
    """A finished run.

    Args:
        table: that it was trained for; in Table 5 VOC 2007's metrics take the place of COCO's of the same names.

    Raises:
        UsageError: no run is there, it is not finished, or was not evaluated.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise UsageError(f"{folder}: expected the folder of a run or of a reproduction, found no {CONFIG_FILE}")
    if not is_finished(folder):
        if any(record.get("event") == "end" for record in read_log(folder)):
            raise UsageError(
                f"{folder}: the run was not evaluated, since its data had no split for that; `ioubal eval {folder}`"
                " with --split evaluates what it saved, `--set data.eval_split=NAME` a new training"
            )
        raise UsageError(f"{folder}: the run is not finished (ioubal train --resume -o {folder} continues it)")
    config = load_config(str(folder / CONFIG_FILE))
    try:
        metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
        metrics["AP"], metrics["thresholds"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / METRICS_FILE}: not the metrics of a run: {error}") from error
    if table == VOC07_TABLE and "VOC07" in metrics:
        own = {name: value for name, value in metrics["VOC07"].items() if name.startswith("AP")}
        thresholds = {f"{t:.2f}": own[f"AP{round(100 * t)}"] for t in THRESHOLDS}
        metrics = {**metrics, **own, "thresholds": thresholds}
    return Run(folder, config, metrics, read_log(folder))


def study_of_plan(plan: Plan, folder: Path, *, command: str | None = None) -> Study:
    """The finished trainings of a plan.

    Raises:
        UsageError: some of a row were not evaluated on what the others were.
    """
    jobs = plan.jobs()
    finished = [job for job in jobs if is_finished(folder / job.folder)]
    rows = []
    for block in plan.blocks:
        for row, _ in block.rows:
            arms = []
            for arm in row.arms:
                own = [job for job in finished if _is(job, block.name, row.name, arm.name)]
                if own:
                    arms.append(
                        ArmRuns(arm.name, arm.label, [load_run(folder / job.folder, plan.table) for job in own])
                    )
            if arms:
                own_data = made_data(folder, block.name)
                rows.append(RowStudy(row.name, row.label, block.name, block.title, arms, data_path=own_data))
                require_one_evaluation(rows[-1])
    return Study(plan.spec.title, rows, plan.spec.metrics, plan.table, plan.preset, command, len(jobs))


def require_one_evaluation(row: RowStudy) -> None:
    """Means and differences are taken over metrics of the same images and boxes.

    Raises:
        UsageError: two runs' are not, as far as they have it on record.
    """
    runs = [run for arm in row.arms for run in arm.runs if run.eval_data is not None]
    for run in runs:
        if run.eval_data != runs[0].eval_data:
            raise UsageError(
                f"{run.folder}: evaluated on {run.config.data.path} ({run.eval_data[:12]}...), expected the images and"
                f" boxes of {runs[0].folder}: {runs[0].config.data.path} ({runs[0].eval_data[:12]}...)"
            )


def made_data(folder: Path, block: str | None) -> str | None:
    """The set that a reproduction made for itself, wherever its folder is now; None if it made none."""
    place = folder / "data" / (block or "")
    return str(place) if block and place.is_dir() else None


def _is(job: Job, *place: str) -> bool:
    return (job.block, job.row, job.arm) == place


def study_of_runs(folders: Iterable[Path], *, title: str) -> Study:
    """Runs named one by one: what differs in the seed alone is one arm, one detector and data set are one row."""
    rows: list[RowStudy] = []
    for folder in folders:
        run = load_run(folder)
        row = next((row for row in rows if _comparable(row.first, run)), None)
        if row is None:
            row = RowStudy(run.config.model.name, run.config.model.name, None, _data_name(run), [])
            rows.append(row)
        arm = next((arm for arm in row.arms if _same_but_seed(arm.runs[0], run)), None)
        if arm is None:
            loss = run.config.loss.label()
            more = _beside_the_weights(run.config.loss)
            own = loss + more
            name = own if row.arm(own) is None else folder.name
            number = 2
            while row.arm(name) is not None or (name != own and name in ARM_LABELS):
                name, number = f"{folder.name} ({number})", number + 1
            arm = ArmRuns(name, ARM_LABELS[loss] + more if name == own else name, [])
            row.arms.append(arm)
        if run.seed in arm.by_seed:
            raise UsageError(f"{folder}: the same training, seed {run.seed}, as {arm.by_seed[run.seed].folder}")
        arm.runs.append(run)
    for row in rows:  # what the others are compared with, wherever it was named
        row.arms.sort(key=lambda arm: arm.name != BASELINE.name)
    return Study(title, rows)


def _beside_the_weights(loss: LossConfig) -> str:
    """What else tells a loss from one that `--loss` makes: a baseline with another w_loc is none."""
    if loss.lambda_ and loss.normalize_loc:
        return ", Eq. 7"
    return "" if loss.lambda_ or loss.w_loc in (1.0, "auto") else f", w_loc {loss.w_loc:g}"


def _data_name(run: Run) -> str:
    return Path(run.config.data.path or "?").name


def _comparable(one: Run, other: Run) -> bool:
    """Whether two runs are of one detector and were evaluated on the same images and boxes."""
    if one.config.model.name != other.config.model.name:
        return False
    seen = [run.eval_data for run in (one, other)]
    if None not in seen:
        return seen[0] == seen[1]
    # Of runs that do not have it on record the place tells.
    places = [(Path(run.config.data.path or "").resolve(), run.config.data.eval_split) for run in (one, other)]
    return places[0] == places[1]


def _same_but_seed(one: Run, other: Run) -> bool:
    changes = config_diff(one.config.to_dict(), other.config.to_dict())
    return all(change.startswith("train.seed:") for change in changes)
