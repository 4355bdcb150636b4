"""Fused IoU-balanced losses for object detection, after Wu et al., "IoU-balanced Loss Functions".

The public names are exported here; each function's docstring is its contract.
"""

from . import analysis
from ._version import __version__
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
from .losses import (
    IoUBalancedBinaryCrossEntropy,
    IoUBalancedCrossEntropy,
    IoUBalancedLoss,
    IoUBalancedSigmoidFocalLoss,
    IoUBalancedSmoothL1Loss,
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
    "__version__",
    "analysis",
    "available_backends",
    "calibrate_w_loc",
    "decode_boxes",
    "delta_iou",
    "encode_boxes",
    "iou_balanced_binary_cross_entropy",
    "iou_balanced_cross_entropy",
    "iou_balanced_detection_loss",
    "iou_balanced_sigmoid_focal_loss",
    "iou_balanced_smooth_l1_loss",
    "paired_box_iou",
    "use_backend",
]
