"""RetinaNet: torchvision's model on any of the backbones."""

from __future__ import annotations

from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead

from ..architectures import OCTAVES
from .resnet import norm_layer

ASPECT_RATIOS = (0.5, 1.0, 2.0)


def make_anchor_generator(
    strides: tuple[int, ...], anchor_scale: float, octaves: tuple[float, ...] = OCTAVES
) -> AnchorGenerator:
    """torchvision's generator with three ratios in each octave of a level; edges start at stride * anchor_scale."""
    sizes = tuple(tuple(stride * anchor_scale * octave for octave in octaves) for stride in strides)
    return AnchorGenerator(sizes, (ASPECT_RATIOS,) * len(strides))


def retinanet(
    backbone: nn.Module,
    num_classes: int,
    strides: tuple[int, ...],
    anchor_scale: float,
    *,
    group_norm: bool,
    tower_depth: int = 4,
) -> RetinaNet:
    """torchvision's RetinaNet.

    Args:
        backbone: module giving an ordered dict of maps; has `out_channels`.
        num_classes: K, foreground classes only: labels are the channels' indices.
        strides: of the backbone's levels.
        anchor_scale: smallest anchor edge of a level in units of its stride (the paper's detectors: 4).
        group_norm: normalise the towers, which training from scratch needs.
        tower_depth: hidden convolutions of each tower, at most 4.
    """
    generator = make_anchor_generator(strides, anchor_scale)
    head = RetinaNetHead(
        backbone.out_channels,
        generator.num_anchors_per_location()[0],
        num_classes,
        norm_layer=norm_layer("group") if group_norm else None,
    )
    for part in (head.classification_head, head.regression_head):
        part.conv = part.conv[:tower_depth]
    return RetinaNet(backbone, num_classes, anchor_generator=generator, head=head)
