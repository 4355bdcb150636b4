"""The compiled kernels as differentiable functions: names and arguments of ``reference``, already validated."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import reference
from .boxes import decode_boxes, delta_iou, encode_boxes, paired_box_iou
from .detection import detection_loss
from .flat import cross_entropy, sigmoid_focal_loss, smooth_l1_loss
from .library import available, load_error, op
from .matching import match_anchors, match_fovea

__all__ = [
    "available",
    "check_labels",
    "check_matched_idxs",
    "cross_entropy",
    "decode_boxes",
    "delta_iou",
    "detection_loss",
    "encode_boxes",
    "load_error",
    "match_anchors",
    "match_fovea",
    "paired_box_iou",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
]


def check_labels(labels: Tensor, num_classes: int, min_label: int) -> int:
    """Flat index of the first label outside [min_label, num_classes), or -1."""
    if labels.is_cuda:  # asked for by IOUBAL_CHECK=1: the host waits for the answer anyway
        return reference.check_labels(labels, num_classes, min_label)
    return op("check_labels", "cpu")(labels.contiguous(), num_classes, min_label)


def check_matched_idxs(matched_idxs: Tensor, gt_labels: Tensor | Sequence[Tensor], num_classes: int) -> int:
    """Flat index of the first matched index below -2, past its image's boxes, or whose box has no class; or -1."""
    if matched_idxs.is_cuda:
        return reference.check_matched_idxs(matched_idxs, gt_labels, num_classes)
    labels = [gt_labels] if isinstance(gt_labels, Tensor) else list(gt_labels)
    return op("check_matched_idxs", "cpu")(matched_idxs.contiguous(), [t.contiguous() for t in labels], num_classes)
