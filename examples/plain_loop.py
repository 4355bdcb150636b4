"""A training loop of your own: matching and the fused loss on the heads' raw level maps.

    python examples/plain_loop.py --steps 20

The data are random boxes, which the network sees painted into its input: enough to learn. Replace `make_batch` and
`Detector` by yours; what `step` does stays.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import ioubal_kernels as ik

CLASSES, STRIDES, SIDES = 3, (8, 16), (16, 24, 32, 48)  # one anchor per level and pair of sides
SIDES_PER_LEVEL = len(SIDES) // len(STRIDES)


class Detector(nn.Module):
    """Two levels of features and the two heads of a RetinaNet, small."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(CLASSES, channels, 8, stride=8), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()
        )
        self.down = nn.Sequential(nn.Conv2d(channels, channels, 3, stride=2, padding=1), nn.ReLU())
        self.scores = nn.Conv2d(channels, SIDES_PER_LEVEL * CLASSES, 3, padding=1)
        self.offsets = nn.Conv2d(channels, SIDES_PER_LEVEL * 4, 3, padding=1)
        nn.init.constant_(self.scores.bias, -4.0)  # the focal loss wants low scores at the start

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        fine = self.stem(images)
        levels = [fine, self.down(fine)]
        # As they come out of the convolutions, (N, A*K, H, W) and (N, A*4, H, W): no permute, no cat.
        return [self.scores(level) for level in levels], [self.offsets(level) for level in levels]


def make_anchors(size: int) -> Tensor:
    """(R, 4) x1 y1 x2 y2 in the order level, row, column, anchor: the order of the maps' own memory, channel inner."""
    found = []
    for level, stride in enumerate(STRIDES):
        at = (torch.arange(size // stride) + 0.5) * stride
        y, x = torch.meshgrid(at, at, indexing="ij")
        half = torch.tensor(SIDES[level * SIDES_PER_LEVEL : (level + 1) * SIDES_PER_LEVEL]) / 2
        x, y, half = torch.broadcast_tensors(x[..., None], y[..., None], half)
        found.append(torch.stack([x - half, y - half, x + half, y + half], -1).reshape(-1, 4))
    return torch.cat(found)


def make_batch(images: int, size: int, generator: torch.Generator) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Images (N, K, size, size) with a rectangle in channel `label` for each box; boxes and labels per image."""
    pixels = torch.zeros(images, CLASSES, size, size)
    all_boxes, all_labels = [], []
    for image in pixels:
        count = int(torch.randint(1, 4, (), generator=generator))
        side = torch.randint(14, 48, (count, 2), generator=generator)
        corner = (torch.rand(count, 2, generator=generator) * (size - side)).floor()
        boxes, labels = torch.cat([corner, corner + side], 1), torch.randint(CLASSES, (count,), generator=generator)
        for (x1, y1, x2, y2), label in zip(boxes.int().tolist(), labels.tolist()):
            image[label, y1:y2, x1:x2] = 1.0
        all_boxes.append(boxes)
        all_labels.append(labels)
    return pixels, all_boxes, all_labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--images", type=int, default=4, help="images in a batch")
    parser.add_argument("--size", type=int, default=96, help="pixels of a side, a multiple of 16")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model, anchors = Detector().to(options.device), make_anchors(options.size).to(options.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    for step in range(options.steps):
        images, boxes, labels = make_batch(options.images, options.size, generator)
        boxes, labels = ([each.to(options.device) for each in part] for part in (boxes, labels))
        cls_logits, bbox_deltas = model(images.to(options.device))
        # Which box each anchor has to predict: (N, R), -1 background, -2 ignored.
        matched = ik.match_anchors(anchors, boxes, high=0.5, low=0.4)
        losses = ik.iou_balanced_detection_loss(
            cls_logits, bbox_deltas, anchors, matched, boxes, labels, eta=1.5, lambda_=1.5, w_loc=3.0
        )
        optimizer.zero_grad()
        (losses.classification + losses.localization).backward()
        optimizer.step()
        if step in (0, options.steps - 1):
            print(
                f"step {step}: classification {losses.classification.item():.4f},"
                f" localization {losses.localization.item():.4f}, {int(losses.num_positives)} positives,"
                f" mean IoU {losses.mean_iou.item():.3f}"
            )


if __name__ == "__main__":
    main()
