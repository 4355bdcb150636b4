"""The formulas of the losses, written once in Python: terms, IoU weights and normalisers. Used by ``reference``
only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import distributed

# Above this logit of a negative (below its opposite for a positive) the focal modulator is 1 to within 1e-43.
_SATURATED = 100.0
# A positive's loss enters the normaliser's sums no larger than this, so that an infinite one gives the limit of S / D,
# not NaN.
_LOSS_LIMIT = 1e30
# S / D is taken for no more than this, or it would overflow float32 where the positives with an IoU are all saturated.
_RATIO_LIMIT = 1e36


class Scope(NamedTuple):
    """Which sum of Eq. 4 or 7 each row belongs to. `ids` None: one sum over everything."""

    ids: Tensor | None
    count: int

    def sums(self, values: Tensor) -> Tensor:
        if self.ids is None:
            return values.sum().reshape(1)
        return values.new_zeros(self.count).index_add(0, self.ids, values)

    def spread(self, per_scope: Tensor) -> Tensor:
        """One value per scope -> one value per row (or one for all rows)."""
        return per_scope if self.ids is None else per_scope.index_select(0, self.ids)


def focal_term(logits: Tensor, gamma: float) -> Tensor:
    """softplus(x) * sigmoid(x)**gamma: the focal loss of a negative's logit x, or of a positive's logit -x, without
    alpha.

    The modulator goes through log-sigmoid, which keeps it and its gradient accurate and finite at every logit. Beyond
    saturation the term is x itself; taking it from the other branch there would give inf * 0 in the gradient of +inf.
    """
    saturated = logits > _SATURATED
    x = torch.where(saturated, 0.0, logits)
    term = -F.logsigmoid(-x)
    if gamma != 0.0:
        term = torch.exp(gamma * F.logsigmoid(x)) * term
    return torch.where(saturated, logits, term)


def softmax_term(logits: Tensor, columns: Tensor) -> Tensor:
    """-log softmax(logits)[i, columns[i]], (M,) of logits (M, K), with the limits at infinite logits instead of NaN."""
    infinite = logits == float("inf")
    count = infinite.sum(1)
    limit = (count > 0) & ~logits.isnan().any(1)
    finite = torch.where(limit[:, None], 0.0, logits)
    index = columns[:, None]
    own_finite = finite.gather(1, index)
    # Where the label's logit is the largest, the others' share of its exponential on its own: beside a 1 small losses
    # would lose their digits, and so would their gradients.
    beside = (finite - own_finite).scatter(1, index, float("-inf"))
    rest = beside.clamp(max=0.0).exp().sum(1)
    leads = (beside <= 0).all(1) & (own_finite.squeeze(1) > float("-inf"))  # false where it is NaN
    term = torch.where(leads, rest.log1p(), -F.log_softmax(finite, dim=1).gather(1, index).squeeze(1))
    # One or more +inf share all the probability: p_j = 1 / count there, so the loss is their mean minus the label's
    # logit.
    label_infinite = infinite.gather(1, index).squeeze(1)
    own = torch.where(limit & ~label_infinite, logits.gather(1, index).squeeze(1), 0.0)
    others = torch.where(infinite & (limit & ~label_infinite)[:, None], logits, 0.0).sum(1) / count.clamp(min=1)
    # Two +inf and the label among them: inf - inf has no limit, for the loss and for the row's gradient.
    undefined = limit & label_infinite & (count > 1)
    nothing = torch.zeros_like(own).masked_fill(undefined, float("nan"))
    certain = torch.where(undefined[:, None], logits, 0.0).sum(1) * nothing
    return torch.where(limit, torch.where(label_infinite, certain, others - own), term)


def smooth_l1_term(difference: Tensor, beta: float) -> Tensor:
    """Eq. 2: d^2 / (2 beta) if |d| <= beta, else |d| - beta / 2, element by element. beta 0 is |d|."""
    if beta == 0.0:
        nan = torch.where(difference.isnan(), difference, 0.0)
        return difference.abs() + nan * nan  # the gradient of abs is 0 at NaN
    size = difference.abs()
    outside = size > beta
    inner = torch.where(outside, 0.0, difference)  # NaN as well, so that its gradient is
    return 0.5 * inner * inner / beta + torch.where(outside, size - 0.5 * beta, 0.0)


def iou_power(iou: Tensor, used: Tensor, exponent: float, dtype: torch.dtype) -> Tensor:
    """iou**exponent of the rows in use (0 elsewhere), a constant; iou is clamped to [0, 1] and 0**0 = 1."""
    q = torch.where(used, iou.detach(), 0.0).to(dtype).clamp(0.0, 1.0)
    return torch.where(used, q**exponent, 0.0)


def accumulator(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The normalisers and counts are summed in float64 where the device has it."""
    return torch.float64 if device.type in ("cpu", "cuda", "meta") else dtype


def normalizer_parts(loss: Tensor, power: Tensor, scope: Scope) -> tuple[Tensor, Tensor]:
    """Eq. 4 and 7: S = sum of the positives' losses, D = sum of iou^exponent * loss, per scope. Constants.

    `loss` is 0 outside the positives. A NaN row is left out: it makes its own term NaN, not the other rows' gradients.
    """
    acc = accumulator(loss.dtype, loss.device)
    usable = ~(loss.isnan() | power.isnan())
    loss = torch.where(usable, loss.detach(), 0.0).clamp(max=_LOSS_LIMIT).to(acc)
    return scope.sums(loss), scope.sums(loss * torch.where(usable, power, 0.0).to(acc))


def normalized_power(power: Tensor, plain: Tensor, weighted: Tensor, scope: Scope, eps: float) -> Tensor:
    """iou^exponent * S / (D + eps) per row; a denominator of exactly 0 gives 0, the quotient is bounded."""
    denominator = weighted + eps
    empty = denominator == 0
    ratio = torch.where(empty, 0.0, plain / torch.where(empty, 1.0, denominator)).clamp(max=_RATIO_LIMIT)
    return (power.to(ratio.dtype) * scope.spread(ratio)).to(power.dtype)


def scaled(loss: Tensor, factor: Tensor) -> Tensor:
    """factor * loss, where a factor of 0 also silences an infinite loss (but never a NaN)."""
    return torch.where((factor == 0) & (loss == float("inf")), 0.0, factor * loss)


def row_scope(scope_ids: Tensor | None, num_scopes: int | None) -> tuple[Scope, Tensor | None]:
    """The scope of a flat function, and which rows have an id outside it."""
    if scope_ids is None:
        return Scope(None, 1), None
    ids = scope_ids.reshape(-1)
    return Scope(ids.clamp(0, num_scopes - 1).to(torch.int64), num_scopes), (ids < 0) | (ids >= num_scopes)


def mean(total: Tensor, avg_factor: float | Tensor | None, count: Tensor, group: Any) -> Tensor:
    """total / avg_factor, whose default is max(count, 1) (over the group: the mean over ranks is the whole batch's
    loss).
    """
    if avg_factor is None:
        avg_factor = (count.clamp(min=1) / distributed.world_size(group)).to(total.dtype)
    elif isinstance(avg_factor, Tensor):
        avg_factor = avg_factor.detach().to(total.dtype)
    return total / avg_factor
