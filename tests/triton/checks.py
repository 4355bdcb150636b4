"""One problem through backend="triton", compared with the float64 oracle: losses and every gradient element."""

from __future__ import annotations

from typing import Any

import torch
from guarded import guarded, guarded_inputs
from torch import Tensor

import ioubal_kernels as ik
from ioubal_kernels import testing
from ioubal_kernels.testing import DetectionInputs, assert_close_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Float32 accumulates the error of its polynomials where a loss has a few terms only: an element's budget then.
FEW_TERMS = 64


def ids(value: Any) -> str | None:
    return str(value).replace("torch.", "") if isinstance(value, torch.dtype) else None


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _detection(inputs: DetectionInputs, factors: tuple[float, float], backend: str, options: dict[str, Any]) -> Any:
    for head in inputs.heads():
        head.requires_grad_()
    logits, deltas = tensors(inputs.cls_logits), tensors(inputs.bbox_deltas)
    if options.get("inplace"):  # a leaf cannot be overwritten: an alias of its memory that can
        aliases = [x.view_as(x) for x in logits]
        inputs.cls_logits = aliases[0] if isinstance(inputs.cls_logits, Tensor) else aliases
    out = ik.iou_balanced_detection_loss(*inputs.arguments(), backend=backend, **options)
    (factors[0] * out.classification + factors[1] * out.localization).backward()
    return out, logits, deltas


def check_detection(inputs: DetectionInputs, factors: tuple[float, float] = (1.0, 2.0), **options: Any) -> Any:
    """Forward and backward; with the default factors the logits' gradient is the forward's, the deltas' a new one."""
    oracle = {name: value for name, value in options.items() if name not in ("grad_scale", "inplace")}
    if isinstance(inputs.cls_logits, list):
        options.pop("anchors_per_level", None)
    want, *want_heads = _detection(inputs.double(), factors, "reference", oracle)
    got, *got_heads = _detection(guarded_inputs(inputs), factors, "triton", options)
    entries = sum(t.numel() for t in tensors(inputs.cls_logits))
    for name in ("classification", "localization", "mean_iou"):
        value = getattr(got, name)
        assert value.dtype == torch.float32
        kind = "loss" if entries >= FEW_TERMS else "gradient"
        assert_close_budget(value, getattr(want, name), torch.float32, kind, what=name)
    assert got.num_positives.dtype == torch.int64 and got.num_positives == want.num_positives
    for name, mine, oracle_heads in zip(("logits", "deltas"), got_heads, want_heads, strict=True):
        for level, (a, b) in enumerate(zip(mine, oracle_heads, strict=True)):
            assert a.grad.dtype == a.dtype and a.grad.stride() == a.stride()
            assert_close_budget(a.grad, b.grad, a.dtype, what=f"{name}[{level}]")
    return got


def check_flat(
    function: Any,
    x: Tensor,
    *rest: Any,
    floor: Any = testing.FLOOR,
    loss_floor: float = testing.FLOOR,
    grad_output: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Likewise, for a loss over rows; `floor` as in assert_close_budget."""
    oracle = {name: value for name, value in options.items() if name not in ("grad_scale", "inplace")}
    rest = tuple(guarded(t) if isinstance(t, Tensor) else t for t in rest)
    options = {name: guarded(t) if isinstance(t, Tensor) else t for name, t in options.items()}
    results = []
    for leaf, backend, chosen in ((x.double(), "reference", oracle), (guarded(x), "triton", options)):
        leaf = leaf.detach().requires_grad_()
        given = leaf.view_as(leaf) if chosen.get("inplace") else leaf
        loss = function(given, *rest, backend=backend, **chosen)
        loss.backward(torch.ones_like(loss) if grad_output is None else grad_output.to(loss.dtype))
        results.append((loss.detach(), leaf.grad))
    (want, want_grad), (got, grad) = results
    assert got.dtype == torch.float32 and grad.dtype == x.dtype
    kind = "loss" if got.ndim == 0 and x.numel() >= FEW_TERMS else "gradient"
    assert_close_budget(got, want, torch.float32, kind, loss_floor, what="loss")
    assert_close_budget(grad, want_grad, x.dtype, "gradient", floor, what="gradient")
    return got
