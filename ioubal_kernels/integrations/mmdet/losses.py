"""The losses with MMDetection's arguments: weight, avg_factor, reduction_override, background K.

A classification loss takes target=(labels, iou), as MMDetection's QualityFocalLoss does, so that heads written for that
one (GFLHead and its kind) work as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

import ioubal_kernels as ik

from ... import validation

# mmdet divides by avg_factor + this, so that 0 is legal.
_TINY = torch.finfo(torch.float32).eps
BOX_CODERS = ("delta", "fovea", "boxes")


class _Loss(nn.Module):
    """What the three losses share: reduction, loss_weight and mmdet's rules for both."""

    def __init__(self, reduction: str, loss_weight: float, eps: float, backend: str | None) -> None:
        super().__init__()
        validation.choice(self._name, "reduction", reduction, validation.REDUCTIONS)
        validation.number(self._name, "loss_weight", loss_weight)
        validation.number(self._name, "eps", eps)
        self.reduction = reduction
        self.loss_weight = loss_weight
        self.eps = eps
        self.backend = backend

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _keywords(self, elements: int, avg_factor: Any, override: str | None) -> dict[str, Any]:
        """reduction, avg_factor and the rest that every function takes.

        mmdet's "mean" without avg_factor divides by the number of elements; with "none" avg_factor is not looked at.
        """
        if override is not None:
            validation.choice(self._name, "reduction_override", override, validation.REDUCTIONS)
        reduction = override or self.reduction
        if reduction == "sum" and avg_factor is not None:
            raise ValueError(f"{self._name}: avg_factor must be None with reduction 'sum', got {avg_factor!r}")
        if reduction != "mean":
            avg_factor = None
        elif avg_factor is None:
            avg_factor = max(elements, 1)
        else:
            # reduce_mean gives mmdet's heads tensors of one element.
            if isinstance(avg_factor, Tensor) and avg_factor.numel() == 1:
                avg_factor = avg_factor.reshape(())
            avg_factor = avg_factor + _TINY
        return {
            "reduction": reduction,
            "avg_factor": avg_factor,
            "eps": self.eps,
            "backend": self.backend,
            # The loss is multiplied by loss_weight afterwards: the gradient prepared in the forward is the right one.
            "grad_scale": float(self.loss_weight) if self.loss_weight else 1.0,
        }

    def extra_repr(self) -> str:
        shown = {name: value for name, value in vars(self).items() if not name.startswith("_") and name != "training"}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class _ClassificationLoss(_Loss):
    use_sigmoid: bool
    eta: float

    def _rows(self, pred: Tensor, target: Any, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Labels (N,) in mmdet's terms, iou (N,), weight (N,) or None."""
        if not isinstance(pred, Tensor) or pred.ndim != 2:
            validation.fail_value(self._name, "pred", "have shape (N, C)", pred)
        if isinstance(target, Tensor) and self.eta == 0:
            labels, iou = target, pred.new_zeros(pred.shape[:1], dtype=torch.float32)
        elif isinstance(target, (tuple, list)) and len(target) == 2:
            labels, iou = target
        else:
            hint = (
                "labels alone leave nothing to balance by, so use a head that passes the IoU (IoUBalancedRetinaHead,"
                " IoUBalancedSSDHead, IoUBalancedFoveaHead, IoUBalancedShared2FCBBoxHead, or a GFL-style head)"
            )
            validation.fail_type(self._name, "target", f"be (labels, iou) unless eta is 0: {hint}", target)
        validation.like(
            self._name, "target[0]", labels, validation.INDEX_DTYPES, pred.shape[:1], pred.device, "the rows of pred"
        )
        validation.like(
            self._name, "target[1]", iou, validation.FLOAT_DTYPES, pred.shape[:1], pred.device, "the rows of pred"
        )
        return labels, iou, self._row_weight(weight, pred)

    def _row_weight(self, weight: Any, pred: Tensor) -> Tensor | None:
        if weight is None:
            return None
        rows = pred.shape[0]
        if not isinstance(weight, Tensor) or weight.shape not in ((rows,), (rows, 1)):
            validation.fail_value(
                self._name, "weight", f"have shape ({rows},) or ({rows}, 1), one weight for each row of pred", weight
            )
        return weight.reshape(rows).float() if not weight.is_floating_point() else weight.reshape(rows)

    def _check_labels(self, labels: Tensor, background: int) -> None:
        if validation.values_checked(labels) and labels.numel() and int(labels.max()) > background:
            raise ValueError(
                f"{self._name}: target[0] must hold classes from 0 to {background - 1} or {background} (background) for"
                f" these {'sigmoid' if self.use_sigmoid else 'softmax'} scores, got {int(labels.max())}"
            )


@MODELS.register_module()
class IoUBalancedFocalLoss(_ClassificationLoss):
    """IoU-balanced focal loss (Eq. 3 and 4 with the focal loss as CE), in place of mmdet's FocalLoss or
    QualityFocalLoss.

    Args:
        use_sigmoid: must be True; heads read it from the config, so write it there.
        gamma, alpha: the focal loss's; alpha=None for none.
        reduction: "mean", "sum" or "none".
        loss_weight: factor of the loss.
        activated: must be False: the loss takes logits.
        eta: exponent of the IoU, >= 0.
        beta: QualityFocalLoss's name for gamma, so that its configs need another `type` only.
        eps: added to Eq. 4's denominator.
        backend: of the kernels; None for the automatic choice.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.
    """

    def __init__(
        self,
        use_sigmoid: bool = True,
        gamma: float = 2.0,
        alpha: float | None = 0.25,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        activated: bool = False,
        *,
        eta: float = 1.5,
        beta: float | None = None,
        eps: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__(reduction, loss_weight, eps, backend)
        if use_sigmoid is not True:
            validation.fail_value(
                self._name, "use_sigmoid", "be True (softmax scores: IoUBalancedCrossEntropyLoss)", use_sigmoid
            )
        if activated is not False:
            validation.fail_value(self._name, "activated", "be False: pred are logits", activated)
        if beta is not None:
            if gamma not in (2.0, beta):
                validation.fail_value(self._name, "beta", f"be left out where gamma={gamma!r} is given", beta)
            gamma = beta
        validation.number(self._name, "gamma", gamma)
        validation.number(self._name, "eta", eta)
        if alpha is not None:
            validation.number(self._name, "alpha", alpha, high=1.0)
        self.use_sigmoid = True
        self.activated = False
        self.gamma = gamma
        self.alpha = alpha
        self.eta = eta

    def forward(
        self,
        pred: Tensor,
        target: tuple[Tensor, Tensor] | Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            pred: (N, C) logits.
            target: (labels, iou): (N,) int with classes in [0, C) and C for background (negative labels are background
                too, as in QualityFocalLoss), and (N,) IoU of the decoded box with its target, read at positives only.
                Labels alone are accepted if eta is 0.
            weight: (N,), of each row; 0 ignores it.
            avg_factor: divisor for reduction "mean"; default N * C, as in FocalLoss.
            reduction_override: "mean", "sum" or "none" instead of `reduction`.

        Returns:
            0-d, or (N, C) with reduction "none".

        Raises:
            TypeError, ValueError: an argument that is not as above.
        """
        labels, iou, weight = self._rows(pred, target, weight)
        background = pred.shape[1]
        self._check_labels(labels, background)
        labels = torch.where((labels < 0) | (labels == background), ik.BACKGROUND, labels)
        loss = ik.iou_balanced_sigmoid_focal_loss(
            pred,
            labels,
            iou,
            eta=self.eta,
            alpha=self.alpha,
            gamma=self.gamma,
            weight=weight,
            **self._keywords(pred.numel(), avg_factor, reduction_override),
        )
        return self.loss_weight * loss


@MODELS.register_module()
class IoUBalancedCrossEntropyLoss(_ClassificationLoss):
    """IoU-balanced cross entropy (Eq. 1, 3 and 4), in place of mmdet's CrossEntropyLoss.

    Args:
        use_sigmoid: False: softmax over C + 1 columns of which the last is the background. True: binary cross entropy
            on C columns (the RPN). Heads read it from the config, so write it there.
        reduction: "mean", "sum" or "none".
        loss_weight: factor of the loss.
        eta, eps, backend: as in IoUBalancedFocalLoss.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.
    """

    def __init__(
        self,
        use_sigmoid: bool = False,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        *,
        eta: float = 1.5,
        eps: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__(reduction, loss_weight, eps, backend)
        validation.flag(self._name, "use_sigmoid", use_sigmoid)
        validation.number(self._name, "eta", eta)
        self.use_sigmoid = use_sigmoid
        self.eta = eta

    def forward(
        self,
        pred: Tensor,
        target: tuple[Tensor, Tensor] | Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            pred: logits, (N, C + 1) with the background last; (N, C) with use_sigmoid.
            target: (labels, iou) as in IoUBalancedFocalLoss; negative labels (mmdet's ignore index -100) are ignored.
            weight: (N,), of each row; 0 ignores it.
            avg_factor: divisor for reduction "mean"; default N, with use_sigmoid N * C, as in CrossEntropyLoss.
            reduction_override: "mean", "sum" or "none" instead of `reduction`.

        Returns:
            0-d; with reduction "none" (N,), with use_sigmoid (N, C).

        Raises:
            TypeError, ValueError: an argument that is not as above.
        """
        labels, iou, weight = self._rows(pred, target, weight)
        rows, columns = pred.shape
        background = columns if self.use_sigmoid else columns - 1
        self._check_labels(labels, background)
        if self.use_sigmoid:
            labels = torch.where(labels == background, ik.BACKGROUND, labels.masked_fill(labels < 0, ik.IGNORE))
            keywords = self._keywords(pred.numel(), avg_factor, reduction_override)
            loss = ik.iou_balanced_binary_cross_entropy(pred, labels, iou, eta=self.eta, weight=weight, **keywords)
        else:
            keywords = self._keywords(rows, avg_factor, reduction_override)
            loss = ik.iou_balanced_cross_entropy(
                pred, labels, iou, eta=self.eta, background_index=background, weight=weight, **keywords
            )
        return self.loss_weight * loss


@MODELS.register_module()
class IoUBalancedSmoothL1Loss(_Loss):
    """IoU-balanced smooth L1 (Eq. 5 with Eq. 6, or Eq. 7), in place of mmdet's SmoothL1Loss or L1Loss.

    The IoU comes from pred and target themselves, so it works in every head, those of this package or not: two boxes
    encoded on one anchor have the same IoU on every anchor.

    Args:
        beta: smooth L1's threshold (the paper's delta); 0 is L1.
        reduction: "mean", "sum" or "none".
        loss_weight: w_loc, the factor of the loss; `ik.calibrate_w_loc` measures it.
        lambda_: exponent of the IoU, >= 0.
        normalize: True for Eq. 7's normalised weight.
        eps: added to Eq. 7's denominator.
        box_coder: what pred and target are: "delta" (DeltaXYWHBBoxCoder), "fovea" (FoveaHead's log-distances), or
            "boxes" (reg_decoded_bbox=True). None: this package's heads set it; elsewhere "delta".
        target_stds: DeltaXYWHBBoxCoder's, for "delta". None: this package's heads set them; elsewhere (1, 1, 1, 1).
        backend: of the kernels; None for the automatic choice.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.
    """

    def __init__(
        self,
        beta: float = 1 / 9,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        *,
        lambda_: float = 1.5,
        normalize: bool = False,
        eps: float = 0.0,
        box_coder: str | None = None,
        target_stds: Sequence[float] | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(reduction, loss_weight, eps, backend)
        validation.number(self._name, "beta", beta)
        validation.number(self._name, "lambda_", lambda_)
        validation.flag(self._name, "normalize", normalize)
        if box_coder is not None:
            validation.choice(self._name, "box_coder", box_coder, BOX_CODERS)
        if target_stds is not None:
            validation.four_weights(self._name, "target_stds", target_stds)
            target_stds = tuple(float(std) for std in target_stds)
        self.beta = beta
        self.lambda_ = lambda_
        self.normalize = normalize
        self.box_coder = box_coder
        self.target_stds = target_stds

    def configure(self, op: str, box_coder: str, target_stds: Sequence[float] | None = None) -> None:
        """Take over what a head knows of its boxes; called by this package's heads when they are built.

        Raises:
            ValueError: the config says something else.
        """
        known = {"box_coder": box_coder, "target_stds": target_stds and tuple(float(std) for std in target_stds)}
        for name, value in known.items():
            own = getattr(self, name)
            if own is not None and value is not None and own != value:
                raise ValueError(f"{op}: loss_bbox's {name} must be {value!r} as in the head, or left out, got {own!r}")
            setattr(self, name, own if value is None else value)

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            pred: (N, 4), in the terms of `box_coder`.
            target: (N, 4), likewise.
            weight: (N, 4), (N,) or (N, 1); rows of weight 0 have no loss.
            avg_factor: divisor for reduction "mean"; default N * 4, as in SmoothL1Loss.
            reduction_override: "mean", "sum" or "none" instead of `reduction`.

        Returns:
            0-d, or (N, 4) with reduction "none".

        Raises:
            TypeError, ValueError: an argument that is not as above.
        """
        if not isinstance(pred, Tensor) or pred.ndim != 2 or pred.shape[1] != 4:
            validation.fail_value(self._name, "pred", "have shape (N, 4)", pred)
        validation.like(self._name, "target", target, validation.FLOAT_DTYPES, pred.shape, pred.device, "pred")
        if weight is not None:
            rows = pred.shape[0]
            if not isinstance(weight, Tensor) or weight.shape not in ((rows,), (rows, 1), (rows, 4)):
                validation.fail_value(self._name, "weight", f"have shape ({rows}, 4), ({rows},) or ({rows}, 1)", weight)
            weight = weight.reshape(rows) if weight.shape == (rows, 1) else weight
            weight = weight if weight.is_floating_point() else weight.float()
        keywords = self._keywords(pred.numel(), avg_factor, reduction_override)
        iou, box_weights = self._iou(pred, target)
        shape = pred.shape
        if keywords["reduction"] == "none":
            # mmdet's is one value for each coordinate: each becomes a row of its own, with its box's IoU.
            iou = ik.delta_iou(pred, target, weights=box_weights) if iou is None else iou
            pred, target, iou = (t.repeat_interleave(4, 0) for t in (pred, target, iou))
            own = torch.eye(4, device=pred.device).repeat(shape[0], 1)
            if weight is not None:
                own = own * (weight[:, None] if weight.ndim == 1 else weight).repeat_interleave(4, 0)
            weight = own
        loss = ik.iou_balanced_smooth_l1_loss(
            pred,
            target,
            iou,
            lambda_=self.lambda_,
            beta=self.beta,
            normalize=self.normalize,
            box_weights=box_weights,
            weight=weight,
            **keywords,
        )
        return self.loss_weight * (loss.reshape(shape) if keywords["reduction"] == "none" else loss)

    def _iou(self, pred: Tensor, target: Tensor) -> tuple[Tensor | None, tuple[float, ...]]:
        """The rows' IoU, None where the loss computes it itself, and the coder's weights."""
        if self.box_coder == "boxes":
            return ik.paired_box_iou(pred, target), (1.0,) * 4
        if self.box_coder == "fovea":
            return ik.delta_iou(pred, target, box_coder="fovea"), (1.0,) * 4
        return None, tuple(1.0 / std for std in self.target_stds or (1.0,) * 4)
