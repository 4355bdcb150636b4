"""One problem for the emulated kernels, compared with the float64 oracle: losses, and every element of the gradients.

Leaves are used where they lie, so that tests choose addresses, strides and ends of allocations. Used inside
``emulation.emulated``.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

import ioubal_kernels as ik
from ioubal_kernels import testing
from ioubal_kernels.testing import DetectionInputs, assert_close_budget, placed

# Float32 accumulates the error of its polynomials where a loss has a few terms only: an element's budget then.
FEW_TERMS = 64


def spread_out(t: Tensor) -> Tensor:
    """The same values, every dimension strided: no row is one access, no two rows follow each other."""
    padded = [2 * size + 1 for size in t.shape]
    store = torch.full(padded, float("nan"), dtype=t.dtype)
    view = store[tuple(slice(1, None, 2) for _ in padded)]
    return view.copy_(t.detach())


def map_heads(inputs: DetectionInputs, logits: Any = None, deltas: Any = None) -> DetectionInputs:
    """Functions applied to every tensor of a head."""

    def each(function: Any, value: Any) -> Any:
        if function is None:
            return value
        return function(value) if isinstance(value, Tensor) else [function(t) for t in value]

    return replace(inputs, cls_logits=each(logits, inputs.cls_logits), bbox_deltas=each(deltas, inputs.bbox_deltas))


def map_constants(inputs: DetectionInputs, function: Any) -> DetectionInputs:
    """A function applied to everything but the heads."""
    names = [f.name for f in fields(inputs)][2:6]

    def each(value: Any) -> Any:
        return function(value) if isinstance(value, Tensor) else [function(t) for t in value]

    return replace(inputs, **{name: each(getattr(inputs, name)) for name in names})


def ends_exactly(inputs: DetectionInputs) -> DetectionInputs:
    """Every tensor in an allocation of its own that ends with it."""
    return map_constants(map_heads(inputs, placed, placed), placed)


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _leaves(inputs: DetectionInputs) -> DetectionInputs:
    return map_heads(inputs, lambda t: t.detach().requires_grad_(), lambda t: t.detach().requires_grad_())


def _detection(inputs: DetectionInputs, factors: tuple[float, float], backend: str, options: dict[str, Any]) -> Any:
    used = _leaves(inputs)
    out = ik.iou_balanced_detection_loss(*used.arguments(), backend=backend, **options)
    (factors[0] * out.classification + factors[1] * out.localization).backward()
    return out, tensors(used.cls_logits), tensors(used.bbox_deltas)


def check_detection(
    inputs: DetectionInputs,
    factors: tuple[float, float] = (1.0, 2.0),
    what: str = "",
    **options: Any,
):
    """Forward and backward; with the default factors the logits' gradient is the forward's, the deltas' a new one."""
    reference = {name: value for name, value in options.items() if name not in ("grad_scale", "inplace")}
    want, *want_heads = _detection(inputs.double(), factors, "reference", reference)
    entries = sum(t.numel() for t in tensors(inputs.cls_logits))
    got, *got_heads = _detection(inputs, factors, "cpu", options)
    for name in ("classification", "localization", "mean_iou"):
        kind = "loss" if entries >= FEW_TERMS else "gradient"
        assert_close_budget(getattr(got, name), getattr(want, name), torch.float32, kind, what=f"{what} {name}")
    assert got.num_positives == want.num_positives
    for name, mine, oracle in zip(("logits", "deltas"), got_heads, want_heads, strict=True):
        for level, (a, b) in enumerate(zip(mine, oracle, strict=True)):
            assert a.grad.dtype == a.dtype
            assert_close_budget(a.grad, b.grad, a.dtype, what=f"{what} {name}[{level}]")
    return got


def check_flat(function: Any, x: Tensor, *rest: Any, floor: Any = testing.FLOOR, what: str = "", **options: Any):
    """Like check_detection, for a loss over rows; `floor` as in assert_close_budget."""
    grad_output = options.pop("grad_output", None)
    loss_floor = options.pop("loss_floor", testing.FLOOR)
    reference = {name: value for name, value in options.items() if name not in ("grad_scale", "inplace")}

    def run(leaf: Tensor, backend: str, chosen: dict[str, Any]) -> tuple[Tensor, Tensor]:
        leaf = leaf.detach().requires_grad_()
        loss = function(leaf, *rest, backend=backend, **chosen)
        loss.backward(torch.ones_like(loss) if grad_output is None else grad_output.to(loss.dtype))
        return loss.detach(), leaf.grad

    want, want_grad = run(x.double(), "reference", reference)
    got, grad = run(x, "cpu", options)
    kind = "loss" if got.ndim == 0 and x.numel() >= FEW_TERMS else "gradient"
    assert_close_budget(got, want, torch.float32, kind, loss_floor, what=f"{what} loss")
    assert_close_budget(grad, want_grad, x.dtype, "gradient", floor, what=f"{what} gradient")
    return got


def check_focal(x: Tensor, inputs: testing.ClassificationInputs, **options: Any):
    return check_flat(ik.iou_balanced_sigmoid_focal_loss, x, inputs.labels, inputs.iou, **options)


def check_cross_entropy(x: Tensor, inputs: testing.ClassificationInputs, **options: Any):
    """Without a floor: p - 1 of the target is computed as -(the others' share), and log(sum) by log1p."""
    return check_flat(ik.iou_balanced_cross_entropy, x, inputs.labels, inputs.iou, **options)
