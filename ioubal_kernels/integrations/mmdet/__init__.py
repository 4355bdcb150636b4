"""The IoU-balanced losses for MMDetection 3.x: losses and heads in its registry MODELS, for its configs.

    custom_imports = dict(imports=['ioubal_kernels.integrations.mmdet'], allow_failed_imports=False)
    model = dict(
        bbox_head=dict(
            type='IoUBalancedRetinaHead',
            loss_cls=dict(type='IoUBalancedFocalLoss', use_sigmoid=True, eta=1.5),
            loss_bbox=dict(type='IoUBalancedSmoothL1Loss', beta=0.11, lambda_=1.5, loss_weight=3.049)))

The sums of Eq. 4 and 7 run over what one call of a loss sees, as in the authors' code: a pyramid level (RetinaNet,
RPN), an image (SSD), the batch of one process (FoveaBox, R-CNN).
"""

from __future__ import annotations

try:
    from .dense_heads import (
        IoUBalancedAnchorHeadMixin,
        IoUBalancedFoveaHead,
        IoUBalancedRetinaHead,
        IoUBalancedRPNHead,
        IoUBalancedSSDHead,
    )
    from .losses import IoUBalancedCrossEntropyLoss, IoUBalancedFocalLoss, IoUBalancedSmoothL1Loss
    from .roi_heads import IoUBalancedBBoxHeadMixin, IoUBalancedShared2FCBBoxHead
except ImportError as error:
    raise ImportError(
        "ioubal_kernels.integrations.mmdet: needs MMDetection 3 with its mmcv and mmengine (tested with mmdet 3.3.0,"
        f" mmcv 2.1.0, mmengine 0.10.7), whose import failed: {error}. Install them with: pip install openmim && mim"
        " install mmengine==0.10.7 mmcv==2.1.0 mmdet==3.3.0 (https://mmdetection.readthedocs.io says more)"
    ) from error

__all__ = [
    "IoUBalancedAnchorHeadMixin",
    "IoUBalancedBBoxHeadMixin",
    "IoUBalancedCrossEntropyLoss",
    "IoUBalancedFocalLoss",
    "IoUBalancedFoveaHead",
    "IoUBalancedRPNHead",
    "IoUBalancedRetinaHead",
    "IoUBalancedSSDHead",
    "IoUBalancedShared2FCBBoxHead",
    "IoUBalancedSmoothL1Loss",
]
