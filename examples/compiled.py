"""torch.compile(fullgraph=True) of the whole loss stage, compared with eager.

    python examples/compiled.py

Matching and the losses trace without a graph break when the boxes come padded: (N, G, 4), labels (N, G), -1 where there
is no box. Compiled, the stage stays two or three fused ops; what compiles around them is your network.
"""

from __future__ import annotations

import argparse

import torch
from plain_loop import Detector, make_anchors, make_batch
from torch import Tensor

import ioubal_kernels as ik


def pad(boxes: list[Tensor], labels: list[Tensor], places: int) -> tuple[Tensor, Tensor]:
    """Lists of boxes as tensors of one size: shapes that do not change compile once, and can be captured."""
    padded = torch.zeros(len(boxes), places, 4), torch.full((len(boxes), places), -1)
    for i, (box, label) in enumerate(zip(boxes, labels)):
        padded[0][i, : len(box)], padded[1][i, : len(box)] = box, label
    return padded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--backend", default="inductor", help="torch.compile's; aot_eager needs no C++ compiler")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model, anchors = Detector().to(options.device), make_anchors(options.size).to(options.device)
    stage = ik.RetinaNetLoss(eta=1.5, lambda_=1.5, w_loc=3.0)

    def loss(logits: list[Tensor], deltas: list[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        losses = stage(logits, deltas, anchors, boxes, labels)
        return losses.classification + losses.localization

    compiled = torch.compile(loss, fullgraph=True, backend=options.backend)
    worst = 0.0
    for _ in range(options.batches):
        images, boxes, labels = make_batch(options.images, options.size, generator)
        boxes, labels = (each.to(options.device) for each in pad(boxes, labels, places=8))
        found = []
        for function in (loss, compiled):
            model.zero_grad()
            value = function(*model(images.to(options.device)), boxes, labels)
            value.backward()
            found.append((value.detach(), torch.cat([p.grad.reshape(-1) for p in model.parameters()])))
        (eager_value, eager_grad), (value, grad) = found
        worst = max(worst, float((grad - eager_grad).norm() / eager_grad.norm()))
        print(f"eager {eager_value.item():.6f}, compiled {value.item():.6f}")
    print(f"fullgraph with {options.backend}: gradients differ by {worst:.1e} (relative, in norm)")


if __name__ == "__main__":
    main()
