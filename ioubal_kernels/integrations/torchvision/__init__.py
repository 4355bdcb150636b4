"""The IoU-balanced losses inside torchvision's detectors, by one call.

    model = torchvision.models.detection.retinanet_resnet50_fpn_v2(num_classes=20)
    w_loc = ik.integrations.torchvision.calibrate_w_loc(model, batches)
    ik.integrations.torchvision.convert(model, w_loc=w_loc)     # eta = lambda_ = 1.5
    losses = model(images, targets)                             # the same dict, other losses

RetinaNet, SSD, Faster, Mask and Keypoint R-CNN, and subclasses of them. Evaluation is untouched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.ssd import SSD

from ... import validation
from ...calibration import calibrate_w_loc as calibrate_from_pairs
from . import rcnn, retinanet, ssd
from .observing import last, positive_deltas, record
from .settings import OP, Settings
from .swapping import Balanced, swap, swap_back

__all__ = [
    "Settings",
    "calibrate_w_loc",
    "collect_deltas",
    "convert",
    "record",
    "revert",
    "statistics",
]

SUPPORTED = "RetinaNet, SSD, FasterRCNN, MaskRCNN, KeypointRCNN or a subclass of them"


def convert(
    model: nn.Module,
    *,
    eta: float = 1.5,
    lambda_: float = 1.5,
    w_loc: float = 1.0,
    beta: float | None = None,
    divisor: str = "torchvision",
    normalizer_scope: str = "batch",
    classification: bool = True,
    localization: bool = True,
    rpn: bool = False,
    backend: str | None = None,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    eps: float = 0.0,
    normalize_loc: bool = False,
    cls_weight: float = 1.0,
    rpn_w_loc: float | None = None,
    process_group: Any = None,
) -> nn.Module:
    """Make a torchvision detector train with the IoU-balanced losses (Eq. 3 to 7), in place.

    The classes of the modules concerned are swapped: parameters, state dict, hooks, pickle and deepcopy keep working,
    and `revert` undoes it. The losses keep torchvision's names in the dict that the model returns. With eta = lambda_ =
    0 and divisor="torchvision" losses and gradients are torchvision's. Calling it again replaces the settings.

    Args:
        model: RetinaNet, SSD, Faster, Mask or Keypoint R-CNN, or a subclass.
        eta, lambda_: exponents of the IoU in the classification and the localisation weight, >= 0.
        w_loc: factor of the localisation loss; `calibrate_w_loc` measures it.
        beta: smooth L1's threshold in the box coder's units; None keeps the model's own box loss (RetinaNet: L1, SSD:
            1, R-CNN: 1/9).
        divisor: "torchvision", or "paper": both losses of RetinaNet divided by the positives of the batch, where
            torchvision takes means over the images of each image's own. The others' divisors are the same either way:
            SSD the positives of the batch, R-CNN the sampled RoIs, the RPN the sampled anchors.
        normalizer_scope: what the sums of Eq. 4 and 7 run over: "batch", "image", or (RetinaNet) "level".
        classification, localization: False keeps the model's own loss.
        rpn: balance the losses of an R-CNN's proposals as well.
        backend: of the kernels; None for the automatic choice.
        alpha, gamma: of RetinaNet's focal loss.
        eps: added to the normalisers' denominators.
        normalize_loc: Eq. 7's normalised localisation weight.
        cls_weight: factor of the classification loss.
        rpn_w_loc: w_loc of the proposals; None: w_loc.
        process_group: None, a group or "world": sums and divisors over all processes, so that DDP's mean over processes
            is one process's loss of the whole batch.

    Returns:
        The model.

    Raises:
        TypeError: a model of another kind; an argument of another type.
        ValueError: an argument out of range; beta=None for a RetinaNet with an IoU loss for boxes; scope "level" for a
            model that has none.
    """
    settings = Settings(
        eta=eta,
        lambda_=lambda_,
        w_loc=w_loc,
        beta=beta,
        divisor=divisor,
        normalizer_scope=normalizer_scope,
        classification=classification,
        localization=localization,
        backend=backend,
        alpha=alpha,
        gamma=gamma,
        eps=eps,
        normalize_loc=normalize_loc,
        cls_weight=cls_weight,
        process_group=process_group,
    )
    validation.flag(OP, "rpn", rpn)
    if rpn_w_loc is not None:
        validation.number(OP, "rpn_w_loc", rpn_w_loc)
    family = _family(OP, model)
    if family is not rcnn:
        if rpn:
            raise ValueError(f"{OP}: rpn must be False for a model without proposals, got True for {_name(model)}")
        family.convert(model, settings)
        return model
    # The RPN's smooth L1 has its own threshold, whatever the box head's is.
    proposals = replace(settings, beta=None, w_loc=w_loc if rpn_w_loc is None else rpn_w_loc) if rpn else None
    rcnn.convert(model, settings, proposals)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Give a converted model torchvision's losses back, in place; a model that was not converted stays as it is.

    Raises:
        TypeError: a model of another kind.
    """
    _family("revert", model).revert(model)
    return model


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Of the last training forward of a converted model: `num_positives` (0-d int64: anchors or RoIs) and `mean_iou`
    (0-d float32) of their decoded boxes with their ground truth; over the process group if one was given.

    Raises:
        RuntimeError: there was none.
    """
    found = last(_family("statistics", model).loss_module(model))
    if found is None:
        raise RuntimeError(f"statistics: {_name(model)} has had no training forward with balanced losses yet")
    return found


def calibrate_w_loc(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    *,
    lambda_: float = 1.5,
    beta: float | None = None,
    rpn: bool = False,
) -> float:
    """The w_loc that keeps the size of the model's localisation loss over `batches` (Section 3.3 of the paper).

    Runs the model in training mode without gradients. The model, its BatchNorm statistics and torch's random numbers
    are left as they were, whether it is converted or not.

    Args:
        model: as in `convert`.
        batches: pairs (images, targets), as the model takes them in training; several, since one varies by per cents.
        lambda_, beta: as they will be given to `convert`.
        rpn: calibrate the proposals' factor instead.

    Raises:
        ValueError: no positives in the batches; rpn=True for a model without proposals.
        TypeError: a model of another kind.
    """
    family = _family("calibrate_w_loc", model)
    pairs = collect_deltas(model, batches, rpn=rpn)
    beta = family.own_beta(model) if beta is None else beta
    return calibrate_from_pairs(pairs, lambda_=lambda_, beta=beta, box_weights=_module(model, rpn).box_coder.weights)


def collect_deltas(
    model: nn.Module, batches: Iterable[tuple[Any, Any]], *, rpn: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """The positives' deltas that `calibrate_w_loc` looks at, a pair (pred_deltas (P, 4), target_deltas (P, 4)) of each
    batch, float32, in the box coder's units. Arguments and side effects (none) as there.
    """
    op = "calibrate_w_loc"
    family = _family(op, model)
    if rpn and family is not rcnn:
        raise ValueError(f"{op}: rpn must be False for a model without proposals, got True for {_name(model)}")
    module = _module(model, rpn)
    if isinstance(module, Balanced):
        return positive_deltas(model, module, batches)
    try:
        if rpn:
            swap(module, rcnn.BalancedRPN, Settings())
        else:
            family.convert(model, Settings(localization=False))
        return positive_deltas(model, module, batches)
    finally:
        if rpn:
            swap_back(module)
        else:
            family.revert(model)


def _module(model: nn.Module, rpn: bool) -> nn.Module:
    """The module that computes the localisation loss, of the RPN or of the detections."""
    return model.rpn if rpn else _family("convert", model).loss_module(model)


def _family(op: str, model: nn.Module) -> ModuleType:
    if isinstance(model, RetinaNet):
        return retinanet
    if isinstance(model, SSD):
        return ssd
    if isinstance(model, FasterRCNN) or (isinstance(model, GeneralizedRCNN) and hasattr(model, "roi_heads")):
        return rcnn
    inner = getattr(model, "module", None)
    hint = "; convert the model inside the wrapper: model.module" if isinstance(inner, nn.Module) else ""
    raise TypeError(f"{op}: model must be torchvision's {SUPPORTED}, got {_name(model)}{hint}")


def _name(model: object) -> str:
    return f"a {type(model).__module__}.{type(model).__qualname__}"
