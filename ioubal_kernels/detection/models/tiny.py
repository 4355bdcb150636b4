"""A backbone of half a million parameters that learns small datasets from scratch within minutes on a CPU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork

from ..architectures import TINY_STRIDES
from .resnet import norm_layer


class TinyBackbone(nn.Module):
    """Two stride-2 convolutions, four residual blocks, and a pyramid P3-P5.

    Args:
        widths: channels of the four stages (strides 4, 8, 16, 32).
        out_channels: channels of every pyramid level.
        norm: "batch", or "group" (independent of the batch and of the number of processes).

    The output is an ordered dict of three maps (N, out_channels, H/8, W/8), (.., H/16, W/16), (.., H/32, W/32).
    """

    strides = TINY_STRIDES
    level_names = ("p3", "p4", "p5")

    def __init__(
        self, widths: tuple[int, int, int, int] = (32, 64, 128, 128), out_channels: int = 64, norm: str = "batch"
    ) -> None:
        super().__init__()
        layer = norm_layer(norm)
        self.stem = nn.Sequential(
            Conv2dNormActivation(3, widths[0], kernel_size=5, stride=2, norm_layer=layer),
            Conv2dNormActivation(widths[0], widths[0], kernel_size=3, stride=2, norm_layer=layer),
        )
        stages, previous = [], widths[0]
        for index, width in enumerate(widths):
            stages.append(_residual_block(previous, width, 1 if index == 0 else 2, layer))
            previous = width
        self.stages = nn.ModuleList(stages)
        self.fpn = FeaturePyramidNetwork(list(widths[1:]), out_channels)
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        features = self.stages[0](self.stem(images))
        maps = OrderedDict()
        for name, stage in zip(self.level_names, self.stages[1:], strict=True):
            features = stage(features)
            maps[name] = features
        return self.fpn(maps)


def _residual_block(in_channels: int, out_channels: int, stride: int, layer: Callable[[int], nn.Module]) -> BasicBlock:
    downsample = None
    if stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False), layer(out_channels)
        )
    return BasicBlock(in_channels, out_channels, stride, downsample, norm_layer=layer)
