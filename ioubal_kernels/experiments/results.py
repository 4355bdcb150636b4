"""The numbers of a study: results.json, and what every table and figure is made of."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..detection.checkpoint import atomic_write_text
from ..detection.errors import UsageError
from .compare import Difference, Summary, compare, holm, summarize
from .grid import PRIMARY
from .paper import figures
from .study import ArmRuns, RowStudy, Run, Study, load_run, made_data, require_one_evaluation

FORMAT = "ioubal_kernels results 1"
RESULTS_FILE = "results.json"


def metric(run: Run, name: str) -> float | None:
    """A metric in per cent."""
    value = run.metrics.get(name)
    return None if value is None else 100 * value


def values_of(arm: ArmRuns, name: str) -> dict[int, float]:
    """A metric in per cent by seed; runs that have none are left out."""
    found = {run.seed: metric(run, name) for run in arm.runs}
    return {seed: value for seed, value in found.items() if value is not None}


def summary_of(arm: ArmRuns, name: str) -> Summary | None:
    return summarize(list(values_of(arm, name).values()))


def differences(row: RowStudy, arm: ArmRuns, metrics: tuple[str, ...] | list[str]) -> dict[str, Difference]:
    """An arm minus the row's first arm by metric; the primary outcomes with Holm's correction, whatever is shown."""
    base = row.arms[0]
    names = dict.fromkeys([*metrics, *PRIMARY])
    found = {name: compare(values_of(arm, name), values_of(base, name)) for name in names}
    corrected = holm({name: found[name].p for name in PRIMARY if found[name] is not None})
    return {
        name: Difference(**{**asdict(difference), "p_holm": corrected.get(name)})
        for name, difference in found.items()
        if difference is not None
    }


def localization_means(row: RowStudy, arm: ArmRuns) -> dict[str, Any] | None:
    """Figures 3a and 3b and the rank correlation, averaged over seeds; None without detections."""
    found = list(row.localizations[arm.name].values())
    if not found:
        return None

    def mean(values: list[float | None]) -> float | None:
        present = [value for value in values if value is not None]
        return statistics.fmean(present) if present else None

    correlations = {seed: item.rank_correlation for seed, item in row.localizations[arm.name].items()}
    return {
        "score_by_iou": [mean(list(values)) for values in zip(*(item.score_by_iou for item in found), strict=True)],
        "share_above": [mean(list(values)) for values in zip(*(item.share_above for item in found), strict=True)],
        "rank_correlation": mean([item.rank_correlation for item in found]),
        "rank_correlation_by_seed": correlations,
        "detections": statistics.fmean(item.count for item in found),
    }


def to_dict(study: Study, folder: Path) -> dict[str, Any]:
    """The whole study as plain values; metrics in per cent, folders of runs relative to `folder`."""
    return {
        "format": FORMAT,
        "title": study.title,
        "table": study.table,
        "preset": study.preset,
        "command": study.command,
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "trainings": {"finished": len(study.runs), "planned": study.planned},
        "metrics": list(study.metrics),
        "primary": list(PRIMARY),
        "rows": [_row(study, row, folder) for row in study.rows],
    }


def _row(study: Study, row: RowStudy, folder: Path) -> dict[str, Any]:
    start = row.first.start
    return {
        "name": row.name,
        "label": row.label,
        "block": row.block,
        "data": row.data,
        "model": row.first.config.model.name,
        "evaluated_images": row.first.metrics["images"],
        "same_initialisation_and_data": row.same_start,
        "steps": row.first.end.get("step"),
        "device": start.get("device"),
        "machine": start.get("machine"),
        "versions": start.get("versions"),
        "arms": [_arm(study, row, arm, folder) for arm in row.arms],
        "cost": row.cost,
    }


def _arm(study: Study, row: RowStudy, arm: ArmRuns, folder: Path) -> dict[str, Any]:
    names = list(dict.fromkeys([*study.metrics, *PRIMARY]))
    summaries = {name: summary_of(arm, name) for name in names}
    is_base = arm is row.arms[0]
    return {
        "name": arm.name,
        "label": arm.label,
        "mean": {name: asdict(found) for name, found in summaries.items() if found is not None},
        "difference": None if is_base else {k: d.to_dict() for k, d in differences(row, arm, names).items()},
        "paper": figures(study.table, row.name, arm.name) if study.table else {},
        "localization": localization_means(row, arm),
        "runs": [_run(row, arm, run, names, folder) for run in arm.runs],
    }


def _run(row: RowStudy, arm: ArmRuns, run: Run, names: list[str], folder: Path) -> dict[str, Any]:
    loss = run.config.loss
    found = row.localizations[arm.name].get(run.seed)
    return {
        "seed": run.seed,
        "folder": Path(os.path.relpath(run.folder, folder)).as_posix(),
        "loss": {"eta": loss.eta, "lambda": loss.lambda_, "w_loc": run.end.get("w_loc"), "eq7": loss.normalize_loc},
        "metrics": {name: metric(run, name) for name in names},
        "seconds": run.end.get("seconds"),
        "weights": run.start.get("weights"),
        "data": run.start.get("data"),
        "localization": None if found is None else found.to_dict(),
    }


def save_results(study: Study, folder: Path) -> Path:
    """Write `to_dict` to results.json of a folder.

    Raises:
        OutputError: it cannot be written; an earlier one is as it was.
    """
    path = folder / RESULTS_FILE
    atomic_write_text(path, json.dumps(_rounded(to_dict(study, folder)), indent=1, allow_nan=False) + "\n")
    return path


def _rounded(value: Any) -> Any:
    """Floats with six digits: what is beyond them is noise, and a diff of two files would be full of it."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {str(k): _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return value


def load_results(folder: Path) -> Study:
    """The study that results.json of a folder describes, with the runs beside it.

    Raises:
        UsageError: it is not there, not such a file, runs are missing, or some were evaluated on other data.
    """
    path = folder / RESULTS_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"its format is {found['format']!r}, expected {FORMAT!r}")
        rows = [
            RowStudy(
                row["name"],
                row["label"],
                row["block"],
                row["data"],
                [
                    ArmRuns(
                        arm["name"],
                        arm["label"],
                        [load_run(folder / run["folder"], found["table"]) for run in arm["runs"]],
                    )
                    for arm in row["arms"]
                ],
                row["cost"],
                made_data(folder, row["block"]),
            )
            for row in found["rows"]
        ]
        for row in rows:
            require_one_evaluation(row)
        planned = found["trainings"]["planned"]
        place = found["table"], found["preset"], found["command"]
        return Study(found["title"], rows, found["metrics"], *place, planned)
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not the results of a reproduction: {error}") from error
