"""RetinaNet whose heads hand their raw level maps to the loss: no permute, no concatenation while training."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import batched_nms, clip_boxes_to_image

import ioubal_kernels as ik

from ..errors import NonFiniteError

OCTAVE = (1.0, 2.0 ** (1 / 3), 2.0 ** (2 / 3))
ASPECT_RATIOS = (0.5, 1.0, 2.0)


class HeadMaps(NamedTuple):
    """Raw outputs, one map per level: logits (N, A*K, H, W), deltas (N, A*4, H, W)."""

    cls_logits: list[Tensor]
    bbox_deltas: list[Tensor]


class Tower(nn.Module):
    """`depth` 3x3 convolutions and a final one, shared over the pyramid's levels."""

    def __init__(self, in_channels: int, out_channels: int, depth: int, group_norm: bool, final_bias: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(depth):
            # A bias before a GroupNorm would be subtracted again.
            layers.append(nn.Conv2d(in_channels, in_channels, 3, padding=1, bias=not group_norm))
            if group_norm:
                layers.append(nn.GroupNorm(min(16, in_channels), in_channels))
            layers.append(nn.ReLU(inplace=True))
        layers.append(nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)
        if not group_norm:
            for layer in self.layers:
                if isinstance(layer, nn.Conv2d):
                    nn.init.normal_(layer.weight, std=0.01)
                    nn.init.zeros_(layer.bias)
        final = self.layers[-1]
        nn.init.normal_(final.weight, std=0.01)
        nn.init.constant_(final.bias, final_bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [self.layers(level) for level in features]


class RetinaNet(nn.Module):
    """Backbone with a feature pyramid, one classification and one box tower.

    Args:
        backbone: module giving an ordered dict of maps; has `out_channels` and `strides`.
        num_classes: K, foreground classes only.
        anchor_scale: smallest anchor edge of a level in units of the level's stride.
        tower_depth: hidden 3x3 convolutions in each tower.
        group_norm: normalise the towers (training from scratch needs it).
        prior: initial score of every anchor, so that the many negatives do not swamp the first steps.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        anchor_scale: float,
        tower_depth: int = 2,
        group_norm: bool = True,
        prior: float = 0.01,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.strides = tuple(backbone.strides)
        self.anchor_scale = anchor_scale
        self.anchor_generator = make_anchor_generator(self.strides, anchor_scale)
        anchors_per_cell = self.anchor_generator.num_anchors_per_location()[0]
        channels = backbone.out_channels
        self.cls_tower = Tower(
            channels, anchors_per_cell * num_classes, tower_depth, group_norm, -math.log((1 - prior) / prior)
        )
        self.box_tower = Tower(channels, anchors_per_cell * 4, tower_depth, group_norm, 0.0)
        self._anchor_cache: dict[tuple, Tensor] = {}

    def forward(self, images: Tensor) -> HeadMaps:
        """images (N, 3, H, W) float, normalised -> raw level maps."""
        features = list(self.backbone(images).values())
        return HeadMaps(self.cls_tower(features), self.box_tower(features))

    def anchors(self, maps: HeadMaps) -> Tensor:
        """Anchors (R, 4) float32 of these maps in the order level, h, w, a; the same for every image of a batch."""
        grid = tuple(tuple(level.shape[-2:]) for level in maps.bbox_deltas)
        device = maps.bbox_deltas[0].device
        key = (grid, device)
        if key not in self._anchor_cache:
            if len(self._anchor_cache) >= 16:  # multi-scale training must not collect anchors for ever
                self._anchor_cache.clear()
            self._anchor_cache[key] = grid_anchors(self.anchor_generator, grid, self.strides, device)
        return self._anchor_cache[key]

    def __deepcopy__(self, memo: dict) -> RetinaNet:
        # The cache stays behind: it can be made again on whatever device the copy moves to.
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__ = {k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "_anchor_cache"}
        copied._anchor_cache = {}
        return copied

    @torch.no_grad()
    def detect(
        self,
        images: Tensor,
        *,
        score_threshold: float = 0.02,
        candidates: int = 400,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
    ) -> list[dict[str, Tensor]]:
        """Detections of a batch (N, 3, H, W): per image boxes (D, 4) in its pixels, scores (D,), labels (D,) int64.

        The best `candidates` (anchor, class) pairs above `score_threshold` pass NMS per class; the best
        `max_detections` stay.
        """
        maps = self(images)
        logits = flatten_maps(maps.cls_logits, self.num_classes).float()
        deltas = flatten_maps(maps.bbox_deltas, 4).float()
        anchors = self.anchors(maps)
        return [
            _detections_of_image(
                logits[n],
                deltas[n],
                anchors,
                images.shape[-2:],
                score_threshold,
                candidates,
                nms_threshold,
                max_detections,
            )
            for n in range(images.shape[0])
        ]


def make_anchor_generator(strides: tuple[int, ...], anchor_scale: float) -> AnchorGenerator:
    """torchvision's generator with three octaves and three ratios per level; edges start at stride * anchor_scale."""
    sizes = tuple(tuple(stride * anchor_scale * octave for octave in OCTAVE) for stride in strides)
    return AnchorGenerator(sizes, (ASPECT_RATIOS,) * len(strides))


def grid_anchors(
    generator: AnchorGenerator, grid: tuple[tuple[int, int], ...], strides: tuple[int, ...], device: torch.device
) -> Tensor:
    """Anchors (R, 4) of the given map sizes. The strides are stated: AnchorGenerator's own division of the image's
    size by the map's is wrong for sizes that the stride does not divide."""
    generator.set_cell_anchors(torch.float32, device)
    stride_tensors = [[torch.tensor(s, dtype=torch.int64, device=device)] * 2 for s in strides]
    return torch.cat(generator.grid_anchors([list(size) for size in grid], stride_tensors))


def flatten_maps(maps: list[Tensor], channels: int) -> Tensor:
    """Level maps (N, A*channels, H, W) -> (N, R, channels) in the order level, h, w, a. Copies: for inference only."""
    return torch.cat([m.permute(0, 2, 3, 1).reshape(m.shape[0], -1, channels) for m in maps], dim=1)


def _detections_of_image(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    image_size: torch.Size,
    score_threshold: float,
    candidates: int,
    nms_threshold: float,
    max_detections: int,
) -> dict[str, Tensor]:
    num_classes = logits.shape[-1]
    if not (torch.isfinite(logits).all() and torch.isfinite(deltas).all()):
        raise NonFiniteError(
            "RetinaNet.detect: the network's outputs are NaN or infinite, so its detections would mean nothing"
        )
    scores = logits.sigmoid().flatten()
    kept = (scores > score_threshold).nonzero().squeeze(1)
    scores, order = scores[kept].topk(min(candidates, kept.numel()))
    kept = kept[order]
    rows, labels = kept // num_classes, kept % num_classes
    boxes = ik.decode_boxes(deltas[rows], anchors[rows])
    boxes = clip_boxes_to_image(boxes, tuple(image_size))
    survivors = batched_nms(boxes, scores, labels, nms_threshold)[:max_detections]
    return {"boxes": boxes[survivors], "scores": scores[survivors], "labels": labels[survivors]}
