"""ResNets and ResNeXt-101 with a feature pyramid, from torchvision's parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn
from torchvision.models import resnet18, resnet50, resnet101
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

# torchvision builds ResNeXt-101 with a width of 8 only.
BODIES: dict[str, Callable[..., ResNet]] = {
    "r18": partial(resnet18, weights=None),
    "r50": partial(resnet50, weights=None),
    "r101": partial(resnet101, weights=None),
    "x101_32x4d": partial(ResNet, Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4),
}


def norm_layer(name: str) -> Callable[[int], nn.Module]:
    """The layer that normalises `channels`: "batch", "sync" (over all processes, each on a GPU; alone it is "batch"),
    "group" (independent of the batch) or "frozen" (fixed).
    """
    layers: dict[str, Callable[[int], nn.Module]] = {
        "batch": nn.BatchNorm2d,
        "sync": nn.SyncBatchNorm,
        "frozen": FrozenBatchNorm2d,
        "group": lambda channels: nn.GroupNorm(min(32, channels), channels),
    }
    return layers[name]


def resnet_fpn(body: str, norm: str, *, retinanet: bool) -> BackboneWithFPN:
    """A ResNet with a pyramid of five 256-channel levels.

    Args:
        body: one of BODIES.
        norm: "batch", "group", or "frozen" for weights from a file: then the statistics stay, and stem and first stage
            are not trained.
        retinanet: levels of strides 8 to 128, P6 and P7 made from C5 as in the RetinaNet paper (torchvision's
            retinanet_resnet50_fpn_v2); else strides 4 to 64, the last one by pooling (Faster R-CNN).
    """
    network = BODIES[body](norm_layer=norm_layer(norm))
    if norm == "frozen":
        for name, parameter in network.named_parameters():
            if not name.startswith(("layer2", "layer3", "layer4")):
                parameter.requires_grad_(False)
    first = network.inplanes // 8
    stages = (2, 3, 4) if retinanet else (1, 2, 3, 4)
    channels = [first * 2 ** (stage - 1) for stage in stages]
    return BackboneWithFPN(
        network,
        return_layers={f"layer{stage}": str(number) for number, stage in enumerate(stages)},
        in_channels_list=channels,
        out_channels=256,
        extra_blocks=LastLevelP6P7(channels[-1], 256) if retinanet else LastLevelMaxPool(),
    )
