"""IoU-balanced softmax cross entropy over logits (R, K): a program owns a few whole rows.

A row's logits stay in registers up to 2,048 columns; longer ones are read again, from the cache. Rows of a program are
counted from its first one, in 32 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._launch import MAX_REGISTERS, Workspace, cdiv, number, on_device, pack, pointer, power_of_two, programs_of, widest
from ._math import LOG2E, balance_share, ex2, iou_power, rcp, twice_log1p, weighted_loss
from .coefficients import BY_ID, Coefficients, clear_tickets, finish_loss, take_scratch
from .focal import no_rows
from .positives import store_totals

ENTRIES = 1024  # logits of a program, or one row
MAX_COLUMNS = 2048
MAX_ROWS = 128
SUM_BLOCK = 2048
SUM_ROWS = 2048  # of a tile of the positives' sums


@triton.jit
def load_columns(x_ptr, row, k, mask, K: tl.constexpr, VECTOR: tl.constexpr):
    """Logits (rows, columns) in float32, -inf where there are none."""
    at = x_ptr + row[:, None] * K + k[None, :]
    if VECTOR > 1:
        at = tl.multiple_of(at, (1, 16))
    return tl.load(at, mask=mask[:, None] & (k < K // VECTOR * VECTOR)[None, :], other=float("-inf")).to(tl.float32)


@triton.jit
def sum_others(x, k, top, target, K: tl.constexpr):
    """Sum of exp(x - top) over the columns but the target's."""
    counts = (k < K)[None, :] & (k[None, :] != target[:, None])
    return tl.sum(tl.where(counts, ex2((x - top[:, None]) * LOG2E), 0.0), 1)


@triton.jit
def log_plus_one(r):
    """log(1 + r) for r in [0, 1], relative to its size."""
    return 0.5 * twice_log1p(r, r * rcp(1.0 + r), True)


@triton.jit
def row_terms(x_ptr, row, mask, target, K: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr):
    """Of rows with these targets: the first columns' logits, the largest logit, the target's exponential and the
    others' sum, the loss, and for rows with infinite logits how many are +inf and whether there is no limit."""
    k = tl.arange(0, COLUMNS)
    first = load_columns(x_ptr, row, k, mask, K, VECTOR)
    top = tl.max(first, 1)
    for start in range(COLUMNS, K, COLUMNS):
        top = tl.maximum(top, tl.max(load_columns(x_ptr, row, start + k, mask, K, VECTOR), 1))
    logit = tl.load(x_ptr + row * K + target, mask=mask, other=0.0).to(tl.float32)
    others = sum_others(first, k, top, target, K)
    for start in range(COLUMNS, K, COLUMNS):
        others += sum_others(load_columns(x_ptr, row, start + k, mask, K, VECTOR), start + k, top, target, K)
    own = ex2((logit - top) * LOG2E)
    # Without cancellation where the target has most of the probability; elsewhere the loss is log 2 or more.
    certain = others <= own
    loss = tl.where(
        certain,
        log_plus_one(tl.where(certain, others / tl.where(certain, own, 1.0), 0.0)),
        tl.log(own + others) + (top - logit),
    )
    infinite = tl.zeros_like(target)
    undefined = target < 0  # false
    odd = mask & (loss - loss != 0.0)
    if tl.max(odd.to(tl.int32), 0) > 0:
        # Limits: a single +inf takes all the probability, several share it, a NaN makes the row NaN.
        nan = tl.zeros_like(target)
        for start in range(0, K, COLUMNS):
            x = load_columns(x_ptr, row, start + k, odd, K, VECTOR)
            infinite += tl.sum((x == float("inf")).to(tl.int32), 1)
            nan += tl.sum((x != x).to(tl.int32), 1)
        target_infinite = (infinite > 0) & (logit == float("inf"))
        nothing = (infinite == 0) & (own != own)  # all of them -inf
        undefined = odd & ((nan > 0) | nothing | (target_infinite & (infinite > 1)))
        limit = tl.where(target_infinite, 0.0, float("inf"))
        loss = tl.where(undefined, float("nan"), tl.where(infinite > 0, limit, loss))
    return first, top, own, others, loss, infinite, undefined


@triton.jit(do_not_specialize=["rows", "background"])
def cross_entropy_positives_kernel(
    losses,  # packed address: float32 per row, the loss of positives
    logits,
    labels,
    rows: tl.int64,
    background: tl.int64,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row0 = tl.program_id(0).to(tl.int64) * ROWS
    local = tl.arange(0, ROWS)
    label = tl.load(labels + row0 + local, mask=row0 + local < rows, other=-1).to(tl.int64)
    positive = (label >= 0) & (label < K) & (label != background)
    if tl.max(positive.to(tl.int32), 0) > 0:
        target = tl.where(positive, label, 0).to(tl.int32)
        _, _, _, _, loss, _, _ = row_terms(logits + row0 * K, local, positive, target, K, COLUMNS, VECTOR)
        tl.store(pointer(losses, tl.float32) + row0 + local, loss, mask=positive)


@triton.jit(do_not_specialize=["rows", "scopes", "tiles", "background"])
def cross_entropy_sums_kernel(
    sc,
    addresses,  # packed, float32 per row, of positives: iou^eta, written here, and the loss
    labels,
    iou,
    weight,
    scope_ids,
    rows: tl.int64,
    scopes,
    tiles,
    background: tl.int64,
    eta: tl.float64,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BY_SCOPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """By tiles of many rows: of each and every scope there are sums to be kept."""
    clear_tickets(sc)
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = row < rows
    label = tl.load(labels + row, mask=inside, other=-1).to(tl.int64)
    invalid = label >= K
    scope = tl.zeros((TILE,), tl.int32)
    if BY_SCOPE:
        given = tl.load(scope_ids + row, mask=inside, other=0).to(tl.int64)
        invalid = invalid | (given < 0) | (given >= scopes)
        scope = tl.where(invalid, 0, given).to(tl.int32)
    positive = inside & (label >= 0) & (invalid == 0) & (label != background)
    loss = tl.load(pointer(addresses[1], tl.float32) + row, mask=positive, other=0.0).to(tl.float64)
    if WEIGHTED:
        loss *= tl.load(weight + row, mask=positive, other=0.0).to(tl.float64)
    balance = iou_power(tl.load(iou + row, mask=positive, other=0.0).to(tl.float64), eta)
    plain, weighted = balance_share(loss, balance)
    tl.store(pointer(addresses[0], tl.float32) + row, balance.to(tl.float32), mask=positive)
    # Counts are the whole batch's, not a scope's: they go to the first slot.
    number_of = tl.sum((inside & (label >= 0)).to(tl.int32), 0).to(tl.float64)
    bad = tl.sum((inside & invalid).to(tl.int32), 0).to(tl.float64)
    nothing = tl.zeros((), tl.float64)
    low = tl.min(tl.where(positive, scope, scopes), 0)  # scopes are mostly sorted: a tile has few of them
    high = tl.max(tl.where(positive, scope, -1), 0)
    slot = tl.zeros((), tl.int32)
    while slot < scopes:
        s = nothing
        w = nothing
        if (slot >= low) & (slot <= high):
            mine = positive & (scope == slot)
            s = tl.sum(tl.where(mine, plain, 0.0), 0)
            w = tl.sum(tl.where(mine, weighted, 0.0), 0)
        store_totals(sc, slot, scopes, tiles, number_of, nothing, bad, s, w, nothing, nothing, nothing, nothing)
        number_of = nothing
        bad = nothing
        slot += 1


@triton.jit(do_not_specialize=["rows", "scopes", "tiles", "background"])
def cross_entropy_kernel(
    sc,
    addresses,  # packed: balances, sums of the tiles, the loss
    logits,
    out,  # gradient (R, K)
    each,  # losses (R,)
    labels,
    weight,
    scope_ids,
    grad_rows,
    scale_tensor,
    expected_tensor,
    rows: tl.int64,
    scopes,
    tiles,
    background: tl.int64,
    scale: tl.float64,
    expected: tl.float64,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BY_SCOPE: tl.constexpr,
    GRADIENT: tl.constexpr,
    EACH: tl.constexpr,
    BY_ROW: tl.constexpr,  # grad_rows (R,) instead of one factor
    WANT_LOSS: tl.constexpr,
    MAY_SKIP: tl.constexpr,
    SCALE_GIVEN: tl.constexpr,
    EXPECTED_GIVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    tile = tl.program_id(0)
    wanted = number(scale_tensor, scale, SCALE_GIVEN)
    if MAY_SKIP:
        if wanted == number(expected_tensor, expected, EXPECTED_GIVEN):  # the buffer holds what is asked for already
            tile = tiles
    shared = tl.load(pointer(sc.negative, tl.float32))
    while tile < tiles:
        row0 = tile.to(tl.int64) * ROWS
        local = tl.arange(0, ROWS)
        row = row0 + local
        inside = row < rows
        label = tl.load(labels + row, mask=inside, other=-1).to(tl.int64)
        invalid = label >= K
        norm = tl.load(pointer(sc.cls_norm, tl.float32))
        if BY_SCOPE:
            scope = tl.load(scope_ids + row, mask=inside, other=0).to(tl.int64)
            invalid = invalid | (scope < 0) | (scope >= scopes)
            norm = tl.load(pointer(sc.cls_norm, tl.float32) + scope, mask=inside & (invalid == 0), other=0.0)
        counted = inside & (label >= 0) & (invalid == 0)
        positive = counted & (label != background)
        balance = tl.load(pointer(addresses[0], tl.float32) + row, mask=positive, other=1.0)
        balance = tl.where(positive, balance * norm, 1.0)
        sample = tl.full((ROWS,), 1.0, tl.float32)
        if WEIGHTED:
            sample = tl.load(weight + row, mask=inside, other=0.0).to(tl.float32)
        target = tl.where(counted, label, 0).to(tl.int32)
        first, top, own, others, loss, infinite, undefined = row_terms(
            logits + row0 * K, local, counted, target, K, COLUMNS, VECTOR
        )
        loss = tl.where(counted, weighted_loss(balance, sample * loss), 0.0)
        loss = tl.where(inside & invalid, float("nan"), loss)
        if EACH:
            tl.store(each + row, loss, mask=inside)
        if WANT_LOSS:
            tl.store(pointer(addresses[1], tl.float32) + tile, tl.sum(loss * shared, 0))
        if GRADIENT:
            if BY_ROW:
                factor = tl.load(grad_rows + row, mask=inside, other=0.0).to(tl.float32)
            else:
                factor = tl.full((ROWS,), 1.0, tl.float32) * (wanted.to(tl.float32) * shared)
            factor *= sample * balance
            store_gradient(
                out + row0 * K, first, local, tl.arange(0, COLUMNS), inside, counted, target, top, own, others,
                infinite, undefined, factor, K, VECTOR,
            )  # fmt: skip
            for start in range(COLUMNS, K, COLUMNS):
                k = start + tl.arange(0, COLUMNS)
                x = load_columns(logits + row0 * K, local, k, counted, K, VECTOR)
                store_gradient(
                    out + row0 * K, x, local, k, inside, counted, target, top, own, others, infinite, undefined,
                    factor, K, VECTOR,
                )  # fmt: skip
        tile += tl.num_programs(0)
    if WANT_LOSS:
        finish_loss(addresses[1], tiles, sc, addresses[2], SUM_BLOCK)


@triton.jit
def store_gradient(
    out, x, row, k, inside, counted, target, top, own, others, infinite, undefined, factor,
    K: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """factor * (softmax - one at the target) of some columns; 0 in rows that do not count."""
    share = factor / (own + others)
    hit = k[None, :] == target[:, None]
    # p - 1 of the target is -(the others' share).
    value = tl.where(hit, -others[:, None], ex2((x - top[:, None]) * LOG2E)) * share[:, None]
    if tl.max((infinite > 0).to(tl.int32) | undefined.to(tl.int32), 0) > 0:
        p = tl.where(x == float("inf"), 1.0 / tl.maximum(infinite, 1).to(tl.float32)[:, None], 0.0)
        limit = factor[:, None] * (p - hit.to(tl.float32))
        value = tl.where((infinite > 0)[:, None], limit, value)
        value = tl.where(undefined[:, None], float("nan"), value)
    value = tl.where(counted[:, None], value, 0.0)
    at = out + row[:, None] * K + k[None, :]
    if VECTOR > 1:
        at = tl.multiple_of(at, (1, 16))
    mask = inside[:, None] & (k < K // VECTOR * VECTOR)[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask=mask)


class _SoftmaxLoss:
    """The launches of one call."""

    def __init__(
        self,
        logits: Tensor,
        labels: Tensor,
        iou: Tensor,
        weight: Tensor | None,
        scope_ids: Tensor | None,
        num_scopes: int,
        background: int,
        eta: float,
        workspace: Sequence[Tensor],
    ) -> None:
        self.logits, self.labels, self.iou, self.weight, self.scope_ids = logits, labels, iou, weight, scope_ids
        self.scopes, self.background, self.eta = num_scopes, background, eta
        self.rows, self.columns = logits.shape
        width = min(power_of_two(self.columns), MAX_COLUMNS)
        self.consts = {
            "K": self.columns,
            "ROWS": max(min(ENTRIES // width, MAX_ROWS), 1),
            "COLUMNS": width,
            "num_warps": 4,
        }
        self.options = {"WEIGHTED": weight is not None, "BY_SCOPE": scope_ids is not None}
        self.tiles = cdiv(self.rows, self.consts["ROWS"])
        self.memory = Workspace(workspace)
        self.sum_tiles = cdiv(self.rows, SUM_ROWS)
        self.scratch = take_scratch(self.memory, self.sum_tiles, num_scopes, num_scopes, 1, num_scopes)
        self.balances = self.memory.take(self.rows, 4)

    def vector(self, *tensors: Tensor) -> int:
        size = self.logits.element_size()
        width = widest(size, self.columns * size, *(t.data_ptr() for t in tensors))
        return width if width * size == 16 else 1

    def coefficients(self, sums: Tensor, compute_sums: bool, **options: Any) -> None:
        if compute_sums:
            losses = self.memory.take(self.rows, 4)
            cross_entropy_positives_kernel[(self.tiles,)](
                pack(losses)[0],
                self.logits,
                self.labels,
                self.rows,
                self.background,
                VECTOR=self.vector(self.logits),
                **self.consts,
            )
            cross_entropy_sums_kernel[(self.sum_tiles,)](
                self.scratch,
                pack(self.balances, losses),
                self.labels,
                self.iou,
                self.logits if self.weight is None else self.weight,
                self.labels if self.scope_ids is None else self.scope_ids,
                self.rows,
                self.scopes,
                self.sum_tiles,
                self.background,
                self.eta,
                K=self.columns,
                TILE=SUM_ROWS,
                num_warps=8,
                **self.options,
            )
        Coefficients(
            self.scratch, sums, self.sum_tiles, self.scopes, BY_ID.value, compute_sums, rows_count_all=True, **options
        ).launch()

    def fill(
        self,
        grad: Tensor | None = None,
        each: Tensor | None = None,
        loss: Tensor | None = None,
        grad_rows: Tensor | None = None,
        scale: tuple[Tensor | None, float] = (None, 1.0),
        expected: tuple[Tensor | None, float] = (None, 1.0),
        may_skip: bool = False,
    ) -> None:
        x = self.logits
        partial = self.memory.take(self.tiles, 4) if loss is not None else 0
        cross_entropy_kernel[(programs_of(self.tiles, may_skip, x),)](
            self.scratch,
            pack(self.balances, partial, loss.data_ptr() if loss is not None else 0),
            x,
            x if grad is None else grad,
            x if each is None else each,
            self.labels,
            x if self.weight is None else self.weight,
            self.labels if self.scope_ids is None else self.scope_ids,
            x if grad_rows is None else grad_rows,
            x if scale[0] is None else scale[0],
            x if expected[0] is None else expected[0],
            self.rows,
            self.scopes,
            self.tiles,
            self.background,
            scale[1],
            expected[1],
            GRADIENT=grad is not None,
            EACH=each is not None,
            BY_ROW=grad_rows is not None,
            WANT_LOSS=loss is not None,
            MAY_SKIP=may_skip,
            SCALE_GIVEN=scale[0] is not None,
            EXPECTED_GIVEN=expected[0] is not None,
            VECTOR=self.vector(x, x if grad is None else grad),
            SUM_BLOCK=SUM_BLOCK,
            maxnreg=MAX_REGISTERS,
            **self.options,
            **self.consts,
        )


def cross_entropy_sums(*arguments: Any) -> None:
    *inputs, sums, workspace = arguments
    with on_device(inputs[0]):
        op = _SoftmaxLoss(*inputs, workspace)
        if op.tiles == 0:
            sums.zero_()
        else:
            op.coefficients(sums, True)


def cross_entropy_fill(*arguments: Any) -> None:
    """compute_sums false: `workspace` is as cross_entropy_sums left it, and `sums` holds those of all ranks."""
    inputs, rest = arguments[:8], arguments[8:]
    eps, avg, divisor, world_size, scale_tensor, grad_scale, compute_sums, sums, loss, grads, workspace = rest
    with on_device(inputs[0]):
        op = _SoftmaxLoss(*inputs, workspace)
        if op.tiles == 0:
            return no_rows(sums, loss, compute_sums)
        options = {"cls_avg": avg, "cls_divisor": divisor, "world_size": world_size, "eps": eps}
        op.coefficients(sums, compute_sums, outputs=(loss.data_ptr(), 0, 0, 0), **options)
        op.fill(grads[0] if grads else None, loss=loss, scale=(scale_tensor, grad_scale))


def cross_entropy_backward(*arguments: Any) -> None:
    """Leaves a gradient filled for the expected grad_output as it is; `workspace` is as cross_entropy_fill left it."""
    inputs, rest = arguments[:8], arguments[12:]
    scale_tensor, grad_scale, filled, _, grad_output, grad, workspace = rest
    with on_device(inputs[0]):
        op = _SoftmaxLoss(*inputs, workspace)
        if op.tiles:
            op.fill(grad, scale=(grad_output, 0.0), expected=(scale_tensor, grad_scale), may_skip=filled)


def cross_entropy_elementwise(*arguments: Any) -> None:
    """reduction="none": the rows' losses, or with grad_output (R,) the gradient."""
    inputs, rest = arguments[:8], arguments[8:]
    eps, grad_output, compute_sums, sums, out, workspace = rest
    with on_device(inputs[0]):
        op = _SoftmaxLoss(*inputs, workspace)
        if op.tiles == 0:
            if compute_sums:
                sums.zero_()
            return
        op.coefficients(sums, compute_sums, eps=eps)
        if grad_output is None:
            op.fill(each=out)
        else:
            op.fill(out, grad_rows=grad_output)
