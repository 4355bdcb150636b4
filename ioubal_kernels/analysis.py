"""The paper's Figure 2: the upper bound of the IoU as a function of one delta, and the gradient norm it gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import validation

KINDS = ("center", "size")


def bounded_iou(d: Tensor | float | Sequence[float], kind: str = "center", ratio: float = 1.0) -> Tensor:
    """Upper bound of the IoU when one delta is off by d and the others are right.

    kind "center" (Eq. 11, d = dx or dy): ``(r - |d|) / (r + |d|)`` with ratio r = target width over anchor width,
    0 from |d| = r on.
    kind "size" (Eq. 12, d = dw or dh): ``exp(-|d|)``; the ratio plays no part.

    Args:
        d: any shape, in deltas with coder weight 1; a tensor of a float dtype, a number or a list of numbers.
        kind: "center" or "size".
        ratio: positive number.

    Returns:
        A tensor of d's shape and dtype (float32 for numbers). Raises TypeError or ValueError for anything else.
    """
    op = "bounded_iou"
    size = _deltas(op, d).abs()
    validation.choice(op, "kind", kind, KINDS)
    validation.number(op, "ratio", ratio)
    if ratio == 0:
        validation.fail_value(op, "ratio", "be positive", ratio)
    if kind == "size":
        return torch.exp(-size)
    return ((ratio - size) / (ratio + size)).masked_fill(size >= ratio, 0)  # infinity among them


def gradient_norm(
    d: Tensor | float | Sequence[float],
    kind: str = "center",
    lambda_: float = 1.5,
    w_loc: float = 1.0,
    beta: float = 0.111,
) -> Tensor:
    """Upper bound of the norm of the IoU-balanced smooth L1 loss's gradient: Eq. 13 for "center", Eq. 14 for "size".

    ``w_loc * bounded_iou(d, kind)**lambda_ * min(|d| / beta, 1)``. lambda_ = 0 with w_loc = 1 is plain smooth L1.

    Args:
        d: any shape, see ``bounded_iou``.
        lambda_, w_loc, beta: the loss's, >= 0; beta = 0 is L1, whose gradient at d = 0 is 0.

    Returns:
        A tensor of d's shape and dtype. Raises TypeError or ValueError as ``bounded_iou``.
    """
    op = "gradient_norm"
    size = _deltas(op, d).abs()
    validation.choice(op, "kind", kind, KINDS)
    validation.number(op, "lambda_", lambda_)
    validation.number(op, "w_loc", w_loc)
    validation.number(op, "beta", beta)
    slope = size.sign() if beta == 0 else (size / beta).clamp(max=1)
    return w_loc * bounded_iou(size, kind) ** lambda_ * slope


def _deltas(op: str, d: Tensor | float | Sequence[float]) -> Tensor:
    if isinstance(d, (int, float, list, tuple)) and not isinstance(d, bool):
        d = torch.as_tensor(d, dtype=torch.float32)
    validation.tensor(op, "d", d, validation.FLOAT_DTYPES)
    return d
