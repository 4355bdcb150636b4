"""Every op by the name of its schema (ioubal_kernels/ops/library.py)."""

from __future__ import annotations

from collections.abc import Callable

from . import boxes, cross_entropy, detection, focal, matching, matching_fovea, rescale, smooth_l1

_LOSSES = {"focal": focal, "cross_entropy": cross_entropy, "smooth_l1": smooth_l1}
_BOXES = ("decode_boxes", "decode_boxes_backward", "encode_boxes", "paired_box_iou", "delta_iou")
OPS: dict[str, Callable[..., None]] = {
    **{f"detection_{step}": getattr(detection, f"detection_{step}") for step in ("sums", "fill", "backward")},
    **{
        f"{name}_{step}": getattr(module, f"{name}_{step}")
        for name, module in _LOSSES.items()
        for step in ("sums", "fill", "backward", "elementwise")
    },
    **{name: getattr(boxes, name) for name in _BOXES},
    "rescale": rescale.rescale,
    "match_anchors": matching.match_anchors,
    "match_fovea": matching_fovea.match_fovea,
}
