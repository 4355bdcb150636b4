"""One short training to a known accuracy: the whole chain learns, not only runs.

No test compares the losses' accuracy: one pair of runs differs by its noise.
"""

from __future__ import annotations

import pytest

from ioubal_kernels.detection.data import make_synthetic
from ioubal_kernels.detection.demo import CLASSES, IMAGE_SIZE, TRAIN_IMAGES, VAL_IMAGES
from ioubal_kernels.detection.presets import preset
from ioubal_kernels.detection.progress import Reporter
from ioubal_kernels.detection.train import train


@pytest.mark.slow
def test_the_demo_recipe_learns_the_synthetic_set(tmp_path):
    """The demo's recipe and data, the IoU-balanced loss; far below what it reaches, far above what it starts from."""
    config = preset("demo")
    config.set("data.path", make_synthetic(tmp_path / "set", TRAIN_IMAGES, VAL_IMAGES, IMAGE_SIZE, CLASSES))
    config.set("train.eval_every", 0)
    config.set_loss("both")
    metrics = train(config, tmp_path / "run", reporter=Reporter(quiet=True)).metrics
    assert metrics["AP50"] >= 0.50
    assert metrics["AP75"] >= 0.22
