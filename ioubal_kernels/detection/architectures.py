"""The names of the detectors and what each stands for; no import of torch, so that the configuration is quick."""

from __future__ import annotations

from typing import NamedTuple

FAMILIES = ("retinanet", "foveabox", "ssd", "faster_rcnn")
OCTAVES = (1.0, 2.0 ** (1 / 3), 2.0 ** (2 / 3))
TINY_STRIDES = (8, 16, 32)
RETINANET_STRIDES = (8, 16, 32, 64, 128)
FASTER_RCNN_STRIDES = (4, 8, 16, 32, 64)
SSD_STEPS = {300: (8, 16, 32, 64, 100, 300), 512: (8, 16, 32, 64, 128, 256, 512)}


class Architecture(NamedTuple):
    """What a name stands for.

    family: one of FAMILIES.
    backbone: "tiny", "vgg16", or a ResNet: "r18", "r50", "r101", "x101_32x4d".
    strides: of the levels with anchors.
    octaves: anchor sizes of a level; none where the anchors do not follow model.anchor_scale.
    anchor_scale: smallest anchor edge in strides that "auto" stands for; None: chosen from the data's boxes.
    """

    family: str
    backbone: str
    strides: tuple[int, ...]
    octaves: tuple[float, ...] = ()
    anchor_scale: float | None = None

    @property
    def tiny(self) -> str:
        """The name of the same detector on the tiny backbone."""
        return f"{self.family}_tiny"


MODELS: dict[str, Architecture] = {
    "retinanet_tiny": Architecture("retinanet", "tiny", TINY_STRIDES, OCTAVES),
    "foveabox_tiny": Architecture("foveabox", "tiny", TINY_STRIDES, (), 2.0),
    "ssd_tiny": Architecture("ssd", "tiny", TINY_STRIDES),
    "faster_rcnn_tiny": Architecture("faster_rcnn", "tiny", TINY_STRIDES, (1.0,)),
    "retinanet_r18_fpn": Architecture("retinanet", "r18", RETINANET_STRIDES, OCTAVES, 4.0),
    "retinanet_r50_fpn": Architecture("retinanet", "r50", RETINANET_STRIDES, OCTAVES, 4.0),
    "retinanet_r101_fpn": Architecture("retinanet", "r101", RETINANET_STRIDES, OCTAVES, 4.0),
    "retinanet_x101_32x4d_fpn": Architecture("retinanet", "x101_32x4d", RETINANET_STRIDES, OCTAVES, 4.0),
    "foveabox_r50_fpn": Architecture("foveabox", "r50", RETINANET_STRIDES, (), 2.0),
    "ssd300_vgg16": Architecture("ssd", "vgg16", SSD_STEPS[300]),
    "ssd512_vgg16": Architecture("ssd", "vgg16", SSD_STEPS[512]),
    "faster_rcnn_r50_fpn": Architecture("faster_rcnn", "r50", FASTER_RCNN_STRIDES, (1.0,), 8.0),
    "faster_rcnn_r101_fpn": Architecture("faster_rcnn", "r101", FASTER_RCNN_STRIDES, (1.0,), 8.0),
}
MODEL_NAMES = tuple(MODELS)
