"""A training step captured in a CUDA graph once, forward and backward, and replayed on new data.

    python examples/cuda_graphs.py

The losses read no value on the host and allocate by shapes alone, so they can be captured with padded boxes. A replay
costs one launch instead of one per op. Without a GPU the same step runs eagerly on the CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from compiled import pad
from plain_loop import Detector, make_anchors, make_batch
from torch import Tensor

import ioubal_kernels as ik


def capture(step: Callable[[], Tensor], warm_up: int = 3) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph of `step` and the tensor that a replay fills with its result."""
    stream = torch.cuda.Stream()  # torch wants the warm-up on a stream of its own
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batches", type=int, default=3)
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model, anchors = Detector().to(device), make_anchors(options.size).to(device)
    parameters = list(model.parameters())
    stage = ik.RetinaNetLoss(eta=1.5, lambda_=1.5, w_loc=3.0)

    def draw() -> tuple[Tensor, Tensor, Tensor]:
        images, boxes, labels = make_batch(options.images, options.size, generator)
        return tuple(each.to(device) for each in (images, *pad(boxes, labels, places=8)))

    static = draw()  # a graph reads and writes fixed memory: new data are copied into these
    flat_grad = torch.zeros(sum(p.numel() for p in parameters), device=device)

    def step() -> Tensor:
        images, boxes, labels = static
        losses = stage(*model(images), anchors, boxes, labels)
        total = losses.classification + losses.localization
        flat_grad.copy_(torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, parameters)]))
        return total.detach()

    graph, result = capture(step) if device.type == "cuda" else (None, None)
    for number in range(options.batches):
        for mine, new in zip(static, draw()):
            mine.copy_(new)
        if graph is None:
            print(f"batch {number}: eager loss {step().item():.6f}, gradient norm {flat_grad.norm().item():.6f}")
            continue
        graph.replay()
        value, replayed = result.clone(), flat_grad.clone()
        want = step()
        error = float((replayed - flat_grad).norm() / flat_grad.norm())
        print(f"batch {number}: replayed {value.item():.6f}, eager {want.item():.6f}, gradient error {error:.1e}")
    if graph is None:
        print("no GPU usable here: nothing was captured, the step ran eagerly on the CPU")


if __name__ == "__main__":
    main()
