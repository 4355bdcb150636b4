"""Small torchvision detectors, a batch for each, and their gradients by name."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.ops import MultiScaleRoIAlign

CLASSES = 4
SIZE = 64
FAMILIES = ("retinanet", "ssd", "faster_rcnn", "mask_rcnn", "keypoint_rcnn")
LOSSES = {
    "retinanet": ("classification", "bbox_regression"),
    "ssd": ("classification", "bbox_regression"),
    "faster_rcnn": ("loss_classifier", "loss_box_reg"),
    "mask_rcnn": ("loss_classifier", "loss_box_reg"),
    "keypoint_rcnn": ("loss_classifier", "loss_box_reg"),
}


class Backbone(nn.Module):
    """Three maps of strides 8, 16, 32."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.out_channels = channels
        self.stem = nn.Conv2d(3, channels, 8, stride=8, bias=False)  # BatchNorm takes a bias out again
        self.norm = nn.BatchNorm2d(channels)
        self.down = nn.ModuleList(nn.Conv2d(channels, channels, 3, stride=2, padding=1) for _ in range(2))

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        levels = [torch.relu(self.norm(self.stem(images)))]
        for layer in self.down:
            levels.append(torch.relu(layer(levels[-1])))
        return OrderedDict((str(number), level) for number, level in enumerate(levels))


def make(family: str, seed: int = 0) -> nn.Module:
    """A detector with weights that depend on the seed only; large enough outputs for IoUs between 0 and 1."""
    torch.manual_seed(seed)
    sizes, ratios = tuple((s, s * 1.4) for s in (12, 24, 40)), ((0.5, 1.0, 2.0),) * 3
    transform = {"min_size": SIZE, "max_size": SIZE}
    backbone = Backbone()
    if family == "retinanet":
        model = RetinaNet(backbone, CLASSES, anchor_generator=AnchorGenerator(sizes, ratios), **transform)
        regression = model.head.regression_head.bbox_reg
    elif family == "ssd":
        boxes = DefaultBoxGenerator([[2]] * 3, scales=[0.2, 0.4, 0.6, 0.8], steps=[8, 16, 32])
        head = SSDHead([8] * 3, boxes.num_anchors_per_location(), CLASSES)
        return SSD(backbone, boxes, (SIZE, SIZE), CLASSES, head=head)
    else:
        options = {
            "rpn_anchor_generator": AnchorGenerator(tuple((s,) for s in (12, 24, 40)), ratios),
            "box_roi_pool": MultiScaleRoIAlign(["0", "1", "2"], 7, 2),
            "box_head": TwoMLPHead(8 * 49, 32),
            "box_batch_size_per_image": 32,
            "rpn_batch_size_per_image": 32,
            "rpn_post_nms_top_n_train": 60,
            "box_detections_per_img": 2,
            **transform,
        }
        if family == "keypoint_rcnn":
            options["keypoint_roi_pool"] = MultiScaleRoIAlign(["0", "1", "2"], 14, 2)
            options["keypoint_head"] = KeypointRCNNHeads(8, (16,))
            options["keypoint_predictor"] = KeypointRCNNPredictor(16, 2)
            model = KeypointRCNN(backbone, box_predictor=predictor(), **options)
        elif family == "mask_rcnn":
            options["mask_roi_pool"] = MultiScaleRoIAlign(["0", "1", "2"], 14, 2)
            model = MaskRCNN(
                backbone, box_predictor=predictor(), mask_predictor=MaskRCNNPredictor(256, 16, CLASSES), **options
            )
        else:
            model = FasterRCNN(backbone, box_predictor=predictor(), **options)
        regression = model.roi_heads.box_predictor.bbox_pred
    nn.init.normal_(regression.weight, std=0.05 if family == "retinanet" else 1.0)
    return model


def predictor() -> nn.Module:
    return FastRCNNPredictor(32, CLASSES)


def batch(family: str, *, empty: bool = True, seed: int = 1) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Three images, the last one without boxes if `empty`."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, SIZE, SIZE, generator=generator) for _ in range(3)]
    first = 0 if family == "retinanet" else 1
    targets = []
    for number in range(3):
        count = 0 if empty and number == 2 else 2 + number
        corner = 30 * torch.rand(count, 2, generator=generator)
        boxes = torch.cat([corner, corner + 10 + 20 * torch.rand(count, 2, generator=generator)], dim=1)
        labels = torch.randint(first, CLASSES, (count,), generator=generator)
        targets.append({"boxes": boxes, "labels": labels})
        if family == "mask_rcnn":
            masks = torch.zeros(count, SIZE, SIZE, dtype=torch.uint8)
            for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().int().tolist(), strict=True):
                mask[y1:y2, x1:x2] = 1
            targets[-1]["masks"] = masks
        if family == "keypoint_rcnn":
            center = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
            points = torch.cat([center.expand(-1, 2, -1), torch.ones(count, 2, 1)], dim=2)
            targets[-1]["keypoints"] = points
    return images, targets


def step(model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]], weights: dict | None = None):
    """Losses by name and gradients by parameter of a training forward; the samplers' random numbers are fixed."""
    model.train().zero_grad()
    torch.manual_seed(7)
    losses = model(images, targets)
    sum((weights or {}).get(name, 1.0) * value for name, value in losses.items()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in losses.items()}, gradients


def assert_same(got, want, rtol=1e-5):
    """Losses by name, and every element of every parameter's gradient relative to that gradient's largest."""
    assert got[0].keys() == want[0].keys() and got[1].keys() == want[1].keys()
    for name, value in want[0].items():
        torch.testing.assert_close(got[0][name], value, rtol=rtol, atol=0.0, msg=lambda m, name=name: f"{name}: {m}")
    for name, value in want[1].items():
        scale = float(value.abs().max())
        torch.testing.assert_close(
            got[1][name], value, rtol=rtol, atol=rtol * scale, msg=lambda m, name=name: f"gradient of {name}: {m}"
        )
