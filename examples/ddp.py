"""The plain loop in several processes: normalisers and the divisor run over all of them, as if they were one.

    torchrun --nproc-per-node 2 examples/ddp.py --steps 5

Each rank sees its part of the batch. DDP averages the ranks' gradients; with process_group="world" the loss is such
that this average is the gradient of the whole batch, however unevenly the boxes lie on the ranks. At the end the ranks
compare their weights, and rank 0 a gradient with that of one process that has the whole batch.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
import torch.distributed as dist
from plain_loop import Detector, make_anchors, make_batch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ioubal_kernels as ik


class TrainingStep(nn.Module):
    """Network and loss stage in one module: DDP sees one forward."""

    def __init__(self, process_group: str | None) -> None:
        super().__init__()
        self.network = Detector()
        self.loss = ik.RetinaNetLoss(eta=1.5, lambda_=1.5, w_loc=3.0, process_group=process_group)

    def forward(self, images, anchors, boxes, labels) -> ik.DetectionLoss:
        return self.loss(*self.network(images), anchors, boxes, labels)


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--images", type=int, default=2, help="images of each rank")
    parser.add_argument("--size", type=int, default=96)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it by torchrun: torchrun --nproc-per-node 2 examples/ddp.py")

    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    model = DistributedDataParallel(TrainingStep("world").to(device))
    alone = TrainingStep(None).to(device)  # for the comparison only
    alone.load_state_dict(model.module.state_dict())
    anchors = make_anchors(options.size).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(0)  # the same on all ranks: each draws the whole batch, takes its part
    for step in range(options.steps):
        images, boxes, labels = make_batch(world * options.images, options.size, generator)
        boxes, labels = ([each.to(device) for each in part] for part in (boxes, labels))
        mine = slice(rank * options.images, (rank + 1) * options.images)
        losses = model(images[mine].to(device), anchors, boxes[mine], labels[mine])
        optimizer.zero_grad()
        (losses.classification + losses.localization).backward()
        if step == 0:
            whole = alone(images.to(device), anchors, boxes, labels)
            (whole.classification + whole.localization).backward()
            want = gradients(alone)
            error = float((gradients(model) - want).norm() / want.norm())
            counts = [None] * world
            dist.all_gather_object(counts, int(losses.num_positives))
        optimizer.step()

    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    everyone = [torch.empty_like(weights) for _ in range(world)]
    dist.all_gather(everyone, weights)
    if rank == 0:
        agree = all(torch.equal(each, weights) for each in everyone)
        print(f"{world} ranks after {options.steps} steps: weights {'agree' if agree else 'DIFFER'}")
        print(f"positives of the first batch, as each rank has them: {counts}; one process: {int(whole.num_positives)}")
        print(f"gradient against one process with the whole batch: relative error {error:.1e}")
    dist.barrier()
    # gloo's threads need the interpreter to let go of the last tensors, and DDP keeps them alive after the next line:
    # a process that ends at once can abort with "terminate called without an active exception".
    time.sleep(0.2)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
