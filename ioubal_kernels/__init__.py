"""Fused IoU-balanced losses for object detection, after Wu et al., "IoU-balanced Loss Functions".

The public names are exported here; each function's docstring is its contract.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import analysis
    from .backends import available_backends, use_backend
    from .boxes import BACKGROUND, IGNORE
    from .calibration import calibrate_w_loc
    from .functional import (
        decode_boxes,
        delta_iou,
        encode_boxes,
        iou_balanced_binary_cross_entropy,
        iou_balanced_cross_entropy,
        iou_balanced_sigmoid_focal_loss,
        iou_balanced_smooth_l1_loss,
        paired_box_iou,
    )
    from .functional_detection import DetectionLoss, iou_balanced_detection_loss
    from .functional_matching import MATCHING_RULES, match_anchors, match_fovea
    from .losses import (
        IoUBalancedBinaryCrossEntropy,
        IoUBalancedCrossEntropy,
        IoUBalancedLoss,
        IoUBalancedSigmoidFocalLoss,
        IoUBalancedSmoothL1Loss,
        RetinaNetLoss,
    )

__all__ = [
    "BACKGROUND",
    "IGNORE",
    "DetectionLoss",
    "IoUBalancedBinaryCrossEntropy",
    "IoUBalancedCrossEntropy",
    "IoUBalancedLoss",
    "IoUBalancedSigmoidFocalLoss",
    "IoUBalancedSmoothL1Loss",
    "MATCHING_RULES",
    "RetinaNetLoss",
    "__version__",
    "analysis",
    "available_backends",
    "calibrate_w_loc",
    "decode_boxes",
    "delta_iou",
    "encode_boxes",
    "integrations",
    "iou_balanced_binary_cross_entropy",
    "iou_balanced_cross_entropy",
    "iou_balanced_detection_loss",
    "iou_balanced_sigmoid_focal_loss",
    "iou_balanced_smooth_l1_loss",
    "match_anchors",
    "match_fovea",
    "paired_box_iou",
    "use_backend",
]


# Loaded at their first use: torch takes seconds to import, `ioubal --help` and `--version` need none of it, and the
# program sets how its threads wait before torch starts them.
_HOME = {
    "analysis": "analysis",
    "integrations": "integrations",
    "available_backends": "backends",
    "use_backend": "backends",
    "BACKGROUND": "boxes",
    "IGNORE": "boxes",
    "calibrate_w_loc": "calibration",
    "decode_boxes": "functional",
    "delta_iou": "functional",
    "encode_boxes": "functional",
    "iou_balanced_binary_cross_entropy": "functional",
    "iou_balanced_cross_entropy": "functional",
    "iou_balanced_sigmoid_focal_loss": "functional",
    "iou_balanced_smooth_l1_loss": "functional",
    "paired_box_iou": "functional",
    "DetectionLoss": "functional_detection",
    "iou_balanced_detection_loss": "functional_detection",
    "MATCHING_RULES": "functional_matching",
    "match_anchors": "functional_matching",
    "match_fovea": "functional_matching",
    "IoUBalancedBinaryCrossEntropy": "losses",
    "IoUBalancedCrossEntropy": "losses",
    "IoUBalancedLoss": "losses",
    "IoUBalancedSigmoidFocalLoss": "losses",
    "IoUBalancedSmoothL1Loss": "losses",
    "RetinaNetLoss": "losses",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_HOME[name]}", __name__)
    value = module if name == _HOME[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
