"""Rows of docs/transforms.md that need processes: DDP and FSDP in two gloo processes are one with the whole batch.

python test_transforms_processes.py RANK FOLDER    is what each process runs
"""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ioubal_kernels as ik
from ioubal_kernels import testing
from ioubal_kernels.detection.processes import disconnect

ROWS = {
    "DistributedDataParallel": "works",
    "FSDP (FullyShardedDataParallel)": "works",
    "FSDP2 (fully_shard)": "works",
    "torch.compile of a DDP step with a process group": "works",
}
IMAGES, LEVEL = 4, (4, 5)


class Detector(nn.Module):
    """Two convolutions and the loss stage, whose sums run over all processes."""

    def __init__(self, process_group: str | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(8, 8, 3, padding=1)
        self.scores, self.offsets = nn.Conv2d(8, 2 * 3, 3, padding=1), nn.Conv2d(8, 2 * 4, 3, padding=1)
        self.loss = ik.RetinaNetLoss(eta=1.5, lambda_=1.5, normalize_loc=True, process_group=process_group)

    def forward(self, maps: Tensor, anchors: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
        maps = self.stem(maps).relu()
        out = self.loss([self.scores(maps)], [self.offsets(maps)], anchors, boxes, labels)
        return out.classification + out.localization


def inputs(part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images with different numbers of boxes, so that a process's own normalisers would give other gradients."""
    made = testing.detection_inputs(seed=2, images=IMAGES, levels=(LEVEL,), max_boxes=6).padded()
    maps = torch.randn(IMAGES, 8, *LEVEL, generator=torch.Generator().manual_seed(2))
    return maps[part], made.anchors, made.gt_boxes[part], made.gt_labels[part]


def whole() -> dict[str, Tensor]:
    """Gradients of one process with the whole batch."""
    model = Detector(None)
    model(*inputs(slice(None))).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def wrapped(row: str, model: nn.Module) -> nn.Module:
    if row.startswith("FSDP2"):
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for part in (model.stem, model.scores, model.offsets):
            fully_shard(part, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if row.startswith("FSDP"):
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    return DistributedDataParallel(model)


def gradients(row: str, rank: int) -> dict[str, Tensor]:
    """Full gradients by the names of the bare model's parameters."""
    model = wrapped(row, Detector("world"))
    run = torch.compile(model, backend="aot_eager") if row.startswith("torch.compile") else model
    run(*inputs(slice(2 * rank, 2 * rank + 2))).backward()
    if row.startswith("FSDP2"):
        return {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    if row.startswith("FSDP"):
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return {clean(name): p.grad.clone() for name, p in model.named_parameters()}
    return {clean(name): p.grad for name, p in model.named_parameters()}


def clean(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")


def main(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    found = {row: gradients(row, rank) for row in ROWS}
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    disconnect()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of the two processes has, by row."""
    folder = tmp_path_factory.mktemp("two")
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in started:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_two_processes_equal_one(row: str, together: list[dict]) -> None:
    want = whole()
    for found in together:
        assert found[row].keys() == want.keys() and len(want) == 6
        for name, gradient in want.items():
            scale = float(gradient.abs().max())
            assert scale > 0
            torch.testing.assert_close(found[row][name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
