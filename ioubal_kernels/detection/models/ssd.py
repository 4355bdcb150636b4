"""SSD300 and SSD512 on VGG16, and a small one: torchvision's model."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import vgg16
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD, SSDFeatureExtractorVGG, SSDHead

from ..architectures import SSD_STEPS

CHANNELS = {300: (512, 1024, 512, 256, 256, 256), 512: (512, 1024, 512, 256, 256, 256, 256)}
# The first level's default box in per cent of the image, by the image's size and the second level's: the authors'
# toolbox has these four.
FIRST_SCALE = {(300, 15): 7, (300, 20): 10, (512, 10): 4, (512, 15): 7}
LARGEST_SCALE = 90


def default_boxes(size: int, smallest: int) -> DefaultBoxGenerator:
    """The default boxes of SSD300 or SSD512.

    Args:
        size: 300 or 512.
        smallest: the second level's box in per cent of the image (15 for SSD300 on COCO, 20 on VOC; 10 and 15 for
            SSD512); the following ones rise evenly to 90.
    """
    levels = len(SSD_STEPS[size])
    step = (LARGEST_SCALE - smallest) // (levels - 2)
    scales = [FIRST_SCALE[size, smallest], *(smallest + step * level for level in range(levels))]
    ratios = [[2], *([[2, 3]] * (levels - 3)), [2], [2]]
    return DefaultBoxGenerator(ratios, scales=[scale / 100 for scale in scales], steps=list(SSD_STEPS[size]))


def ssd_vgg16(size: int, num_classes: int, smallest: int) -> SSD:
    """torchvision's SSD on VGG16, every layer trained as in the authors' toolbox.

    Args:
        size: 300 or 512: edge of the network's input.
        num_classes: K + 1, the background is class 0.
        smallest: see `default_boxes`.
    """
    features = vgg16(weights=None).features
    backbone = SSDFeatureExtractorVGG(features, highres=size == 512)
    generator = default_boxes(size, smallest)
    head = SSDHead(list(CHANNELS[size]), generator.num_anchors_per_location(), num_classes)
    return SSD(backbone, generator, (size, size), num_classes, head=head)


def vgg_key(key: str) -> str | None:
    """The name in a VGG16 file of a key of SSDFeatureExtractorVGG; None for the layers that SSD adds.

    torchvision cuts VGG's 30 feature layers after the fourth block's last convolution, before the fourth pooling
    (layer 23); fc6, fc7 and the extra levels are SSD's own.
    """
    parts = key.split(".")
    if parts[0] == "features":
        return key
    if parts[:2] == ["extra", "0"] and parts[2].isdigit() and int(parts[2]) + 23 < 30:
        return ".".join(["features", str(int(parts[2]) + 23), *parts[3:]])
    return None


def ssd_small(backbone: nn.Module, num_classes: int, strides: tuple[int, ...], size: tuple[int, int]) -> SSD:
    """SSD on a small backbone whose maps all have `out_channels`; default boxes from a tenth of the image to all of it.

    Args:
        backbone: module giving an ordered dict of maps.
        num_classes: K + 1, the background is class 0.
        strides: of the maps.
        size: height and width of the network's input.
    """
    levels = len(strides)
    smallest, largest = 0.1, 0.6
    scales = torch.linspace(0, 1, levels).mul(torch.log(torch.tensor(largest / smallest))).exp().mul(smallest).tolist()
    generator = DefaultBoxGenerator([[2, 3]] * levels, scales=[*scales, 1.0], steps=list(strides))
    head = SSDHead([backbone.out_channels] * levels, generator.num_anchors_per_location(), num_classes)
    return SSD(backbone, generator, size, num_classes, head=head)
