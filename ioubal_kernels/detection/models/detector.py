"""One interface over the networks: batches as the loader makes them in, named losses or detections out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from ioubal_kernels.integrations import torchvision as integration
from ioubal_kernels.integrations.torchvision.observing import Recording, last, positive_deltas, record_positives

from ..errors import NonFiniteError

# What torchvision calls a loss, and what the trainer does.
LOSS_NAMES = {
    "classification": "cls",
    "bbox_regression": "loc",
    "loss_classifier": "cls",
    "loss_box_reg": "loc",
    "loss_objectness": "rpn_cls",
    "loss_rpn_box_reg": "rpn_loc",
}


class PreparedImages:
    """Images that are resized, normalised and padded already, where torchvision's models expect a list of images.

    Attributes:
        tensors: float (N, 3, H, W).
        image_sizes: N pairs (height, width) without the padding.
    """

    def __init__(self, tensors: Tensor, image_sizes: Iterable[tuple[int, int]]) -> None:
        self.tensors = tensors
        self.image_sizes = [(int(height), int(width)) for height, width in image_sizes]

    def __len__(self) -> int:
        return len(self.image_sizes)

    def __iter__(self) -> Iterator[Tensor]:
        for image, (height, width) in zip(self.tensors, self.image_sizes, strict=True):
            yield image[:, :height, :width]


class PreparedTransform(GeneralizedRCNNTransform):
    """torchvision's transform, through which prepared images pass as they are; a list of images is treated as ever."""

    def forward(self, images, targets=None):
        if isinstance(images, PreparedImages):
            return ImageList(images.tensors, images.image_sizes), targets
        return super().forward(images, targets)


class _Float32:
    """Makes the anchors in float32. torchvision's generators take the feature maps' dtype: under bfloat16 autocast,
    which has 8 digits, anchors a thousand pixels to the right would be off by four.
    """

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        device = feature_maps[0].device
        shapes = [torch.empty(1, device=device).expand(level.shape) for level in feature_maps]
        return super().forward(image_list, shapes)


class Float32AnchorGenerator(_Float32, AnchorGenerator):
    """torchvision's AnchorGenerator in float32."""


class Float32DefaultBoxGenerator(_Float32, DefaultBoxGenerator):
    """torchvision's DefaultBoxGenerator in float32."""


_GENERATORS = {AnchorGenerator: Float32AnchorGenerator, DefaultBoxGenerator: Float32DefaultBoxGenerator}


class Detector(nn.Module):
    """A network of torchvision's calling convention, with what the trainer needs to know about it.

    Args:
        network: a torchvision detector or FoveaBox.
        family: "retinanet", "foveabox", "ssd" or "faster_rcnn".
        background_first: the network's class 0 is the background; the trainer's labels are one less.

    The network holds everything that is trained: `detector.network.state_dict()` is torchvision's.
    """

    def __init__(self, network: nn.Module, family: str, *, background_first: bool) -> None:
        super().__init__()
        network.transform.__class__ = PreparedTransform
        for module in network.modules():
            module.__class__ = _GENERATORS.get(type(module), type(module))
        self.network = network
        self.family = family
        self.offset = int(background_first)
        for module in self._heads():
            module.register_forward_hook(_float32_and_finite)

    def _heads(self) -> list[nn.Module]:
        """The modules whose outputs become scores and boxes."""
        if self.family == "faster_rcnn":
            return [self.network.rpn.head, self.network.roi_heads.box_predictor]
        if self.family == "foveabox":
            return [self.network.cls_tower, self.network.box_tower]
        return [self.network.head]

    def set_inference(
        self, *, score_threshold: float, nms_threshold: float, candidates: int, max_detections: int
    ) -> None:
        """How detections are chosen: `candidates` of a level (RetinaNet, FoveaBox), a class (SSD) or proposals of an
        image (Faster R-CNN) enter NMS.
        """
        if self.family == "faster_rcnn":
            heads = self.network.roi_heads
            heads.score_thresh, heads.nms_thresh = score_threshold, nms_threshold
            heads.detections_per_img = max_detections
            for limits in (self.network.rpn._pre_nms_top_n, self.network.rpn._post_nms_top_n):
                limits["testing"] = candidates
            return
        network = self.network
        network.score_thresh, network.nms_thresh = score_threshold, nms_threshold
        network.topk_candidates, network.detections_per_img = candidates, max_detections

    def balance(self, options: dict[str, Any], *, rpn: bool = False) -> None:
        """Give the network the losses that `options`, keyword arguments of `convert`, describe."""
        if self.family == "foveabox":
            self.network.iou_balanced = integration.Settings(**{k: v for k, v in options.items() if k != "rpn_w_loc"})
            return
        integration.convert(self.network, **options, rpn=rpn and self.family == "faster_rcnn")

    @property
    def _loss_module(self) -> nn.Module:
        return self.network.roi_heads if self.family == "faster_rcnn" else self.network

    def record_positives(self) -> AbstractContextManager[Recording]:
        """While the block runs, every training forward adds its positives to the recording."""
        return record_positives(self._loss_module)

    def statistics(self) -> dict[str, Tensor]:
        """Of the last training step: number of positives and the mean IoU of their boxes, 0-d each."""
        found = last(self._loss_module)
        return {"positives": found["num_positives"], "mean_iou": found["mean_iou"]}

    def collect_deltas(self, inputs: Iterable[tuple[Any, Any]], *, rpn: bool) -> list[tuple[Tensor, Tensor]]:
        """Predicted and target deltas of the positives; see `ik.integrations.torchvision.collect_deltas`."""
        if self.family == "foveabox":
            return positive_deltas(self.network, self.network, inputs)
        return integration.collect_deltas(self.network, inputs, rpn=rpn)

    def box_coder(self, rpn: bool) -> dict[str, Any]:
        """The coder of those deltas, as keyword arguments of `ik.calibrate_w_loc`."""
        if self.family == "foveabox":
            return {"box_coder": "fovea"}
        module = self.network.rpn if rpn else self.network
        coder = module.roi_heads.box_coder if self.family == "faster_rcnn" and not rpn else module.box_coder
        return {"box_weights": coder.weights}

    def targets(self, boxes: list[Tensor], labels: list[Tensor]) -> list[dict[str, Tensor]]:
        """torchvision's targets of gt boxes N x (G, 4) and the trainer's labels N x (G,)."""
        return [{"boxes": b, "labels": c + self.offset} for b, c in zip(boxes, labels, strict=True)]

    def forward(
        self, images: PreparedImages, boxes: list[Tensor] | None = None, labels: list[Tensor] | None = None
    ) -> Any:
        """In training: the losses by the trainer's names (cls, loc, and rpn_cls, rpn_loc of Faster R-CNN), each 0-d.
        Otherwise per image `boxes` (D, 4) in the pixels of `images`, `scores` (D,), `labels` (D,) int64 from 0 on.
        """
        if self.training:
            losses = self.network(images, self.targets(boxes, labels))
            return {LOSS_NAMES[name]: value for name, value in losses.items()}
        detections = self.network(images)
        return [{**found, "labels": found["labels"] - self.offset} for found in detections]


def _float32_and_finite(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Of a head in evaluation: its outputs in float32 (scores in bfloat16 would tie), and not NaN: torchvision's
    post-processing would silently find nothing.

    Of the RPN's in training as well: torchvision decodes proposals in its outputs' dtype and rounds the boxes that the
    second stage learns to theirs, by up to four pixels in bfloat16.
    """
    if module.training and not isinstance(module, RPNHead):
        return None

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(walk(each) for each in value)
        if not module.training and not torch.isfinite(value).all():
            raise NonFiniteError("the network's outputs are NaN or infinite, so its detections would mean nothing")
        return value.float()

    return walk(outputs)
