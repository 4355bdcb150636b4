"""A small reproduction of Table 2: two arms and the control, two seeds, three steps each, trained in this process."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from ioubal_kernels.detection.config import Config
from ioubal_kernels.detection.progress import Reporter
from ioubal_kernels.detection.train import train
from ioubal_kernels.experiments.plans import Plan, make_plan

OPTIONS = {
    "data.image_size": (64, 64), "data.workers": 0, "train.iterations": 4, "train.batch_size": 4, "train.log_every": 1,
    "train.watch_every": 2, "train.checkpoint_every": 4, "train.eval_every": 2, "train.amp": "off",
    "train.device": "cpu", "loss.calibration_batches": 1,
}  # fmt: skip


class Reproduction(NamedTuple):
    plan: Plan
    folder: Path


@pytest.fixture(scope="session")
def small_plan(tiny_data: str) -> Plan:
    return make_plan("table2", data=tiny_data, seeds=2, arms=["both", "control"], options=OPTIONS)


@pytest.fixture(scope="session")
def reproduction(small_plan: Plan, tiny_data: str, tmp_path_factory: pytest.TempPathFactory) -> Reproduction:
    folder = tmp_path_factory.mktemp("reproduction")
    for job in small_plan.jobs():
        config = Config()
        config.update(job.config.to_dict(), "job")
        config.set("data.path", tiny_data)
        train(config, folder / job.folder, reporter=Reporter(quiet=True))
    return Reproduction(small_plan, folder)
