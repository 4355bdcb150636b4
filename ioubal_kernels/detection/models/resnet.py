"""ResNet-18 and ResNet-50 with a feature pyramid P3-P7, from torchvision's parts, and their backbone files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn
from torchvision.models import resnet18, resnet50
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from ..errors import UsageError

BUILDERS = {"r18": resnet18, "r50": resnet50}
STRIDES = (8, 16, 32, 64, 128)


def resnet_fpn(depth: str, *, frozen: bool = False) -> nn.Module:
    """ResNet with a pyramid of five 256-channel levels; P6 and P7 come from C5 as in the RetinaNet paper.

    Args:
        depth: "r18" or "r50".
        frozen: BatchNorm keeps its statistics, stem and first stage are not trained: for a backbone that comes from a
            file.
            Otherwise everything trains from scratch.
    """
    body = BUILDERS[depth](weights=None, norm_layer=FrozenBatchNorm2d if frozen else nn.BatchNorm2d)
    for name, parameter in body.named_parameters():
        if frozen and not name.startswith(("layer2", "layer3", "layer4")):
            parameter.requires_grad_(False)
    channels = [body.inplanes // 8 * factor for factor in (2, 4, 8)]
    backbone = BackboneWithFPN(
        body,
        return_layers={"layer2": "0", "layer3": "1", "layer4": "2"},
        in_channels_list=channels,
        out_channels=256,
        extra_blocks=LastLevelP6P7(channels[-1], 256),
    )
    backbone.strides = STRIDES
    return backbone


def load_backbone_file(body: nn.Module, path: str, sha256: str | None) -> None:
    """Load a torchvision ResNet state dict (.pth) into `body`; a classifier `fc` in it is left out. Never unpickles
    objects.

    Args:
        body: the ResNet inside the backbone.
        path: the file.
        sha256: its expected digest, or None.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"model.backbone_file: {file} is not a file")
    if sha256 is not None:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if digest != sha256.lower():
            raise UsageError(f"model.backbone_file: SHA-256 of {file} is {digest}, expected {sha256}")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a file that is no state dict
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"model.backbone_file: {file} is not a plain PyTorch state dict: {first_line}") from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UsageError(f"model.backbone_file: {file} holds {type(state).__name__}, expected a dict of tensors")
    own = body.state_dict()
    missing = sorted(set(own) - set(state))
    wrong = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if missing or wrong:
        raise UsageError(
            f"model.backbone_file: {file} does not fit this ResNet: missing {missing[:5]}, other shapes {wrong[:5]} "
            f"({len(missing)} missing, {len(wrong)} of another shape)"
        )
    body.load_state_dict({k: state[k] for k in own})
