"""A torchvision RetinaNet trained with the IoU-balanced losses on a folder of COCO JSON.

    python examples/finetune_torchvision.py --steps 10
    python examples/finetune_torchvision.py --data path/to/coco --model resnet50 --min-size 640 --steps 1000

Two lines make the difference to plain torchvision: `calibrate_w_loc` and `convert`. Without --data it makes the
built-in synthetic set. Needs the extra `train` (torchvision, pycocotools).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torchvision.models.detection import RetinaNet, retinanet_resnet50_fpn_v2
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import ioubal_kernels as ik
from ioubal_kernels.detection.data import Batch, TrainLoader, TransformConfig, load_pair, make_synthetic


def build(name: str, classes: int, side: int, weights: str | None) -> nn.Module:
    if name == "resnet50":  # weights="DEFAULT" takes COCO's, where they can be downloaded
        found = {"weights": None, "weights_backbone": weights, "num_classes": classes}
        return retinanet_resnet50_fpn_v2(**found, min_size=side, max_size=2 * side)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=weights, trainable_layers=5, returned_layers=[2, 3, 4]
    )  # strides 8, 16, 32 and a pooled 64
    sizes = tuple((s, s * 1.4) for s in (16, 32, 64, 128))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    return RetinaNet(backbone, classes, anchor_generator=anchors, min_size=side, max_size=2 * side)


def as_torchvision(batch: Batch, device: str) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """torchvision's calling convention: images (3, H, W) in [0, 1], one dict of boxes and labels per image."""
    images = [image.to(device).float() / (255 if image.dtype is torch.uint8 else 1) for image in batch.images]
    return images, [{key: target[key].to(device) for key in ("boxes", "labels")} for target in batch.targets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="COCO JSON folder; default: makes the synthetic set")
    parser.add_argument("--model", choices=("resnet18", "resnet50"), default="resnet18")
    parser.add_argument("--weights", help="backbone weights by torchvision's name, such as DEFAULT; downloaded")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--images", type=int, default=2, help="images in a batch")
    parser.add_argument("--min-size", type=int, default=128, help="the shorter side, in pixels")
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    torch.manual_seed(0)
    folder = options.data or make_synthetic("runs/example-data", train=32, val=4)
    pair = load_pair(folder)
    side = options.min_size
    data = TrainLoader(pair.training, TransformConfig(size=(side, side)), batch_size=options.images, seed=0)
    model = build(options.model, len(pair.training.classes), side, options.weights).to(options.device).train()
    batches = iter(data)
    first = as_torchvision(next(batches), options.device)
    # w_loc keeps the localisation loss at the plain one's size at the start of the training.
    w_loc = ik.integrations.torchvision.calibrate_w_loc(model, [first], beta=0.11)
    ik.integrations.torchvision.convert(model, eta=1.5, lambda_=1.5, w_loc=w_loc, beta=0.11, divisor="paper")
    print(f"{options.model}, {len(pair.training.classes)} classes, w_loc {w_loc:.3f}")

    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9)
    for step in range(options.steps):
        batch = next(batches, None)
        if batch is None:  # the next epoch
            batches = iter(data)
            batch = next(batches)
        losses = model(*as_torchvision(batch, options.device))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        found = ik.integrations.torchvision.statistics(model)
        shown = ", ".join(f"{name} {value.item():.4f}" for name, value in losses.items())
        print(f"step {step}: {shown}, {int(found['num_positives'])} positives, mean IoU {found['mean_iou']:.3f}")


if __name__ == "__main__":
    main()
