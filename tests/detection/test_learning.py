"""Short trainings to a known accuracy: the whole chain learns, not only runs.

No test compares the losses' accuracy: one pair of runs differs by its noise.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ioubal_kernels.detection.data import make_synthetic
from ioubal_kernels.detection.presets import preset
from ioubal_kernels.detection.progress import Reporter
from ioubal_kernels.detection.train import train
from ioubal_kernels.experiments.demo import CLASSES, IMAGE_SIZE, TRAIN_IMAGES, VAL_IMAGES


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retinanet_tiny", "foveabox_tiny", "ssd_tiny", "faster_rcnn_tiny"])
def test_every_detector_overfits_eight_images(name, tmp_path):
    """200 steps on 8 images without augmentation, evaluated on the same: AP (IoU .5 to .95) above 0.9."""
    root = Path(make_synthetic(tmp_path / "set", train=8, val=1, size=128, classes=3, seed=3, workers=1))
    shutil.copy(root / "annotations/instances_train.json", root / "annotations/instances_val.json")
    shutil.rmtree(root / "images/val")
    shutil.copytree(root / "images/train", root / "images/val")
    config = preset(name)
    values = {
        "data.path": str(root), "data.image_size": [128, 128], "data.workers": 0, "data.hflip": 0.0, "data.vflip": 0.0,
        "data.zoom": 0.0, "data.jitter": 0.0, "train.iterations": 200, "train.batch_size": 4, "train.eval_every": 0,
        "train.checkpoint_every": 1000, "train.amp": "off", "train.device": "cpu", "optim.lr": 2e-3,
        "optim.weight_decay": 0.0,
    }  # fmt: skip
    for key, value in values.items():
        config.set(key, value)
    metrics = train(config, tmp_path / "run", reporter=Reporter(quiet=True)).metrics
    assert metrics["AP"] > 0.9
