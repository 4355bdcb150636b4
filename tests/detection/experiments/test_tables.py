"""Tables and their numbers, from runs made up: which seeds count, what is corrected, how a difference is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from ioubal_kernels.detection.config import Config
from ioubal_kernels.experiments.localization import Localization
from ioubal_kernels.experiments.results import differences, localization_means
from ioubal_kernels.experiments.study import ArmRuns, RowStudy, Run, Study
from ioubal_kernels.experiments.tables import _signed, result_table


def row_of(**arms: dict[int, dict[str, float]]) -> RowStudy:
    """A row of runs without folders: {arm: {seed: {metric: share}}}."""
    made = []
    for name, by_seed in arms.items():
        runs = []
        for seed, metrics in by_seed.items():
            config = Config()
            config.set("train.seed", seed)
            runs.append(Run(Path(f"{name}-{seed}"), config, {"AP": 0.5, "thresholds": {}, "images": 1, **metrics}, []))
        made.append(ArmRuns(name, name, runs))
    return RowStudy("row", "row", None, "data", made)


def test_the_primary_outcomes_are_corrected_for_each_other():
    """AP75 and AP80, shown or not; what else is shown has its own p."""
    base = {"AP50": 0.5, "AP75": 0.3, "AP80": 0.2}
    more = {s: {"AP50": 0.6, "AP75": 0.31 + 0.001 * s, "AP80": 0.2 + (0.01 if s < 5 else -0.001)} for s in range(6)}
    row = row_of(baseline=dict.fromkeys(range(6), base), both=more)
    found = differences(row, row.arms[1], ["AP50", "AP75"])
    assert {name: (round(64 * d.p), d.p_holm and round(64 * d.p_holm)) for name, d in found.items()} == {
        "AP50": (2, None), "AP75": (2, 4), "AP80": (4, 4),
    }  # fmt: skip


def test_a_difference_counts_the_seeds_that_both_have():
    row = row_of(baseline={0: {}, 1: {}}, both={1: {}, 2: {}, 3: {}})
    table = result_table(Study("t", [row], ["AP"]), row)
    assert [cells[:2] for cells in table.rows if len(cells) > 1] == [["baseline", "2"], ["both", "3"], ["both", "1"]]


def test_no_difference_has_a_plus():
    assert [_signed(value) for value in (-0.04, 0.04, -0.06)] == ["+0.0", "+0.0", "-0.1"]


def test_detections_are_averaged_over_seeds():
    row = row_of(baseline={0: {}, 1: {}})
    by_seed = {seed: Localization(10 + 20 * seed, [0.5], [1], [1.0], 0.1) for seed in (0, 1)}
    row.__dict__["localizations"] = {"baseline": by_seed}  # a cached property
    assert localization_means(row, row.arms[0])["detections"] == 20


def test_the_time_of_a_step_is_the_median():
    """Of 0.5, 0.1 and 0.2 s; a step that a resumed run wrote again has none."""
    lines = [(1, 10.0), (11, 15.0), (21, 16.0), (21, 16.5), (31, 18.5)]
    run = Run(Path("."), Config(), {}, [{"event": "step", "step": s, "seconds": t} for s, t in lines])
    assert run.step_seconds == pytest.approx(0.2)
