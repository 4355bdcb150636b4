"""Flat IoU-balanced sigmoid focal loss and binary cross entropy: positives, coefficients, the pass over the logits, and
what is left: sum and positive entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import positives
from ._launch import MAX_REGISTERS, Workspace, cdiv, on_device, pointer, programs_of
from ._math import balance_share, focal_positive, iou_power, weighted_loss
from .coefficients import BATCH, BY_ID, Coefficients, clear_tickets, take_scratch
from .focal_dense import GRADIENT, LOSS, NOTHING
from .focal_finish import focal_finish_kernel
from .focal_pass import DenseLevel, DensePass
from .positives import IGNORED, INVALID, PLAIN, collect, listed_at, marks_at, store_marks, store_sums

FINISH_ROWS = 1024  # of a program of the last kernel


@triton.jit(do_not_specialize=["rows", "scopes", "all_tiles"])
def focal_positives_kernel(
    marks,
    sc,
    logits,
    labels,
    iou,
    weight,
    scope_ids,
    rows: tl.int64,
    scopes,
    all_tiles,
    eta: tl.float64,
    positive_factor: tl.float64,
    gamma: tl.float64,
    CLASSES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BY_SCOPE: tl.constexpr,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
):
    clear_tickets(sc)
    row0 = tl.program_id(0).to(tl.int64) * TILE
    row = row0 + tl.arange(0, TILE)
    inside = row < rows
    label = tl.load(labels + row, mask=inside, other=-1).to(tl.int64)
    invalid = (label < -2) | (label >= CLASSES)
    if BY_SCOPE:
        scope = tl.load(scope_ids + row, mask=inside, other=0).to(tl.int64)
        invalid = invalid | (scope < 0) | (scope >= scopes)
    positive = inside & (label >= 0) & (invalid == 0)
    mark = tl.where(invalid, INVALID, tl.where(label >= 0, label, tl.where(label == -2, IGNORED, PLAIN)))
    store_marks(marks_at(marks, row0, CLASSES), tl.arange(0, TILE), mark, inside)
    bad = tl.where(inside & invalid, 1.0, 0.0).to(tl.float64)

    tile_list = pointer(marks.listed, tl.int16) + row0
    count = collect(tile_list, positive, TILE)
    nothing = tl.zeros((LANES,), tl.float64)
    slot = tl.zeros((), tl.int32)
    while slot < scopes:
        number_of = tl.zeros((LANES,), tl.float64)
        plain_sum = tl.zeros((LANES,), tl.float64)
        weighted_sum = tl.zeros((LANES,), tl.float64)
        loss_sum = tl.zeros((LANES,), tl.float64)
        done = tl.zeros((), tl.int32)
        while done < count:
            listed, mask = listed_at(tile_list, done, count, LANES)
            at = row0 + listed
            if BY_SCOPE:
                mask = mask & (tl.load(scope_ids + at, mask=mask, other=-1).to(tl.int64) == slot)
            if tl.max(mask.to(tl.int32), 0) > 0:  # images follow each other: mostly all or none
                y = tl.load(labels + at, mask=mask, other=0).to(tl.int64)
                logit = tl.load(logits + at * CLASSES + y, mask=mask, other=0.0).to(tl.float64)
                balance = iou_power(tl.load(iou + at, mask=mask, other=0.0).to(tl.float64), eta)
                loss, slope = focal_positive(logit, gamma)
                if WEIGHTED:
                    sample = tl.load(weight + at, mask=mask, other=0.0).to(tl.float64)
                    loss *= sample
                    slope *= sample
                plain, weighted = balance_share(positive_factor * loss, balance)
                own = weighted_loss(balance, loss)
                number_of += tl.where(mask, 1.0, 0.0)
                plain_sum += tl.where(mask, plain, 0.0)
                weighted_sum += tl.where(mask, weighted, 0.0)
                loss_sum += tl.where(mask, positive_factor * own, 0.0)
                tl.store(pointer(marks.slope, tl.float32) + at, (balance * slope).to(tl.float32), mask=mask)
                tl.store(pointer(marks.loss, tl.float32) + at, own.to(tl.float32), mask=mask)
            done += LANES
        store_sums(
            sc, slot, scopes, all_tiles, number_of, nothing, bad, plain_sum, weighted_sum, loss_sum, nothing, nothing,
            nothing,
        )  # fmt: skip
        bad = bad * 0.0  # counted with the first slot
        slot += 1


class _FlatFocal:
    """The launches of one call."""

    def __init__(
        self,
        logits: Tensor,
        labels: Tensor,
        iou: Tensor,
        weight: Tensor | None,
        scope_ids: Tensor | None,
        num_scopes: int,
        eta: float,
        alpha: float,
        gamma: float,
        workspace: Sequence[Tensor],
    ) -> None:
        self.logits, self.labels, self.iou, self.weight, self.scope_ids = logits, labels, iou, weight, scope_ids
        self.scopes, self.eta, self.alpha, self.gamma = num_scopes, eta, alpha, gamma
        self.rows, self.classes = logits.shape
        self.tiles = cdiv(self.rows, positives.FLAT_TILE)
        self.memory = Workspace(workspace)
        self.scratch = take_scratch(self.memory, self.tiles, num_scopes, num_scopes, 1, num_scopes)
        self.marks = positives.take_marks(self.memory, self.rows, self.classes, self.tiles, flat=True)

    def coefficients(self, sums: Tensor, compute_sums: bool, **options: Any) -> None:
        """Both kernels before the pass over the logits."""
        if compute_sums and self.tiles:
            focal_positives_kernel[(self.tiles,)](
                self.marks,
                self.scratch,
                self.logits,
                self.labels,
                self.iou,
                self.logits if self.weight is None else self.weight,
                self.labels if self.scope_ids is None else self.scope_ids,
                self.rows,
                self.scopes,
                self.tiles,
                self.eta,
                1.0 if self.alpha < 0 else self.alpha,
                self.gamma,
                CLASSES=self.classes,
                WEIGHTED=self.weight is not None,
                BY_SCOPE=self.scope_ids is not None,
                TILE=positives.FLAT_TILE,
                LANES=positives.LANES,
                num_warps=4,
                maxnreg=MAX_REGISTERS,
            )
        Coefficients(
            self.scratch, sums, self.tiles, self.scopes, BY_ID.value, compute_sums, alpha=self.alpha, **options
        ).launch()

    def fill(self, out: Tensor | None, output: int, **options: Any) -> None:
        dense = DensePass(
            self.marks,
            self.scratch,
            [DenseLevel(self.logits, out, 0, 0, self.rows, 0)],
            1,
            self.classes,
            self.rows,
            self.gamma,
            output,
            row_weight=self.weight,
            **options,
        )
        dense.launch(self.memory)
        self.finish(dense, out)

    def finish(self, dense: DensePass, out: Tensor | None) -> None:
        """What is left after the pass over the logits, which wrote `out`."""
        x, want_loss = self.logits, dense.loss is not None
        tiles = cdiv(self.rows, FINISH_ROWS) if out is not None else 0
        programs = programs_of(tiles, dense.may_skip, x) + want_loss
        if programs == 0:
            return
        focal_finish_kernel[(programs,)](
            self.marks,
            self.scratch,
            x if out is None else out,
            self.labels if self.scope_ids is None else self.scope_ids,
            x if dense.scale[0] is None else dense.scale[0],
            x if dense.expected[0] is None else dense.expected[0],
            *dense.losses(),
            self.rows,
            self.scopes,
            tiles,
            dense.scale[1],
            dense.expected[1],
            K=self.classes,
            OUTPUT=dense.output,
            SCOPE=BATCH.value if self.scope_ids is None else BY_ID.value,
            WANT_LOSS=want_loss,
            MAY_SKIP=dense.may_skip,
            SCALE_GIVEN=dense.scale[0] is not None,
            EXPECTED_GIVEN=dense.expected[0] is not None,
            ROWS=FINISH_ROWS,
            num_warps=4,
            maxnreg=MAX_REGISTERS,
        )


def focal_sums(*arguments: Any) -> None:
    *inputs, sums, workspace = arguments
    with on_device(inputs[0]):
        op = _FlatFocal(*inputs, workspace)
        if op.tiles == 0:
            sums.zero_()
        else:
            op.coefficients(sums, True)


def no_rows(sums: Tensor, loss: Tensor, compute_sums: bool) -> None:
    """The loss of no rows; with a process group the sums are those of all ranks."""
    if compute_sums:
        sums.zero_()
    loss.copy_((sums[0, 0] * 0).masked_fill(sums[0, 2] != 0, float("nan")))


def focal_fill(*arguments: Any) -> None:
    """compute_sums false: `workspace` is as focal_sums left it, and `sums` holds those of all ranks."""
    inputs, rest = arguments[:9], arguments[9:]
    eps, avg, divisor, world_size, scale_tensor, grad_scale, compute_sums, sums, loss, grads, workspace = rest
    with on_device(inputs[0]):
        op = _FlatFocal(*inputs, workspace)
        if op.tiles == 0:
            return no_rows(sums, loss, compute_sums)
        options = {"cls_avg": avg, "cls_divisor": divisor, "world_size": world_size, "eps": eps}
        op.coefficients(sums, compute_sums, outputs=(loss.data_ptr(), 0, 0, 0), **options)
        output = GRADIENT.value if grads else NOTHING.value
        op.fill(grads[0] if grads else None, output, scale=(scale_tensor, grad_scale), loss=loss)


def focal_backward(*arguments: Any) -> None:
    """Leaves a gradient filled for the expected grad_output as it is, else computes it anew; `workspace` is as
    focal_fill left it."""
    inputs, rest = arguments[:9], arguments[13:]
    scale_tensor, grad_scale, filled, _, grad_output, grad, workspace = rest
    with on_device(inputs[0]):
        op = _FlatFocal(*inputs, workspace)
        if op.tiles:
            expected = (scale_tensor, grad_scale)
            op.fill(grad, GRADIENT.value, scale=(grad_output, 0.0), expected=expected, may_skip=filled)


def focal_elementwise(*arguments: Any) -> None:
    """reduction="none": the loss of every entry (`gradient` false) or its derivative."""
    inputs, rest = arguments[:9], arguments[9:]
    eps, gradient, compute_sums, sums, out, workspace = rest
    with on_device(inputs[0]):
        op = _FlatFocal(*inputs, workspace)
        if op.tiles == 0:
            if compute_sums:
                sums.zero_()
            return
        op.coefficients(sums, compute_sums, eps=eps)
        op.fill(out, GRADIENT.value if gradient else LOSS.value)
