"""The losses under torch's transforms: each as a function of the tensors that get gradients and of the others."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import ioubal_kernels as ik
from ioubal_kernels import testing

NAMES = ("detection", "retinanet", "focal", "bce", "softmax", "smooth_l1")
each_loss = pytest.mark.parametrize("name", NAMES)


def table() -> tuple[dict[str, str], Callable]:
    """A file's rows of the table in docs/transforms.md, what -> its result, and the decorator of a test that is one."""
    rows: dict[str, str] = {}

    def row(what: str, result: str) -> Callable:
        assert what not in rows, what
        rows[what] = result
        return lambda test: test

    return rows, row


def refused(name: str, reason: str) -> pytest.RaisesExc:
    """The package's own refusal, which names the operation and the way out."""
    operation = {
        "detection": "iou_balanced_detection_loss",
        "retinanet": "iou_balanced_detection_loss",
        "focal": "iou_balanced_sigmoid_focal_loss",
        "bce": "iou_balanced_binary_cross_entropy",
        "softmax": "iou_balanced_cross_entropy",
        "smooth_l1": "iou_balanced_smooth_l1_loss",
    }[name]
    text = f"{operation}: {reason} not supported by the fused kernels; use backend='reference'"
    return pytest.raises(NotImplementedError, match=re.escape(text))


@dataclass
class Case:
    """`loss(*leaves, *rest)` is one number; gradients are asked for in the leaves."""

    loss: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]
    rest: tuple[Tensor, ...]

    def fresh(self) -> tuple[Tensor, ...]:
        """Leaves of their own that require gradients and keep their layout."""
        return tuple(x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in self.leaves)

    def of_leaves(self, *leaves: Tensor) -> Tensor:
        return self.loss(*leaves, *self.rest)

    def eager(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and gradients without any transform."""
        leaves = self.fresh()
        value = self.of_leaves(*leaves)
        return value.detach(), torch.autograd.grad(value, leaves)


def make(
    name: str,
    *,
    backend: str | None = None,
    rows: int = 30,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    exponent: float = 1.5,
) -> Case:
    """`rows` is the size that dynamic shapes change: rows of a flat loss, width of the first level's maps else;
    `exponent` is eta and lambda.
    """
    if name in ("detection", "retinanet"):
        return _dense(name, rows, dtype, seed, {"backend": backend, "eta": exponent, "lambda_": exponent})
    if name == "smooth_l1":
        pred, target = testing.delta_inputs(seed=seed, rows=rows, dtype=dtype)
        keywords = {"lambda_": exponent, "backend": backend}
        return Case(lambda x, t: ik.iou_balanced_smooth_l1_loss(x, t, **keywords), (pred,), (target,))
    function = {
        "focal": ik.iou_balanced_sigmoid_focal_loss,
        "bce": ik.iou_balanced_binary_cross_entropy,
        "softmax": ik.iou_balanced_cross_entropy,
    }[name]
    inputs = testing.classification_inputs(seed=seed, rows=rows, classes=5, softmax=name == "softmax", dtype=dtype)
    return Case(
        lambda x, labels, iou: function(x, labels, iou, eta=exponent, backend=backend),
        (inputs.logits,),
        (inputs.labels, inputs.iou),
    )


def _dense(name: str, width: int, dtype: torch.dtype, seed: int, keywords: dict) -> Case:
    levels = ((4, width), (2, 3))
    inputs = testing.detection_inputs(seed=seed, layout="nchw", levels=levels, dtype=dtype).padded()
    module = (ik.RetinaNetLoss if name == "retinanet" else ik.IoUBalancedLoss)(**keywords)

    def loss(*tensors: Tensor) -> Tensor:
        logits, deltas, (anchors, matched, boxes, labels) = tensors[:2], tensors[2:4], tensors[4:]
        matches = () if name == "retinanet" else (matched,)
        out = module(list(logits), list(deltas), anchors, *matches, boxes, labels)
        return out.classification + 2 * out.localization

    rest = (inputs.anchors, inputs.matched_idxs, inputs.gt_boxes, inputs.gt_labels)
    return Case(loss, tuple(inputs.heads()), rest)


def assert_same(value: Tensor, gradients: Sequence[Tensor], case: Case, *, exact: bool = True) -> None:
    """Gradients as eager's in every element, bit for bit where `exact`.

    A loss may differ in its last bit even then: a forward without gradients sums in other blocks.
    """
    want_value, want = case.eager()
    torch.testing.assert_close(value.detach(), want_value, rtol=5e-7, atol=0.0)
    assert len(gradients) == len(want)
    for got, expected in zip(gradients, want):
        assert bool(expected.abs().sum() > 0)
        if exact:
            assert torch.equal(got, expected)
        else:  # other instructions: FMA, fused pointwise kernels
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
