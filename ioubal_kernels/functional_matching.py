"""The public matching functions: which gt box an anchor or a cell has to predict, for a whole batch in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from . import backends, validation
from .boxes import result_dtype
from .validation import FLOAT_DTYPES, INDEX_DTYPES, fail_type, fail_value

MATCHING_RULES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "retinanet": MappingProxyType({"high": 0.5, "low": 0.4, "allow_low_quality": True, "force_best": False}),
        "rpn": MappingProxyType({"high": 0.7, "low": 0.3, "allow_low_quality": True, "force_best": False}),
        "roi_heads": MappingProxyType({"high": 0.5, "low": 0.5, "allow_low_quality": False, "force_best": False}),
        "ssd": MappingProxyType({"high": 0.5, "low": 0.5, "allow_low_quality": False, "force_best": True}),
    }
)
"""Keyword arguments of ``match_anchors`` that make it the matcher of torchvision's model of that name: "retinanet",
"rpn", "roi_heads", "ssd". Read-only.
"""
FOVEA_STRIDES = (8, 16, 32, 64, 128)
FOVEA_SCALE_RANGES = ((1, 64), (32, 128), (64, 256), (128, 512), (256, 2048))


def match_anchors(
    anchors: Tensor,
    gt_boxes: Tensor | Sequence[Tensor],
    *,
    gt_labels: Tensor | Sequence[Tensor] | None = None,
    high: float = 0.5,
    low: float = 0.4,
    allow_low_quality: bool = True,
    force_best: bool = False,
    dtype: torch.dtype = torch.int64,
    backend: str | None = None,
) -> Tensor:
    """Which gt box each anchor has to predict: torchvision's ``box_iou`` and ``Matcher`` for a whole batch, without the
    R x G matrix of IoUs and without a host synchronisation.

    An anchor's box is the one with which its IoU is largest; of equal ones the first. With an IoU of at least `high`
    the anchor is matched, below `low` it is background, between them it is ignored. N images, R anchors per image, G gt
    boxes of an image. No gradient. ``MATCHING_RULES`` has the arguments of torchvision's models; the defaults are
    RetinaNet's.

    Args:
        anchors: (R, 4) or (N, R, 4) ``x1 y1 x2 y2``, any float dtype.
        gt_boxes: list of N tensors (G_i, 4), G_i may be 0; or padded (N, G, 4), where a NaN coordinate says that a
            place holds no box. Any float dtype, that of the anchors or another.
        gt_labels: optional; as in ``iou_balanced_detection_loss``, list of N tensors (G_i,) or padded (N, G), int32 or
            int64. A place whose label is -1 holds no box either, whatever its coordinates.
        high, low: the two thresholds on the IoU, both inclusive, 0 <= low <= high.
        allow_low_quality: every anchor whose IoU with some box is the largest that this box has with any anchor (with
            all its ties) is matched to its own best box, whatever their IoU. As in torchvision, a box that no anchor
            overlaps has a largest IoU of 0, so that all anchors of that image are matched.
        force_best: afterwards the anchor with the largest IoU of each box (the first such anchor) is matched to that
            very box; where one anchor is the best of several boxes, to the last of them (SSD's rule).
        dtype: torch.int64 or torch.int32, of the result.
        backend: "cpu", "cuda", "triton", "reference" or None for the automatic choice.

    The IoU is computed in float32, in float64 as soon as one input is float64; half precision is converted first. Every
    decision equals torchvision's on boxes of that dtype, those on zero-area, inverted, infinite and overflowing boxes
    included: an IoU that is NaN (0 / 0) counts as larger than any other, as ``torch.max`` has it.

    Returns:
        (N, R) in `dtype`: index of a gt box of that image, -1 background, -2 ignored. An image without boxes has -1
        everywhere.

    Raises:
        TypeError, ValueError: for any argument that is not as above, before anything is computed. With checked values
            (IOUBAL_CHECK) also for a NaN coordinate in a list of boxes.
        RuntimeError: for a named backend that is absent here.
    """
    op = "match_anchors"
    validation.tensor(op, "anchors", anchors, FLOAT_DTYPES)
    if anchors.ndim not in (2, 3) or anchors.shape[-1] != 4:
        fail_value(op, "anchors", "have shape (R, 4) or (N, R, 4)", anchors)
    images = anchors.shape[0] if anchors.ndim == 3 else None
    first = _gt(op, gt_boxes, gt_labels, images, anchors.device, "anchors")
    validation.number(op, "high", high)
    validation.number(op, "low", low)
    if low > high:
        raise ValueError(f"{op}: low must be at most high, got low={low!r} and high={high!r}")
    validation.flag(op, "allow_low_quality", allow_low_quality)
    validation.flag(op, "force_best", force_best)
    _index_dtype(op, dtype)
    float64 = result_dtype(anchors, *first) is torch.float64
    impl = backends.choose(op, backend, anchors.device, float64)
    _check_values(op, gt_boxes)
    return impl.match_anchors(
        anchors,
        gt_boxes,
        gt_labels,
        high=high,
        low=low,
        allow_low_quality=allow_low_quality,
        force_best=force_best,
        dtype=dtype,
    )


def match_fovea(
    gt_boxes: Tensor | Sequence[Tensor],
    level_shapes: Sequence[tuple[int, int]],
    *,
    gt_labels: Tensor | Sequence[Tensor] | None = None,
    strides: Sequence[int] = FOVEA_STRIDES,
    scale_ranges: Sequence[tuple[float, float]] = FOVEA_SCALE_RANGES,
    sigma: float = 0.4,
    dtype: torch.dtype = torch.int64,
    backend: str | None = None,
) -> Tensor:
    """Which gt box each cell has to predict by FoveaBox (Kong et al., "FoveaBox: Beyond Anchor-based Object Detector"),
    as MMDetection's ``FoveaHead`` assigns them.

    A level takes the boxes whose size, the square root of their area, lies in its scale range (bounds included; areas
    are compared with the squared bounds, so that no rounding of a root decides). Such a box has the cells whose centre
    lies in it after its sides are shrunk by `sigma` about its centre; a shrunk box beyond the map has the nearest cells
    at the border. Where boxes share a cell, the smallest has it, of equally small ones the last. No gradient.

    Args:
        gt_boxes, gt_labels, dtype, backend: as in ``match_anchors``.
        level_shapes: (height, width) in cells of each of the L levels.
        strides: L ints, the pixels of a cell's side. Cell (0, 0) has its centre at (stride / 2, stride / 2).
        scale_ranges: L pairs (smallest, largest) of sizes in pixels, 0 <= smallest <= largest.
        sigma: in (0, 1].

    Returns:
        (N, R) in `dtype`, R the number of cells in the order level, h, w: index of a gt box of that image or -1. This
        is ``matched_idxs`` of ``iou_balanced_detection_loss`` with box_coder="fovea" and one anchor per location.

    Raises:
        TypeError, ValueError, RuntimeError: as ``match_anchors``.
    """
    op = "match_fovea"
    first = _gt(op, gt_boxes, gt_labels, None, None, "gt_boxes")
    _levels(op, level_shapes, strides, scale_ranges)
    validation.number(op, "sigma", sigma, high=1.0)
    if sigma == 0:
        fail_value(op, "sigma", "be positive", sigma)
    _index_dtype(op, dtype)
    device = first[0].device if first else torch.device("cpu")
    impl = backends.choose(op, backend, device, result_dtype(*first) is torch.float64)
    _check_values(op, gt_boxes)
    return impl.match_fovea(
        gt_boxes,
        gt_labels,
        level_shapes=[(int(height), int(width)) for height, width in level_shapes],
        strides=list(strides),
        scale_ranges=[(float(smallest), float(largest)) for smallest, largest in scale_ranges],
        sigma=sigma,
        dtype=dtype,
    )


def _gt(op: str, boxes: Any, labels: Any, images: int | None, device: torch.device | None, of: str) -> list[Tensor]:
    """Check gt boxes and labels; returns one tensor of boxes, or none for an empty list."""
    count = "N" if images is None else images
    if isinstance(boxes, Tensor):
        validation.tensor(op, "gt_boxes", boxes, FLOAT_DTYPES)
        if boxes.ndim != 3 or boxes.shape[2] != 4 or (images is not None and boxes.shape[0] != images):
            fail_value(op, "gt_boxes", f"have shape ({count}, G, 4), or be a list of {count} tensors (G_i, 4)", boxes)
        if device is not None and boxes.device != device:
            fail_value(op, "gt_boxes", f"be on {device} like {of}", boxes)
        if labels is not None:
            if not isinstance(labels, Tensor):
                fail_type(op, "gt_labels", "be a padded tensor (N, G) because gt_boxes is one", labels)
            validation.like(op, "gt_labels", labels, INDEX_DTYPES, boxes.shape[:2], boxes.device, "gt_boxes")
        return [boxes]
    if not isinstance(boxes, (list, tuple)):
        fail_type(op, "gt_boxes", "be a list of tensors (G_i, 4) or a padded tensor (N, G, 4)", boxes)
    if images is not None and len(boxes) != images:
        fail_value(op, "gt_boxes", f"have one tensor for each of the {images} images of anchors", boxes)
    if labels is not None and not isinstance(labels, (list, tuple)):
        fail_type(op, "gt_labels", "be a list because gt_boxes is a list", labels)
    if labels is not None and len(labels) != len(boxes):
        fail_value(op, "gt_labels", f"have {len(boxes)} tensors like gt_boxes", labels)
    for i, each in enumerate(boxes):
        name = f"gt_boxes[{i}]"
        validation.tensor(op, name, each, FLOAT_DTYPES)
        if each.ndim != 2 or each.shape[1] != 4:
            fail_value(op, name, "have shape (G_i, 4)", each)
        like, where = (boxes[0].device, "gt_boxes[0]") if device is None else (device, of)
        if each.device != like:
            fail_value(op, name, f"be on {like} like {where}", each)
        if each.dtype != boxes[0].dtype:
            fail_type(op, name, f"have dtype {boxes[0].dtype} like gt_boxes[0]", each)
        if labels is not None:
            validation.like(op, f"gt_labels[{i}]", labels[i], INDEX_DTYPES, each.shape[:1], each.device, name)
            if labels[i].dtype != labels[0].dtype:
                fail_type(op, f"gt_labels[{i}]", f"have dtype {labels[0].dtype} like gt_labels[0]", labels[i])
    return list(boxes[:1])


def _levels(op: str, shapes: Any, strides: Any, scale_ranges: Any) -> None:
    for name, value in (("level_shapes", shapes), ("strides", strides), ("scale_ranges", scale_ranges)):
        if not isinstance(value, (list, tuple)):
            fail_type(op, name, "be a list with one entry per level", value)
        if len(value) != len(shapes):
            fail_value(op, name, f"have {len(shapes)} entries like level_shapes", value)
    for i, shape in enumerate(shapes):
        for name, pair in ((f"level_shapes[{i}]", shape), (f"scale_ranges[{i}]", scale_ranges[i])):
            if not isinstance(pair, (list, tuple, torch.Size)) or len(pair) != 2:
                fail_type(op, name, "be a pair of numbers", pair)
        for j in range(2):
            validation.integer(op, f"level_shapes[{i}][{j}]", shape[j], 0)
            validation.number(op, f"scale_ranges[{i}][{j}]", scale_ranges[i][j])
        if scale_ranges[i][0] > scale_ranges[i][1]:
            fail_value(op, f"scale_ranges[{i}]", "be (smallest, largest) with smallest <= largest", scale_ranges[i])
        validation.integer(op, f"strides[{i}]", strides[i], 1)


def _index_dtype(op: str, dtype: Any) -> None:
    if dtype not in INDEX_DTYPES:
        raise TypeError(f"{op}: dtype must be torch.int32 or torch.int64, got {dtype!r}")


def _check_values(op: str, boxes: Any) -> None:
    """A NaN in a list of boxes is a mistake, where it marks a padded place."""
    if isinstance(boxes, Tensor) or not boxes or not validation.values_checked(boxes[0]):
        return
    for i, each in enumerate(boxes):
        bad = each.isnan().any(1) if each.numel() else None
        if bad is not None and bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"{op}: gt_boxes must have no NaN coordinate in a list (in a padded tensor it marks a place without a"
                f" box), got {each[row].tolist()} at gt_boxes[{i}][{row}]"
            )
