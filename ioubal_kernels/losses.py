"""The losses as modules: they hold the keyword arguments and nothing else, so they pickle, copy and print."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import functional, functional_detection, functional_matching
from .functional_detection import DetectionLoss


class _FunctionModule(nn.Module):
    """A module around one function of keyword arguments; subclasses name it and define forward."""

    _function: Callable[..., Any]

    def __init__(self, **keywords: Any) -> None:
        super().__init__()
        allowed = _keywords(type(self)._function)
        for name in keywords:
            if name not in allowed:
                raise TypeError(
                    f"{type(self).__name__}: unexpected keyword argument {name!r}; allowed are {', '.join(allowed)}"
                )
        self.keywords = {**allowed, **keywords}

    def __getattr__(self, name: str) -> Any:  # of what nn.Module and the class do not have
        keywords = self.__dict__.get("keywords", {})
        return keywords[name] if name in keywords else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """``module.eta = 0.0`` sets the keyword argument: a schedule writes it before a step."""
        if name in self.__dict__.get("keywords", {}):
            self.__dict__["keywords"] = {**self.keywords, name: value}  # anew: a shallow copy keeps its own
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """The keyword arguments that differ from the function's defaults; arrays and tensors cannot say so by !=."""
        defaults = _keywords(type(self)._function)
        return ", ".join(f"{k}={v!r}" for k, v in self.keywords.items() if repr(v) != repr(defaults[k]))

    def _call(self, *tensors: Any, **overrides: Any) -> Any:
        given = {name: value for name, value in overrides.items() if value is not None}
        return type(self)._function(*tensors, **(self.keywords | given if given else self.keywords))


def _keywords(function: Callable[..., Any]) -> dict[str, Any]:
    """Keyword-only parameters and their defaults, without the per-call tensors."""
    per_call = ("weight", "scope_ids")
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in per_call}


_MATCHING = ("high", "low", "allow_low_quality", "force_best")


def _retinanet_loss(
    cls_logits: Tensor | Sequence[Tensor],
    bbox_deltas: Tensor | Sequence[Tensor],
    anchors: Tensor,
    gt_boxes: Tensor | Sequence[Tensor],
    gt_labels: Tensor | Sequence[Tensor],
    **keywords: Any,
) -> DetectionLoss:
    matching = {name: keywords.pop(name) for name in _MATCHING if name in keywords}
    _check_images(cls_logits, gt_boxes)
    matched_idxs = functional_matching.match_anchors(
        anchors,
        gt_boxes,
        gt_labels=gt_labels,
        dtype=torch.int32,
        backend=keywords.get("backend"),
        **matching,
    )
    return functional_detection.iou_balanced_detection_loss(
        cls_logits, bbox_deltas, anchors, matched_idxs, gt_boxes, gt_labels, **keywords
    )


def _check_images(cls_logits: Any, gt_boxes: Any) -> None:
    """Before matching, whose result would not fit the logits; what is neither tensors nor lists is refused later."""
    first = cls_logits[0] if isinstance(cls_logits, (list, tuple)) and cls_logits else cls_logits
    given = gt_boxes.shape[0] if isinstance(gt_boxes, Tensor) and gt_boxes.ndim else 0
    given = len(gt_boxes) if isinstance(gt_boxes, (list, tuple)) else given
    if isinstance(first, Tensor) and first.ndim > 1 and given and given != first.shape[0]:
        raise ValueError(
            f"RetinaNetLoss: gt_boxes must hold the boxes of {first.shape[0]} images, as cls_logits has, got {given}"
        )


def _merged_signature() -> inspect.Signature:
    """The keyword-only parameters of matching and of the loss, by which a module checks its keywords."""
    matching = inspect.signature(functional_matching.match_anchors).parameters
    loss = inspect.signature(functional_detection.iou_balanced_detection_loss).parameters.values()
    return inspect.Signature([*(p for p in loss if p.kind is p.KEYWORD_ONLY), *(matching[name] for name in _MATCHING)])


_retinanet_loss.__signature__ = _merged_signature()


class IoUBalancedLoss(_FunctionModule):
    """``iou_balanced_detection_loss`` as a module: the same keyword arguments, the same forward. As with all of these
    modules the arguments are attributes: ``loss.eta = 0.5`` before a step.

    ``process_group="world"`` stays a string until the call, so that the module pickles.
    """

    _function = staticmethod(functional_detection.iou_balanced_detection_loss)

    def forward(
        self,
        cls_logits: Tensor | Sequence[Tensor],
        bbox_deltas: Tensor | Sequence[Tensor],
        anchors: Tensor,
        matched_idxs: Tensor,
        gt_boxes: Tensor | Sequence[Tensor],
        gt_labels: Tensor | Sequence[Tensor],
        *,
        avg_factor: Any = None,
        grad_scale: float | Tensor | None = None,
    ) -> DetectionLoss:
        """See ``iou_balanced_detection_loss``; avg_factor and grad_scale, if given, replace the module's for this
        call.
        """
        return self._call(
            cls_logits,
            bbox_deltas,
            anchors,
            matched_idxs,
            gt_boxes,
            gt_labels,
            avg_factor=avg_factor,
            grad_scale=grad_scale,
        )


class RetinaNetLoss(_FunctionModule):
    """The loss stage of a dense detector as one module: matching, then ``iou_balanced_detection_loss``.

    Keyword arguments: those of ``iou_balanced_detection_loss``, and ``high``, ``low``, ``allow_low_quality`` and
    ``force_best`` of ``match_anchors``. Matches are int32 and never reach the host: with padded boxes the forward is
    capturable in a CUDA graph and traces under ``torch.compile(fullgraph=True)``.
    """

    _function = staticmethod(_retinanet_loss)

    def forward(
        self,
        cls_logits: Tensor | Sequence[Tensor],
        bbox_deltas: Tensor | Sequence[Tensor],
        anchors: Tensor,
        gt_boxes: Tensor | Sequence[Tensor],
        gt_labels: Tensor | Sequence[Tensor],
        *,
        avg_factor: Any = None,
        grad_scale: float | Tensor | None = None,
    ) -> DetectionLoss:
        """Arguments as in ``iou_balanced_detection_loss``, without matched_idxs. A place whose label is -1, or of whose
        box a coordinate is NaN, holds no box; avg_factor and grad_scale, if given, replace the module's for this call.
        """
        return self._call(
            cls_logits, bbox_deltas, anchors, gt_boxes, gt_labels, avg_factor=avg_factor, grad_scale=grad_scale
        )


class _ClassificationModule(_FunctionModule):
    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        iou: Tensor,
        *,
        weight: Tensor | None = None,
        scope_ids: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        grad_scale: float | Tensor | None = None,
    ) -> Tensor:
        """Logits (..., K), labels (...), iou (...); avg_factor and grad_scale, if given, replace the module's for this
        call.
        """
        return self._call(
            logits, labels, iou, weight=weight, scope_ids=scope_ids, avg_factor=avg_factor, grad_scale=grad_scale
        )


class IoUBalancedSigmoidFocalLoss(_ClassificationModule):
    """``iou_balanced_sigmoid_focal_loss`` as a module, with its keyword arguments."""

    _function = staticmethod(functional.iou_balanced_sigmoid_focal_loss)


class IoUBalancedBinaryCrossEntropy(_ClassificationModule):
    """``iou_balanced_binary_cross_entropy`` as a module, with its keyword arguments."""

    _function = staticmethod(functional.iou_balanced_binary_cross_entropy)


class IoUBalancedCrossEntropy(_ClassificationModule):
    """``iou_balanced_cross_entropy`` as a module, with its keyword arguments."""

    _function = staticmethod(functional.iou_balanced_cross_entropy)


class IoUBalancedSmoothL1Loss(_FunctionModule):
    """``iou_balanced_smooth_l1_loss`` as a module, with its keyword arguments: a drop-in ``loss(pred, target)``."""

    _function = staticmethod(functional.iou_balanced_smooth_l1_loss)

    def forward(
        self,
        pred_deltas: Tensor,
        target_deltas: Tensor,
        iou: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        scope_ids: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        grad_scale: float | Tensor | None = None,
    ) -> Tensor:
        """Deltas (P, 4) and (P, 4), iou (P,); avg_factor and grad_scale, if given, replace the module's for this
        call.
        """
        return self._call(
            pred_deltas,
            target_deltas,
            iou,
            weight=weight,
            scope_ids=scope_ids,
            avg_factor=avg_factor,
            grad_scale=grad_scale,
        )
