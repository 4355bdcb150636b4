"""IoU-balanced smooth L1 (Eq. 6 and 7) over deltas (P, 4), a lane per row. In float64: the rows are positives, few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._launch import MAX_REGISTERS, Workspace, cdiv, number, on_device, pointer, programs_of
from ._math import balance_share, delta_iou, iou_power, smooth_l1, weighted_loss
from .coefficients import BY_ID, Coefficients, clear_tickets, take_scratch
from .focal import no_rows
from .positives import store_totals

ROWS = 128


@triton.jit
def load_four(x, row, mask):
    x0 = tl.load(x + 4 * row, mask=mask, other=0.0).to(tl.float64)
    x1 = tl.load(x + 4 * row + 1, mask=mask, other=0.0).to(tl.float64)
    x2 = tl.load(x + 4 * row + 2, mask=mask, other=0.0).to(tl.float64)
    x3 = tl.load(x + 4 * row + 3, mask=mask, other=0.0).to(tl.float64)
    return x0, x1, x2, x3


@triton.jit
def smooth_l1_rows(
    pred, target, iou, weight, row, mask, lambda_, beta, w0, w1, w2, w3,
    IOU_GIVEN: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Loss, gradients and IoU weight of rows. WEIGHTS: 0 none, 1 per row, 2 per coordinate."""
    p0, p1, p2, p3 = load_four(pred, row, mask)
    t0, t1, t2, t3 = load_four(target, row, mask)
    l0, g0 = smooth_l1(p0 - t0, beta)
    l1, g1 = smooth_l1(p1 - t1, beta)
    l2, g2 = smooth_l1(p2 - t2, beta)
    l3, g3 = smooth_l1(p3 - t3, beta)
    if IOU_GIVEN:
        overlap = tl.load(iou + row, mask=mask, other=0.0).to(tl.float64)
    else:
        overlap = delta_iou(p0, p1, p2, p3, t0, t1, t2, t3, w0, w1, w2, w3, False)
    balance = iou_power(overlap, lambda_)
    if WEIGHTS == 0:
        return l0 + l1 + l2 + l3, g0, g1, g2, g3, balance
    elif WEIGHTS == 1:
        w = tl.load(weight + row, mask=mask, other=0.0).to(tl.float64)
        return w * l0 + w * l1 + w * l2 + w * l3, w * g0, w * g1, w * g2, w * g3, balance
    else:
        v0, v1, v2, v3 = load_four(weight, row, mask)
        return v0 * l0 + v1 * l1 + v2 * l2 + v3 * l3, v0 * g0, v1 * g1, v2 * g2, v3 * g3, balance


@triton.jit(do_not_specialize=["rows", "scopes", "all_tiles"])
def smooth_l1_positives_kernel(
    sc,
    pred,
    target,
    iou,
    weight,
    scope_ids,
    rows: tl.int64,
    scopes,
    all_tiles,
    lambda_: tl.float64,
    beta: tl.float64,
    w0: tl.float64,
    w1: tl.float64,
    w2: tl.float64,
    w3: tl.float64,
    IOU_GIVEN: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BY_SCOPE: tl.constexpr,
    ROWS: tl.constexpr,
):
    clear_tickets(sc)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    loss, g0, g1, g2, g3, balance = smooth_l1_rows(
        pred, target, iou, weight, row, inside, lambda_, beta, w0, w1, w2, w3, IOU_GIVEN, WEIGHTS
    )
    plain, weighted = balance_share(loss, balance)
    as_is = weighted_loss(balance, loss)
    scope = tl.zeros((ROWS,), tl.int64)
    if BY_SCOPE:
        scope = tl.load(scope_ids + row, mask=inside, other=0).to(tl.int64)
    nothing = tl.zeros((), tl.float64)
    # The count is the whole batch's: with bad rows it goes to the first slot.
    number_of = tl.sum(tl.where(inside, 1.0, 0.0).to(tl.float64), 0)
    bad = tl.sum(tl.where(inside & ((scope < 0) | (scope >= scopes)), 1.0, 0.0).to(tl.float64), 0)
    low = tl.min(tl.where(inside, scope, scopes), 0)
    high = tl.max(tl.where(inside, scope, -1), 0)
    slot = tl.zeros((), tl.int32)
    while slot < scopes:
        s = nothing
        w = nothing
        x = nothing
        if (slot >= low) & (slot <= high):
            mine = inside & (scope == slot)
            s = tl.sum(tl.where(mine, plain, 0.0), 0)
            w = tl.sum(tl.where(mine, weighted, 0.0), 0)
            x = tl.sum(tl.where(mine, as_is, 0.0), 0)
        store_totals(sc, slot, scopes, all_tiles, number_of, nothing, bad, nothing, nothing, nothing, s, w, x)
        number_of = nothing
        bad = nothing
        slot += 1


@triton.jit(do_not_specialize=["rows", "scopes", "tiles"])
def smooth_l1_kernel(
    sc,
    out,
    each,
    pred,
    target,
    iou,
    weight,
    scope_ids,
    grad_rows,
    scale_tensor,
    expected_tensor,
    rows: tl.int64,
    scopes,
    tiles,
    w_loc: tl.float64,
    scale: tl.float64,
    expected: tl.float64,
    lambda_: tl.float64,
    beta: tl.float64,
    w0: tl.float64,
    w1: tl.float64,
    w2: tl.float64,
    w3: tl.float64,
    IOU_GIVEN: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BY_SCOPE: tl.constexpr,
    GRADIENT: tl.constexpr,
    EACH: tl.constexpr,
    BY_ROW: tl.constexpr,
    MAY_SKIP: tl.constexpr,
    SCALE_GIVEN: tl.constexpr,
    EXPECTED_GIVEN: tl.constexpr,
    ROWS: tl.constexpr,
):
    tile = tl.program_id(0)
    wanted = number(scale_tensor, scale, SCALE_GIVEN)
    if MAY_SKIP:
        if wanted == number(expected_tensor, expected, EXPECTED_GIVEN):
            tile = tiles
    while tile < tiles:
        row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        loss, g0, g1, g2, g3, balance = smooth_l1_rows(
            pred, target, iou, weight, row, inside, lambda_, beta, w0, w1, w2, w3, IOU_GIVEN, WEIGHTS
        )
        norm = pointer(sc.loc_norm, tl.float32)
        if BY_SCOPE:
            scope = tl.load(scope_ids + row, mask=inside, other=0).to(tl.int64)
            known = inside & (scope >= 0) & (scope < scopes)
            factor = tl.where(
                known, balance * tl.load(norm + scope, mask=known, other=0.0).to(tl.float64), float("nan")
            )
        else:
            factor = balance * tl.load(norm).to(tl.float64)
        if EACH:
            tl.store(each + row, weighted_loss(w_loc * factor, loss).to(tl.float32), mask=inside)
        if GRADIENT:
            if BY_ROW:
                factor *= w_loc * tl.load(grad_rows + row, mask=inside, other=0.0).to(tl.float64)
            else:
                factor *= wanted * tl.load(pointer(sc.location, tl.float32)).to(tl.float64)
            at = out + 4 * row
            tl.store(at, (factor * g0).to(tl.float32).to(out.dtype.element_ty), mask=inside)
            tl.store(at + 1, (factor * g1).to(tl.float32).to(out.dtype.element_ty), mask=inside)
            tl.store(at + 2, (factor * g2).to(tl.float32).to(out.dtype.element_ty), mask=inside)
            tl.store(at + 3, (factor * g3).to(tl.float32).to(out.dtype.element_ty), mask=inside)
        tile += tl.num_programs(0)


class _SmoothL1Loss:
    """The launches of one call."""

    def __init__(
        self,
        pred: Tensor,
        target: Tensor,
        iou: Tensor | None,
        weight: Tensor | None,
        scope_ids: Tensor | None,
        num_scopes: int,
        lambda_: float,
        beta: float,
        box_weights: Sequence[float],
        normalize: bool,
        workspace: Sequence[Tensor],
    ) -> None:
        self.pred, self.scopes, self.normalize = pred, num_scopes, normalize
        self.tensors = (
            pred,
            target,
            pred if iou is None else iou,
            pred if weight is None else weight,
            pred if scope_ids is None else scope_ids,
        )
        self.numbers = (lambda_, beta, *box_weights)
        self.consts = {
            "IOU_GIVEN": iou is not None,
            "WEIGHTS": 0 if weight is None else weight.ndim,
            "BY_SCOPE": scope_ids is not None,
            "ROWS": ROWS,
            "num_warps": 4,
            "maxnreg": MAX_REGISTERS,
        }
        self.rows = pred.shape[0]
        self.tiles = cdiv(self.rows, ROWS)
        self.memory = Workspace(workspace)
        self.scratch = take_scratch(self.memory, self.tiles, num_scopes, num_scopes, 1, num_scopes)

    def coefficients(self, sums: Tensor, compute_sums: bool, **options: Any) -> None:
        if compute_sums:
            sizes = (self.rows, self.scopes, self.tiles)
            smooth_l1_positives_kernel[(self.tiles,)](self.scratch, *self.tensors, *sizes, *self.numbers, **self.consts)
        Coefficients(
            self.scratch,
            sums,
            self.tiles,
            self.scopes,
            BY_ID.value,
            compute_sums,
            normalize_loc=self.normalize,
            **options,
        ).launch()

    def fill(
        self,
        w_loc: float,
        grad: Tensor | None = None,
        each: Tensor | None = None,
        grad_rows: Tensor | None = None,
        scale: tuple[Tensor | None, float] = (None, 1.0),
        expected: tuple[Tensor | None, float] = (None, 1.0),
        may_skip: bool = False,
    ) -> None:
        x = self.pred
        smooth_l1_kernel[(programs_of(self.tiles, may_skip, x),)](
            self.scratch,
            x if grad is None else grad,
            x if each is None else each,
            *self.tensors,
            x if grad_rows is None else grad_rows,
            x if scale[0] is None else scale[0],
            x if expected[0] is None else expected[0],
            self.rows,
            self.scopes,
            self.tiles,
            w_loc,
            scale[1],
            expected[1],
            *self.numbers,
            GRADIENT=grad is not None,
            EACH=each is not None,
            BY_ROW=grad_rows is not None,
            MAY_SKIP=may_skip,
            SCALE_GIVEN=scale[0] is not None,
            EXPECTED_GIVEN=expected[0] is not None,
            **self.consts,
        )


def smooth_l1_sums(*arguments: Any) -> None:
    *inputs, sums, workspace = arguments
    with on_device(inputs[0]):
        op = _SmoothL1Loss(*inputs, workspace)
        if op.tiles == 0:
            sums.zero_()
        else:
            op.coefficients(sums, True)


def smooth_l1_fill(*arguments: Any) -> None:
    """The loss is known with the coefficients; the rows are read again for their gradient only."""
    inputs, rest = arguments[:10], arguments[10:]
    w_loc, eps, avg, divisor, world_size, scale_tensor, grad_scale, compute_sums, sums, loss, grads, workspace = rest
    with on_device(inputs[0]):
        op = _SmoothL1Loss(*inputs, workspace)
        if op.tiles == 0:
            return no_rows(sums, loss, compute_sums)
        options = {"loc_avg": avg, "loc_divisor": divisor, "world_size": world_size, "eps": eps, "w_loc": w_loc}
        op.coefficients(sums, compute_sums, outputs=(0, loss.data_ptr(), 0, 0), **options)
        if grads:
            op.fill(w_loc, grads[0], scale=(scale_tensor, grad_scale))


def smooth_l1_backward(*arguments: Any) -> None:
    inputs, rest = arguments[:10], arguments[10:]
    w_loc, rest = rest[0], rest[5:]
    scale_tensor, grad_scale, filled, _, grad_output, grad, workspace = rest
    with on_device(inputs[0]):
        op = _SmoothL1Loss(*inputs, workspace)
        if op.tiles:
            expected = (scale_tensor, grad_scale)
            op.fill(w_loc, grad, scale=(grad_output, 0.0), expected=expected, may_skip=filled)


def smooth_l1_elementwise(*arguments: Any) -> None:
    """reduction="none": the rows' losses (P,), or with grad_output (P,) the gradient."""
    inputs, rest = arguments[:10], arguments[10:]
    w_loc, eps, grad_output, compute_sums, sums, out, workspace = rest
    with on_device(inputs[0]):
        op = _SmoothL1Loss(*inputs, workspace)
        if op.tiles == 0:
            if compute_sums:
                sums.zero_()
            return
        op.coefficients(sums, compute_sums, eps=eps, w_loc=w_loc)
        if grad_output is None:
            op.fill(w_loc, each=out)
        else:
            op.fill(w_loc, out, grad_rows=grad_output)
