"""The detectors the trainer knows by name."""

from __future__ import annotations

from .resnet import STRIDES as RESNET_STRIDES
from .resnet import load_backbone_file, resnet_fpn
from .retinanet import HeadMaps, RetinaNet
from .tiny import TinyBackbone

MODEL_NAMES = ("retinanet_tiny", "retinanet_r18_fpn", "retinanet_r50_fpn")
MODEL_STRIDES = {
    "retinanet_tiny": TinyBackbone.strides,
    "retinanet_r18_fpn": RESNET_STRIDES,
    "retinanet_r50_fpn": RESNET_STRIDES,
}

__all__ = ["MODEL_NAMES", "MODEL_STRIDES", "HeadMaps", "RetinaNet", "build_model"]


def build_model(
    name: str,
    num_classes: int,
    anchor_scale: float,
    *,
    backbone_file: str | None = None,
    backbone_sha256: str | None = None,
    frozen_backbone: bool = False,
) -> RetinaNet:
    """A freshly initialised RetinaNet; the initialisation depends on torch's current random state only.

    Args:
        name: one of MODEL_NAMES.
        num_classes: K, foreground classes.
        anchor_scale: smallest anchor edge of a level in strides.
        backbone_file, backbone_sha256: ResNet state dict and its digest (ResNet models only).
        frozen_backbone: build the form that a backbone file gives (fixed BatchNorm) without reading one.
    """
    if name not in MODEL_NAMES:
        raise ValueError(f"build_model: name must be one of {', '.join(MODEL_NAMES)}, got {name!r}")
    if name == "retinanet_tiny":
        return RetinaNet(TinyBackbone(), num_classes, anchor_scale=anchor_scale, tower_depth=2, group_norm=True)
    frozen = frozen_backbone or backbone_file is not None
    backbone = resnet_fpn(name.split("_")[1], frozen=frozen)
    if backbone_file is not None:
        load_backbone_file(backbone.body, backbone_file, backbone_sha256)
    # Without a backbone file nothing is pretrained, and towers without normalisation would hardly start to learn.
    return RetinaNet(backbone, num_classes, anchor_scale=anchor_scale, tower_depth=4, group_norm=not frozen)
