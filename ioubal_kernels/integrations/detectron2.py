"""The IoU-balanced losses for Detectron2's RetinaNet: the meta architecture `IoUBalancedRetinaNet`.

    import ioubal_kernels.integrations.detectron2 as ioubal_d2
    ioubal_d2.add_config(cfg)  # MODEL.RETINANET.IOU_BALANCED.*, before merging files
    cfg.MODEL.META_ARCHITECTURE = "IoUBalancedRetinaNet"

Detectron2's conventions stay: K classes and background K, ignored -1, both losses divided by the moving average of the
number of positives. Focal loss's alpha and gamma and smooth L1's beta are those of MODEL.RETINANET.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ioubal_kernels as ik

from .. import validation
from ..functional_detection import NORMALIZER_SCOPES

try:
    from detectron2.config import CfgNode, configurable
    from detectron2.modeling.meta_arch import META_ARCH_REGISTRY, RetinaNet
    from detectron2.utils.events import get_event_storage
except ImportError as error:
    raise ImportError(
        "ioubal_kernels.integrations.detectron2: needs Detectron2 (tested with its main of June 2026, named 0.6),"
        f" whose import failed: {error}. Install it with: pip install --no-build-isolation"
        " 'git+https://github.com/facebookresearch/detectron2.git'"
    ) from error

__all__ = ["DEFAULTS", "IoUBalancedRetinaNet", "add_config"]

# MODEL.RETINANET.IOU_BALANCED of a config; in lower case the keywords of IoUBalancedRetinaNet.
DEFAULTS: dict[str, Any] = {
    "ETA": 1.5,
    "LAMBDA": 1.5,
    "W_LOC": 1.0,
    "NORMALIZE_LOC": False,
    "NORMALIZER_SCOPE": "batch",
    "EPS": 0.0,
    "BACKEND": "",
    "LOG_PERIOD": 20,
}
# Detectron2's momentum is _ema_update's own; this is its first value.
_FIRST_NORMALIZER = 100


def add_config(cfg: CfgNode) -> None:
    """Add MODEL.RETINANET.IOU_BALANCED with its defaults, so that config files and command lines can set it.

    A node that is there keeps its values.
    """
    node = cfg.MODEL.RETINANET.get("IOU_BALANCED", {})
    cfg.MODEL.RETINANET.IOU_BALANCED = CfgNode({**DEFAULTS, **node})


@META_ARCH_REGISTRY.register()
class IoUBalancedRetinaNet(RetinaNet):
    """Detectron2's RetinaNet with IoU-balanced focal loss and smooth L1 (Eq. 3 to 7); inference is untouched.

    The losses are one fused call on the heads' maps as they are: nothing is transposed, concatenated or one-hot
    encoded, and nothing waits for the device except the logged scalars, every `log_period` iterations.

    Args:
        eta, lambda_: exponents of the IoU in the classification and the localisation weight, >= 0.
        w_loc: factor of the localisation loss; `ik.calibrate_w_loc` measures it.
        normalize_loc: True for Eq. 7's normalised localisation weight.
        normalizer_scope: what the sums of Eq. 4 and 7 run over: "batch", "level" or "image".
        eps: added to the normalisers' denominators.
        backend: of the kernels; None for the automatic choice.
        log_period: iterations between two entries of the scalars num_pos_anchors and mean_iou; 0 for none.
        keywords: RetinaNet's.

    Raises:
        ValueError: a box_reg_loss_type other than "smooth_l1", a box2box_transform without four weights, or an argument
            out of range.
        TypeError: an argument of another type.
    """

    @configurable
    def __init__(
        self,
        *,
        eta: float = 1.5,
        lambda_: float = 1.5,
        w_loc: float = 1.0,
        normalize_loc: bool = False,
        normalizer_scope: str = "batch",
        eps: float = 0.0,
        backend: str | None = None,
        log_period: int = 20,
        **keywords: Any,
    ) -> None:
        super().__init__(**keywords)
        op = type(self).__name__
        for name, value in {"eta": eta, "lambda_": lambda_, "w_loc": w_loc, "eps": eps}.items():
            validation.number(op, name, value)
        validation.flag(op, "normalize_loc", normalize_loc)
        validation.choice(op, "normalizer_scope", normalizer_scope, NORMALIZER_SCOPES)
        validation.integer(op, "log_period", log_period, 0)
        if self.box_reg_loss_type != "smooth_l1":
            raise ValueError(
                f"{op}: box_reg_loss_type (MODEL.RETINANET.BBOX_REG_LOSS_TYPE) must be 'smooth_l1', which the IoU"
                f" weights, got {self.box_reg_loss_type!r}"
            )
        weights = getattr(self.box2box_transform, "weights", ())
        if len(weights) != 4:
            raise ValueError(
                f"{op}: box2box_transform must be a Box2BoxTransform with four weights, got"
                f" {type(self.box2box_transform).__name__}"
            )
        self.log_period = log_period
        self.iou_balanced = {
            "eta": eta,
            "lambda_": lambda_,
            "w_loc": w_loc,
            "normalize_loc": normalize_loc,
            "normalizer_scope": normalizer_scope,
            "eps": eps,
            "backend": backend,
            # fvcore's focal loss takes a negative alpha as none.
            "alpha": self.focal_loss_alpha if self.focal_loss_alpha >= 0 else None,
            "gamma": self.focal_loss_gamma,
            "beta": self.smooth_l1_beta,
            "box_weights": tuple(weights),
        }

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """RetinaNet's arguments and this class's from MODEL.RETINANET.IOU_BALANCED, whose keys may be missing.

        Raises:
            ValueError: a key that is none of DEFAULTS.
        """
        node = cfg.MODEL.RETINANET.get("IOU_BALANCED", {})
        for key in node:
            if key not in DEFAULTS:
                raise validation.name_error(cls.__name__, "MODEL.RETINANET.IOU_BALANCED's key", tuple(DEFAULTS), key)
        options = {key.lower(): value for key, value in {**DEFAULTS, **node}.items()}
        options["lambda_"] = options.pop("lambda")
        options["backend"] = options["backend"] or None
        return {**super().from_config(cfg), **options}

    def forward_training(self, images: Any, features: Any, predictions: Any, gt_instances: Any) -> dict[str, Tensor]:
        """The losses; the heads' maps go there as they are, where RetinaNet transposes them first."""
        anchors = self.anchor_generator(features)
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, predictions[0], gt_labels, predictions[1], gt_boxes)

    def losses(
        self,
        anchors: list[Any],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Both losses.

        Args:
            anchors: Boxes of each level.
            pred_logits, pred_anchor_deltas: of each level (N, Hi*Wi*Ai, K) and (N, Hi*Wi*Ai, 4) as RetinaNet has them,
                or the heads' maps (N, Ai*K, Hi, Wi) and (N, Ai*4, Hi, Wi).
            gt_labels: N tensors (R,): class, K for background, -1 for ignored.
            gt_boxes: N tensors (R, 4), the matched box of each positive anchor.

        Returns:
            {"loss_cls", "loss_box_reg"}, 0-d each.
        """
        labels, boxes = torch.stack(gt_labels), torch.stack(gt_boxes)
        positive = (labels >= 0) & (labels != self.num_classes)
        # Every positive's box is its own entry of the image's list.
        own = torch.arange(labels.shape[1], device=labels.device)
        matched = torch.where(positive, own, torch.where(labels < 0, ik.IGNORE, ik.BACKGROUND))
        normalizer = self._normalizer(positive.sum())
        loss = ik.iou_balanced_detection_loss(
            [_as_map(level) for level in pred_logits],
            [_as_map(level) for level in pred_anchor_deltas],
            torch.cat([getattr(level, "tensor", level) for level in anchors]),
            matched,
            boxes,
            torch.where(positive, labels, -1),
            avg_factor=normalizer,
            **self.iou_balanced,
        )
        self._log(loss, len(gt_labels))
        return {"loss_cls": loss.classification, "loss_box_reg": loss.localization}

    def _normalizer(self, positives: Tensor) -> Tensor:
        """RetinaNet's moving average of the number of positives, as a 0-d tensor that stays on the device."""
        count = positives.clamp(min=1).float()
        kept = getattr(self, "loss_normalizer", None)
        if isinstance(kept, Tensor) and kept.device != count.device:
            self.loss_normalizer = kept.to(count.device)
        return self._ema_update("loss_normalizer", count, _FIRST_NORMALIZER)

    def _log(self, loss: ik.DetectionLoss, images: int) -> None:
        """RetinaNet's scalar, and the positives' mean IoU. Storing one waits for the device, hence the period."""
        storage = get_event_storage()
        if self.log_period and (storage.iter + 1) % self.log_period == 0:
            storage.put_scalar("num_pos_anchors", float(loss.num_positives) / images)
            storage.put_scalar("mean_iou", float(loss.mean_iou))


def _as_map(level: Tensor) -> Tensor:
    """A level (N, R_i, C) as the channels-last map (N, C, R_i, 1) of one anchor per location: a view, no copy."""
    return level if level.ndim == 4 else level.permute(0, 2, 1).unsqueeze(-1)
