"""FoveaBox (Kong et al., "FoveaBox: Beyond Anchor-based Object Detector"), with the heads' raw maps for the fused loss.

Coder, targets and divisors are those of MMDetection's FoveaHead: a cell predicts the log-distances from its centre to
the four sides of a box, in units of its level's base edge.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import batched_nms, clip_boxes_to_image

import ioubal_kernels as ik
from ioubal_kernels.distributed import all_reduce_sums, world_size
from ioubal_kernels.integrations.torchvision import Settings
from ioubal_kernels.integrations.torchvision.observing import record_dense, remember

from .resnet import norm_layer

SIGMA = 0.4


class Tower(nn.Module):
    """`depth` 3x3 convolutions and a final one, shared over the pyramid's levels."""

    def __init__(self, channels: int, out_channels: int, depth: int, group_norm: bool, final_bias: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(depth):
            # A bias before a GroupNorm would be subtracted again.
            layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=not group_norm))
            if group_norm:
                layers.append(norm_layer("group")(channels))
            layers.append(nn.ReLU(inplace=True))
        layers.append(nn.Conv2d(channels, out_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.constant_(self.layers[-1].bias, final_bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [self.layers(level) for level in features]


class FoveaBox(nn.Module):
    """A detector with torchvision's calling convention: images and targets in, a dict of losses or detections out.

    Args:
        backbone: module giving an ordered dict of maps; has `out_channels`.
        num_classes: K, foreground classes only: labels are the channels' indices.
        strides: of the maps.
        base_scale: base edge of a level in units of its stride; the paper's 16 .. 256 are 2.
        group_norm: normalise the towers, which training from scratch needs.
        tower_depth: hidden 3x3 convolutions of each tower.
        score_thresh, nms_thresh, topk_candidates, detections_per_img: as in torchvision's RetinaNet.

    Level l takes boxes whose size (root of the area) is from its base edge to four times it, the lowest level smaller
    ones as well (from 1) and the highest larger ones (to eight times its base edge): for base edges 16, 32, ... the
    paper's ranges 1 to 64, 32 to 128, ... 256 to 2048.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        strides: tuple[int, ...],
        *,
        base_scale: float = 2.0,
        group_norm: bool = False,
        tower_depth: int = 4,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        topk_candidates: int = 1000,
        detections_per_img: int = 100,
        prior: float = 0.01,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.base_edges = tuple(base_scale * stride for stride in strides)
        channels = backbone.out_channels
        self.cls_tower = Tower(channels, num_classes, tower_depth, group_norm, -math.log((1 - prior) / prior))
        self.box_tower = Tower(channels, 4, tower_depth, group_norm, 0.0)
        self.transform = GeneralizedRCNNTransform(800, 1333, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        self.score_thresh, self.nms_thresh = score_thresh, nms_thresh
        self.topk_candidates, self.detections_per_img = topk_candidates, detections_per_img
        self.iou_balanced: Settings | None = None

    @property
    def scale_ranges(self) -> tuple[tuple[float, float], ...]:
        """Smallest and largest box size of each level in pixels."""
        last = len(self.base_edges) - 1
        return tuple(
            (1.0 if level == 0 else edge, 8 * edge if level == last else 4 * edge)
            for level, edge in enumerate(self.base_edges)
        )

    def forward(self, images, targets: list[dict[str, Tensor]] | None = None):
        """images: list of (3, H, W) in [0, 1]; targets: dicts of `boxes` (G, 4) and `labels` (G,).

        Returns:
            In training {"classification", "bbox_regression"}; else per image boxes (D, 4), scores (D,), labels (D,).
        """
        if self.training and targets is None:
            raise ValueError("FoveaBox: targets must be given in training mode, got None")
        original_sizes = [tuple(image.shape[-2:]) for image in images]
        images, targets = self.transform(images, targets)
        features = self.backbone(images.tensors)
        if isinstance(features, Tensor):
            features = OrderedDict([("0", features)])
        levels = list(features.values())
        logits, deltas = self.cls_tower(levels), self.box_tower(levels)
        if self.training:
            return self.compute_loss(targets, logits, deltas)
        detections = self.postprocess_detections(logits, deltas, images.image_sizes)
        return self.transform.postprocess(detections, images.image_sizes, original_sizes)

    def cells(self, shapes: list[tuple[int, int]], device: torch.device) -> Tensor:
        """(R, 4): for every cell, in the order level, h, w, the box of its centre and its level's base edge."""
        boxes = []
        for (height, width), stride, edge in zip(shapes, self.strides, self.base_edges, strict=True):
            y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) * stride
            x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) * stride
            center_y, center_x = (axis.flatten() for axis in torch.meshgrid(y, x, indexing="ij"))
            center, half = torch.stack((center_x, center_y), dim=1), edge / 2
            boxes.append(torch.cat((center - half, center + half), dim=1))
        return torch.cat(boxes)

    def compute_loss(
        self, targets: list[dict[str, Tensor]], logits: list[Tensor], deltas: list[Tensor]
    ) -> dict[str, Tensor]:
        """Both losses of raw level maps (N, K, H, W), (N, 4, H, W). Classification is divided by the number of
        positives and images, localisation by the positives, both over all processes.
        """
        settings = self.iou_balanced
        boxes, labels = [t["boxes"] for t in targets], [t["labels"] for t in targets]
        shapes = [tuple(level.shape[-2:]) for level in deltas]
        cells = self.cells(shapes, deltas[0].device)
        matched = ik.match_fovea(
            boxes,
            shapes,
            strides=self.strides,
            scale_ranges=self.scale_ranges,
            sigma=SIGMA,
            dtype=torch.int32,
            backend=settings.backend,
        )
        group = settings.group("FoveaBox")
        found = (matched >= 0).sum().float()
        positives, images = all_reduce_sums([found, torch.full_like(found, len(targets))], group)
        processes = world_size(group)
        divisors = (positives + images) / processes, positives.clamp(min=1) / processes
        losses = ik.iou_balanced_detection_loss(
            logits, deltas, cells, matched, boxes, labels, box_coder="fovea", avg_factor=divisors, **settings.keywords()
        )
        remember(self, losses.num_positives, losses.mean_iou)
        record_dense(
            self,
            logits,
            deltas,
            cells,
            matched,
            boxes,
            labels,
            alpha=settings.alpha,
            gamma=settings.gamma,
            box_coder="fovea",
        )
        return {"classification": losses.classification, "bbox_regression": losses.localization}

    @torch.no_grad()
    def postprocess_detections(
        self, logits: list[Tensor], deltas: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Per level the best (cell, class) pairs above the threshold; NMS per class; the best of an image."""
        shapes = [tuple(level.shape[-2:]) for level in deltas]
        cells = self.cells(shapes, deltas[0].device).split([height * width for height, width in shapes])
        detections = []
        for n, size in enumerate(image_sizes):
            found: list[tuple[Tensor, Tensor, Tensor]] = []
            for level_logits, level_deltas, level_cells in zip(logits, deltas, cells, strict=True):
                scores = level_logits[n].float().sigmoid().permute(1, 2, 0).flatten()
                kept = (scores > self.score_thresh).nonzero().squeeze(1)
                best, order = scores[kept].topk(min(self.topk_candidates, kept.numel()))
                rows, labels = kept[order] // self.num_classes, kept[order] % self.num_classes
                picked = level_deltas[n].float().permute(1, 2, 0).reshape(-1, 4)[rows]
                boxes = ik.decode_boxes(picked, level_cells[rows], box_coder="fovea")
                found.append((clip_boxes_to_image(boxes, size), best, labels))
            boxes, scores, labels = (torch.cat(part) for part in zip(*found, strict=True))
            kept = batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
            detections.append({"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]})
        return detections
