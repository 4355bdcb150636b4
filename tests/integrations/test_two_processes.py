"""Converted models in two gloo processes with half the batch each: their mean loss and gradient, as DDP has it,
is one process's of the whole batch.

    python test_two_processes.py RANK FOLDER    is what each process runs
"""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_models import batch, make
from torch import nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

import ioubal_kernels as ik

FAMILIES = ("retinanet", "ssd", "faster_rcnn")
SCOPES = ("batch", "image")


def whole(model: nn.Module) -> None:
    """BatchNorm as in evaluation, and samplers that take everything: they would draw differently in each process."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    for part in (getattr(model, "rpn", None), getattr(model, "roi_heads", None)):
        if part is not None:
            part.fg_bg_sampler = BalancedPositiveNegativeSampler(100_000, 0.5)


def step(family: str, scope: str, part: slice, group: str | None) -> tuple[dict, dict, dict]:
    """Losses, gradients and statistics of a part of four images; the halves hold different numbers of boxes."""
    model = make(family)
    images, targets = batch(family, empty=False, seed=1)
    more_images, more_targets = batch(family, empty=False, seed=2)
    images, targets = [*images, more_images[2]], [*targets, more_targets[2]]
    options = {"rpn": True} if family == "faster_rcnn" else {}
    ik.integrations.torchvision.convert(
        model, w_loc=2.0, beta=0.11, divisor="paper", normalizer_scope=scope, normalize_loc=True, process_group=group,
        **options,
    )  # fmt: skip
    whole(model.train())
    losses = model(images[part], targets[part])
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = ik.integrations.torchvision.statistics(model)
    return {name: value.detach() for name, value in losses.items()}, gradients, found


def main(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results = {}
    for family in FAMILIES:
        for scope in SCOPES:
            losses, gradients, found = step(family, scope, slice(2 * rank, 2 * rank + 2), "world")
            for value in (*losses.values(), *gradients.values()):
                dist.all_reduce(value)
                value /= 2
            results[f"{family} {scope}"] = losses, gradients, found
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> dict:
    """What two processes find, for every family and scope."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, __file__]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    for process in started:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_equal_one(family, scope, together):
    losses, gradients, found = together[f"{family} {scope}"]
    want_losses, want_gradients, want = step(family, scope, slice(None), None)
    for name, value in want_losses.items():
        assert float(losses[name]) == pytest.approx(float(value), rel=1e-6), name
    assert gradients.keys() == want_gradients.keys()
    for name, value in want_gradients.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(gradients[name], value, rtol=1e-5, atol=1e-5 * scale, msg=name)
    assert int(found["num_positives"]) == int(want["num_positives"]) > 0
    assert float(found["mean_iou"]) == pytest.approx(float(want["mean_iou"]), rel=1e-6)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
