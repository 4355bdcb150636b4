"""The detectors the trainer knows by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..architectures import MODELS, Architecture
from .backbone_file import load_backbone_file
from .detector import Detector, PreparedImages
from .faster_rcnn import class_specific_weights, faster_rcnn
from .foveabox import FoveaBox
from .resnet import resnet_fpn
from .retinanet import retinanet
from .ssd import ssd_small, ssd_vgg16, vgg_key
from .tiny import TinyBackbone

__all__ = [
    "Detector",
    "FoveaBox",
    "PreparedImages",
    "build_model",
    "class_specific_weights",
]


def build_model(
    name: str,
    num_classes: int,
    *,
    anchor_scale: float | None = None,
    size: tuple[int, int] | None = None,
    smallest: int = 15,
    norm: str = "batch",
    backbone_file: str | None = None,
    backbone_sha256: str | None = None,
) -> Detector:
    """A freshly initialised detector; the initialisation depends on torch's current random state only.

    Args:
        name: one of architectures.MODELS.
        num_classes: K, foreground classes.
        anchor_scale: smallest anchor edge of a level in strides; None: the architecture's own (4.0 where it has none).
        size: height and width of the network's input, which the default boxes of "ssd_tiny" are made for.
        smallest: of SSD300 and SSD512, see `ssd.default_boxes`.
        norm: of the backbone: "batch", "sync", "group", or "frozen", the form for weights from a file.
        backbone_file, backbone_sha256: state dict and its digest (not of the tiny models).
    """
    if name not in MODELS:
        raise ValueError(f"build_model: name must be one of {', '.join(MODELS)}, got {name!r}")
    architecture = MODELS[name]
    scale = anchor_scale or architecture.anchor_scale or 4.0
    if architecture.backbone == "tiny":
        network = _tiny(architecture, num_classes, scale, size, norm)
    elif architecture.backbone == "vgg16":
        network = ssd_vgg16(512 if name == "ssd512_vgg16" else 300, num_classes + 1, smallest)
    else:
        network = _resnet(architecture, num_classes, scale, norm)
    if backbone_file is not None:
        body, key_of = _pretrained_part(network, architecture)
        load_backbone_file(body, backbone_file, backbone_sha256, key_of)
    background_first = architecture.family in ("ssd", "faster_rcnn")
    return Detector(network, architecture.family, background_first=background_first)


def _resnet(architecture: Architecture, num_classes: int, scale: float, norm: str) -> nn.Module:
    backbone = resnet_fpn(architecture.backbone, norm, retinanet=architecture.family != "faster_rcnn")
    # Without a backbone file nothing is pretrained, and towers without normalisation would hardly start to learn.
    group_norm = norm != "frozen"
    if architecture.family == "retinanet":
        return retinanet(backbone, num_classes, architecture.strides, scale, group_norm=group_norm)
    if architecture.family == "foveabox":
        return FoveaBox(backbone, num_classes, architecture.strides, base_scale=scale, group_norm=group_norm)
    levels = ("0", "1", "2", "3")  # the pooled level proposes, but RoIs are cut from the others
    return faster_rcnn(backbone, num_classes + 1, architecture.strides, scale, levels=levels)


def _tiny(
    architecture: Architecture, num_classes: int, scale: float, size: tuple[int, int] | None, norm: str
) -> nn.Module:
    backbone, strides = TinyBackbone(norm=norm), architecture.strides
    if architecture.family == "retinanet":
        return retinanet(backbone, num_classes, strides, scale, group_norm=True, tower_depth=2)
    if architecture.family == "foveabox":
        return FoveaBox(backbone, num_classes, strides, base_scale=scale, group_norm=True, tower_depth=2)
    if architecture.family == "ssd":
        return ssd_small(backbone, num_classes + 1, strides, size or (256, 256))
    return faster_rcnn(
        backbone,
        num_classes + 1,
        strides,
        scale,
        levels=TinyBackbone.level_names,
        hidden=128,
        rois=64,
        proposals=(100, 100),
    )


def _pretrained_part(network: nn.Module, architecture: Architecture) -> tuple[nn.Module, Callable[[str], str | None]]:
    """The module a backbone file has weights of, and the file's names of its keys."""
    if architecture.backbone == "vgg16":
        return network.backbone, vgg_key
    return network.backbone.body, lambda key: key
