"""The paper's rows, full size: built, and steps with each loss at a reduced image size (SSD's is fixed)."""

from __future__ import annotations

import gc
import math

import pytest
import torch

from ioubal_kernels.detection.architectures import MODELS
from ioubal_kernels.detection.data import TrainLoader, load_pair, make_synthetic
from ioubal_kernels.detection.models import build_model
from ioubal_kernels.detection.objective import apply_loss
from ioubal_kernels.detection.predict import transform_config
from ioubal_kernels.detection.presets import PRESETS, preset
from ioubal_kernels.detection.processes import Processes
from ioubal_kernels.detection.stepping import Stepper
from ioubal_kernels.experiments.grid import TABLES
from ioubal_kernels.experiments.plans import Job, make_plan

FULL = [name for name in PRESETS if name.startswith("table") and not name.endswith("_tiny")]
# Every training of `ioubal reproduce TABLE --preset paper`, by the row that it is a loss of, each once: Table 3 shares
# Table 2's row, and some of its losses.
JOBS: dict[str, list[Job]] = {}
for _table, _spec in TABLES.items():
    for _job in make_plan(_table, "paper").jobs():
        _own = JOBS.setdefault(f"{_spec.preset_of}_{_job.row}", [])
        if all(_job.config.loss != other.config.loss for other in _own):
            _own.append(_job)


def test_the_plans_use_every_row():
    assert set(JOBS) == set(FULL)
    assert len(JOBS["table2_retinanet_r50"]) == 5 + 11 - 3


def test_the_rows_use_every_full_size_model():
    models = {preset(name).model.name for name in FULL}
    assert models == {name for name, architecture in MODELS.items() if architecture.backbone != "tiny"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return make_synthetic(tmp_path_factory.mktemp("full") / "set", train=4, val=1, size=128, classes=3, workers=1)


@pytest.fixture(scope="module")
def stepped() -> list[tuple[str, object]]:
    """The models and losses that have made a step."""
    return []


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_steps(name, data, stepped):
    """Losses and gradients are finite, positives are found, and the weights that are trained move."""
    configs = [job.config for job in JOBS[name]]
    for config in configs:
        config.set("train.batch_size", 1)
        if config.data.image_size is None:
            edge = 128 if config.model.name.startswith("foveabox") else 64  # its cells need boxes of 20 pixels
            config.set("data.short_side_range", [edge // 2, edge] if config.data.short_side_range else None)
            config.set("data.short_side", edge)
            config.set("data.long_side", edge)
        config.validate()
    config = configs[0]
    architecture = MODELS[config.model.name]
    pair = load_pair(data)
    torch.manual_seed(0)
    # As a backbone file leaves it: statistics fixed, stem and first stage not trained.
    frozen = architecture.backbone != "vgg16"
    detector = build_model(
        config.model.name,
        pair.training.num_classes,
        size=config.data.image_size,
        smallest=config.model.ssd_smallest,
        norm="frozen" if frozen else "batch",
    ).train()
    for key, value in detector.named_buffers():
        if key.endswith("bn3.weight"):  # random branches with fixed statistics would add up to infinity over 33 blocks
            value.fill_(0.2)
    before = {k: p.detach().clone() for k, p in detector.named_parameters() if p.requires_grad}
    loader = TrainLoader(pair.training, transform_config(config), 1, seed=config.train.seed)
    batches = [batch for _, batch in zip(range(2), loader)]
    for own in configs:
        if own is not config and (own.model.name, own.loss) in stepped:  # by another table's row
            continue
        stepped.append((own.model.name, own.loss))
        apply_loss(detector, own.loss, w_loc=2.0)
        stepper = Stepper(detector, own, Processes(), None, 1000)
        twice = own is config and architecture.backbone != "vgg16"  # SSD's steps take 10 seconds
        for step, batch in enumerate(batches if twice else batches[:1]):
            record, finite, stop = stepper.run(step, [batch], False)
            assert finite and not stop, record
            assert record["positives"] > 0 and 0 <= record["mean_iou"] <= 1
            assert all(math.isfinite(record[part]) for part in ("cls", "loc", "grad_norm"))
    # Warm-up: about a third of the rate, for one image of the batch that it is meant for.
    assert record["lr"] == pytest.approx(config.optim.lr / config.optim.base_batch / 3, rel=0.02)
    moved = [not torch.equal(p, before[k]) for k, p in detector.named_parameters() if p.requires_grad]
    assert sum(moved) > 0.8 * len(moved)  # a step of a few millionths is below some weights' precision
    still = [k for k, p in detector.named_parameters() if not p.requires_grad]
    assert bool(still) == frozen and all("body.conv1" in k or "body.bn1" in k or "layer1" in k for k in still)
    del detector, stepper, before
    gc.collect()
