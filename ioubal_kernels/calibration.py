"""Measuring w_loc: the factor that keeps the localisation loss's size at the start of training (Section 3.3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import validation
from .boxes import BOX_CODERS, UNIT_WEIGHTS
from .functional import delta_iou, iou_balanced_smooth_l1_loss


def calibrate_w_loc(
    pairs: Iterable[tuple[Tensor, Tensor]],
    *,
    lambda_: float = 1.5,
    beta: float = 1 / 9,
    box_weights: Sequence[float] = UNIT_WEIGHTS,
    box_coder: str = "delta",
) -> float:
    """The w_loc that makes Eq. 6's loss equal plain smooth L1 over the given positives.

    That is sum(smooth_l1) / sum(iou**lambda_ * smooth_l1).

    Args:
        pairs: (pred_deltas (P, 4), target_deltas (P, 4)) of the positives of several batches, any float dtype.
        lambda_, beta, box_weights, box_coder: as the training loss uses them.

    Raises:
        ValueError: if there is no pair, or the balanced sum is 0 or not finite (no positives, all IoU 0, NaN).
        TypeError, ValueError: as ``iou_balanced_smooth_l1_loss`` for the tensors and numbers.
    """
    op = "calibrate_w_loc"
    validation.number(op, "lambda_", lambda_)
    validation.number(op, "beta", beta)
    validation.four_weights(op, "box_weights", box_weights)
    validation.choice(op, "box_coder", box_coder, BOX_CODERS)
    if isinstance(pairs, Tensor) or not isinstance(pairs, Iterable):
        validation.fail_type(op, "pairs", "be pairs (pred_deltas, target_deltas)", pairs)
    plain = balanced = 0.0
    count = rows = 0
    with torch.no_grad():
        for pair in pairs:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                validation.fail_type(op, f"pairs[{count}]", "be a pair (pred_deltas, target_deltas)", pair)
            for name, part in zip(("pred_deltas", "target_deltas"), pair, strict=True):
                validation.tensor(op, f"pairs[{count}] {name}", part, validation.FLOAT_DTYPES)
                if part.ndim != 2 or part.shape[1] != 4 or part.shape != pair[0].shape or part.is_meta:
                    want = "be with values and have shape (P, 4), as its pair has"
                    validation.fail_value(op, f"pairs[{count}] {name}", want, part)
            # float64 on the host: the sums run over many batches. So the backend is not the one chosen for training.
            pred, target = (part.detach().to("cpu", torch.float64) for part in pair)
            iou = delta_iou(pred, target, weights=box_weights, box_coder=box_coder, backend="auto")
            options = {"beta": beta, "box_weights": box_weights, "reduction": "sum", "backend": "auto"}
            plain += iou_balanced_smooth_l1_loss(pred, target, iou, lambda_=0.0, **options).item()
            balanced += iou_balanced_smooth_l1_loss(pred, target, iou, lambda_=lambda_, **options).item()
            count += 1
            rows += pred.shape[0]
    # Also false for NaN.
    if not (0.0 < balanced < float("inf") and plain < float("inf")):
        raise ValueError(
            f"{op}: pairs must hold positives with a positive, finite balanced loss, got {count} pairs with"
            f" {rows} rows, plain loss {plain:g}, balanced loss {balanced:g}"
        )
    return plain / balanced
