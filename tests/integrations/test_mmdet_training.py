"""Detectors with this package's heads train through mmdet's own loss and mmengine's Runner."""

from __future__ import annotations

import mmdet_env
import pytest
import torch

mmdet = mmdet_env.load()

from mmengine.config import ConfigDict  # noqa: E402
from mmengine.hooks import Hook  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from small_mmdet import CLASSES, FAMILIES, batch, config, make, step  # noqa: E402

from ioubal_kernels.integrations import mmdet as integration  # noqa: E402, F401


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_falls(family):
    """A few steps on one batch; every parameter that can learn has a finite gradient."""
    model, inputs = make(family, True, (1.5, 1.5)), batch(empty=True)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    totals = []
    for _ in range(12):
        losses, gradients = step(model, *inputs)
        assert all(torch.isfinite(g).all() for g in gradients.values())
        optimizer.step()
        totals.append(float(losses["loss"]))
    assert sum(totals[-3:]) < 0.8 * sum(totals[:3]), totals


class Samples(torch.utils.data.Dataset):
    """Images and samples as mmdet's pipelines pack them."""

    metainfo = {"classes": [str(n) for n in range(CLASSES)]}

    def __len__(self):
        return 4

    def __getitem__(self, index):
        inputs, samples = batch(empty=False, ignored=index == 0, seed=index, images=1)
        return {"inputs": (255 * inputs[0]).to(torch.uint8), "data_samples": samples[0]}


class Totals(Hook):
    def __init__(self):
        self.values = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.values.append({name: float(value) for name, value in outputs.items()})


def test_mmengines_runner(tmp_path):
    """From a config to a checkpoint: Runner builds the detector, trains it, and the checkpoint loads again."""
    torch.manual_seed(0)
    model = config("retinanet", True)
    model["data_preprocessor"] |= {"mean": [127.5] * 3, "std": [64.0] * 3}
    runner = Runner(
        model=ConfigDict(model),
        work_dir=str(tmp_path),
        train_dataloader={
            "batch_size": 2,
            "num_workers": 0,
            "dataset": Samples(),
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "collate_fn": {"type": "pseudo_collate"},
        },
        train_cfg={"by_epoch": True, "max_epochs": 8},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9}, "clip_grad": {"max_norm": 35}},
        default_scope="mmdet",
        log_level="ERROR",
        experiment_name="ioubal",
        randomness={"seed": 0},
    )
    totals = Totals()
    runner.register_hook(totals)
    runner.train()
    first, last = totals.values[:2], totals.values[-2:]
    assert {"loss", "loss_cls", "loss_bbox"} <= first[0].keys()
    assert sum(v["loss"] for v in last) < 0.8 * sum(v["loss"] for v in first)
    saved = torch.load(tmp_path / "epoch_8.pth", map_location="cpu", weights_only=False)["state_dict"]
    other = make("retinanet", False)  # the stock detector takes the weights
    other.load_state_dict(saved)
