"""The time that `ioubal reproduce --dry-run` promises, from steps and images that take a second each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ioubal_kernels.detection.progress import Reporter
from ioubal_kernels.experiments import expected
from ioubal_kernels.experiments.plans import make_plan
from ioubal_kernels.experiments.reproduce import choose_resources


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_steps_and_evaluations_side_by_side(monkeypatch, processes):
    """Three of four trainings are left: 600 steps each, evaluated at 200, 400 and the end, on 300 images."""
    plan = make_plan("table2", "cpu", seeds=2, arms=["both"])
    monkeypatch.setattr(expected, "seconds_per_step_and_image", lambda config: (1.0, 1.0))
    resources = replace(choose_resources(plan, 1, 1), processes=processes)
    got = expected.expected_seconds(plan, resources, plan.jobs()[:1], Reporter(quiet=True))
    assert got == pytest.approx(3 * (expected.STARTING + 600 + 3 * 300) / min(processes, 3))
