"""What the configuration says reaches the loss, the images, the loader and the optimiser."""

from __future__ import annotations

import pytest
import torch

import ioubal_kernels as ik
from ioubal_kernels.detection import objective
from ioubal_kernels.detection.config import Config, LossConfig, OptimConfig
from ioubal_kernels.detection.data import load_pair
from ioubal_kernels.detection.models import build_model
from ioubal_kernels.detection.optim import make_optimizer
from ioubal_kernels.detection.processes import Processes
from ioubal_kernels.detection.resources import transform_config
from ioubal_kernels.detection.starting import make_train_loader


def test_the_loss():
    """Every value another than the default."""
    values = {
        "eta": 0.7, "lambda_": 0.6, "beta": 0.3, "alpha": 0.4, "gamma": 1.2, "eps": 0.5, "cls_weight": 2.0,
        "normalize_loc": True, "normalizer_scope": "image", "backend": "reference",
    }  # fmt: skip
    detector = build_model("retinanet_tiny", 2)
    objective.apply_loss(detector, LossConfig(**values), w_loc=3.0)
    settings = detector.network.iou_balanced
    assert {key: getattr(settings, key) for key in values} == values
    assert all(getattr(LossConfig(), key) != value for key, value in values.items())
    assert (settings.w_loc, settings.divisor) == (3.0, "paper")


def test_the_proposals_are_calibrated_with_their_own_threshold(monkeypatch):
    """1/9, torchvision's, whatever loss.beta says of the boxes."""

    class OnePair:
        def collect_deltas(self, inputs, rpn):
            return [(torch.ones(1, 4), torch.ones(1, 4))]

        def box_coder(self, rpn):
            return {}

    seen = []
    monkeypatch.setattr(ik, "calibrate_w_loc", lambda pairs, **options: seen.append(options["beta"]) or 1.0)
    for rpn in (False, True):
        objective.calibrate(OnePair(), [], LossConfig(beta=0.7), torch.device("cpu"), None, False, rpn=rpn)
    assert seen == [0.7, 1 / 9]


@pytest.mark.parametrize(
    "values",
    [
        {
            "keep_ratio": True, "hflip": 0.11, "vflip": 0.12, "zoom": 0.13, "jitter": 0.14, "min_visible": 0.15,
            "photometric": 0.16, "zoom_out": 0.17, "iou_crop": 0.18, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6),
        },
        {"image_size": None, "short_side": 500, "long_side": 700, "short_side_range": (400, 600)},
    ],
)  # fmt: skip
def test_the_images(values):
    config = Config()
    for key, value in values.items():
        config.set(f"data.{key}", value)
    made = transform_config(config)
    assert {key: getattr(made, key.replace("image_size", "size")) for key in values} == values
    assert made.size == config.data.image_size


def test_the_loader(tiny_config, tiny_data):
    config = tiny_config(**{"data.on_bad_image": "skip", "data.bad_image_limit": 0.25, "data.timeout": 7.0})
    loader = make_train_loader(config, load_pair(tiny_data).training, Processes())
    assert (loader.images.skip, loader.max_bad_images, loader.timeout) == (True, 4, 7.0)


def test_the_optimiser():
    optimizer = make_optimizer(torch.nn.Linear(2, 2), OptimConfig(name="sgd", momentum=0.3))
    assert {group["momentum"] for group in optimizer.param_groups} == {0.3}
