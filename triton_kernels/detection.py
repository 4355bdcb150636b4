"""Launches of the fused detection loss: positives, coefficients, logits (focal_pass.py; mixed layouts or widths take
another one), and what is left: the sum, the positives' entries, the deltas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import positives
from ._launch import TYPES, Workspace, cdiv, ground_truth, on_device, pack, programs_of
from .coefficients import BATCH, IMAGE, LEVEL, Coefficients, take_scratch
from .detection_kernels import FinishNumbers, Levels, detection_finish_kernel, detection_positives_kernel
from .focal_dense import GRADIENT, NOTHING
from .focal_pass import DenseLevel, DensePass

# Of a thread of the first and the last kernel: four programs a multiprocessor, all of a large batch at once.
POSITIVES_REGISTERS = 128


def _delta_strides(t: Tensor) -> tuple[int, int, int, int, int]:
    """Of image, anchor of a location, row, column, coordinate. Flat: every row of the tensor is a row of the map."""
    if t.ndim == 3:
        return t.stride(0), 0, t.stride(1), 0, t.stride(2)
    return t.stride(0), 4 * t.stride(1), t.stride(2), t.stride(3), t.stride(1)


class _Level(NamedTuple):
    """A level of the heads; flat tensors are cut into their levels where the sums are."""

    tensor: int  # number of its tensor in the lists
    first_row: int  # in a flat tensor
    positions: int
    width: int
    anchors: int
    first_anchor: int
    planes: bool


class _Detection:
    """The launches of one call, from the arguments that all three ops share."""

    def __init__(
        self,
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        anchors: Tensor,
        matched_idxs: Tensor,
        gt_boxes: Sequence[Tensor],
        gt_labels: Sequence[Tensor],
        level_sizes: Sequence[int],
        scope: int,
        eta: float,
        alpha: float,
        gamma: float,
        lambda_: float,
        beta: float,
        box_coder: int,
        box_weights: Sequence[float],
        workspace: Sequence[Tensor],
    ) -> None:
        self.logits, self.deltas, self.anchors, self.matched = logits, deltas, anchors, matched_idxs
        self.gt_boxes, self.scope, self.alpha, self.gamma, self.beta = gt_boxes, scope, alpha, gamma, beta
        self.eta, self.lambda_, self.fovea, self.weights = eta, lambda_, box_coder == 1, list(box_weights)
        self.images, self.per_image = matched_idxs.shape
        self.classes = 0
        self.levels = self._levels(level_sizes)
        by_level = max(len(logits), len(level_sizes))  # these are of flat heads, empty where the sums are not by level
        self.scopes = {BATCH.value: 1, LEVEL.value: by_level, IMAGE.value: self.images}[scope]
        self.truth, self.gt_options = ground_truth(gt_boxes, gt_labels)
        tiles = [cdiv(level.positions, positives.TILE) for level in self.levels]
        starts = [sum(tiles[:i]) * self.images for i in range(len(tiles))]
        self.tile0, self.tiles = pack(*starts), pack(*tiles)
        self.all_tiles = sum(tiles) * self.images
        self.memory = Workspace(workspace)
        segments = len(self.levels) * self.images
        self.scratch = take_scratch(self.memory, self.all_tiles, 1, segments, self.images, self.scopes)
        self.marks = positives.take_marks(self.memory, self.images * self.per_image, self.classes, 0, flat=False)
        self.table = self._table(self.tile0, self.tiles)

    @property
    def empty(self) -> bool:
        return self.all_tiles == 0

    def _levels(self, level_sizes: Sequence[int]) -> list[_Level]:
        levels, first = [], 0
        for i, (x, d) in enumerate(zip(self.logits, self.deltas, strict=True)):
            if x.ndim == 3:
                self.classes, row = x.shape[2], 0
                cut = self.scope == LEVEL.value and len(level_sizes) > 0
                for size in level_sizes if cut else [x.shape[1]]:
                    levels.append(_Level(i, row, size, 1, 1, row, False))
                    row += size
                continue
            per_location = d.shape[1] // 4
            self.classes = x.shape[1] // max(per_location, 1)
            positions = x.shape[2] * x.shape[3] * per_location
            planes = not (x.stride(1) == 1 and x.shape[1] > 1)
            levels.append(_Level(i, 0, positions, max(x.shape[3], 1), per_location, first, planes))
            first += positions
        # A map of one location is rows and planes alike: as the others are, so that one launch serves all.
        single = [self.logits[v.tensor].ndim == 4 and v.positions == v.anchors for v in levels]
        any_planes = any(v.planes and not one for v, one in zip(levels, single))
        return [v._replace(planes=any_planes) if one else v for v, one in zip(levels, single)]

    def _table(self, tile0: tuple[int, ...], tiles: tuple[int, ...]) -> Levels:
        columns: list[list[int]] = [[] for _ in range(13)]
        for level in self.levels:
            x, d = self.logits[level.tensor], self.deltas[level.tensor]
            strides = _delta_strides(d)
            row = level.first_row
            values = (
                x.data_ptr() + row * self.classes * x.element_size(),
                x.numel() // max(x.shape[0], 1),
                int(level.planes),
                d.data_ptr() + row * strides[2] * d.element_size(),
                *strides,
                level.positions,
                level.width,
                max(level.anchors, 1),
                level.first_anchor,
            )
            for column, value in zip(columns, values, strict=True):
                column.append(value)
        return Levels(*(pack(*column) for column in columns), tile0, tiles)

    def find_positives(self) -> None:
        detection_positives_kernel[(self.all_tiles,)](
            self.table,
            self.truth,
            self.marks,
            self.scratch,
            self.matched,
            self.anchors,
            self.per_image,
            self.all_tiles,
            self.eta,
            1.0 if self.alpha < 0 else self.alpha,
            self.gamma,
            self.lambda_,
            self.beta,
            *self.weights,
            T=TYPES[self.logits[0].dtype],
            DELTA_T=TYPES[self.deltas[0].dtype],
            **self.gt_options,
            CLASSES=self.classes,
            OWN_ANCHORS=self.anchors.ndim == 3,
            FOVEA=self.fovea,
            SAME_POWER=self.lambda_ == self.eta,
            TILE=positives.TILE,
            CHUNK=positives.CHUNK,
            LANES=positives.LANES,
            num_warps=4,
            maxnreg=POSITIVES_REGISTERS,
        )

    def coefficients(self, sums: Tensor, compute_sums: bool) -> Coefficients:
        return Coefficients(
            self.scratch,
            sums,
            self.all_tiles,
            self.scopes,
            self.scope,
            compute_sums,
            images=self.images,
            levels=len(self.levels),
            tile0=self.tile0,
            tiles=self.tiles,
            alpha=self.alpha,
        )

    def fill_logits(self, grads: Sequence[Tensor], **options: Any) -> DensePass:
        """The pass over the logits; no gradients: only the loss."""
        levels = [
            DenseLevel(
                self.logits[level.tensor],
                grads[level.tensor] if grads else None,
                level.first_row * self.classes,
                self.logits[level.tensor].numel() // max(self.images, 1),
                level.positions,
                level.first_anchor,
                level.planes,
                level.positions // max(level.anchors, 1),
                level.anchors,
            )
            for level in self.levels
        ]
        dense = DensePass(
            self.marks,
            self.scratch,
            levels,
            self.images,
            self.classes,
            self.per_image,
            self.gamma,
            GRADIENT.value if grads else NOTHING.value,
            **options,
        )
        dense.launch(self.memory)
        return dense

    def finish(
        self,
        dense: DensePass | None,
        grad_logits: Sequence[Tensor],
        grad_deltas: Sequence[Tensor],
        scales: tuple[Tensor | None, Tensor | None, float],
        expected: tuple[Tensor | None, float],
        may_skip: bool,
    ) -> None:
        """What is left after the pass over the logits. dense: that of a forward, whose losses are added up; scales: the
        factors of the logits' and of the deltas' gradient, in tensors (of what is not wanted: None) or one number."""
        deltas = grad_deltas or self.deltas
        tiles = self.all_tiles if grad_logits or grad_deltas else 0
        addresses, strides = [], []
        for level in self.levels:
            grad = deltas[level.tensor]
            strides.append(_delta_strides(grad))
            addresses.append(grad.data_ptr() + level.first_row * strides[-1][2] * grad.element_size())
        logits = grad_logits or self.logits
        out_logits = [
            logits[level.tensor].data_ptr() + level.first_row * self.classes * logits[level.tensor].element_size()
            for level in self.levels
        ]
        *tensors, scale = scales
        given = [tensor for tensor in tensors if tensor is not None]
        cls_scale, loc_scale = (tensor if tensor is not None else [*given, logits[0]][0] for tensor in tensors)
        programs = programs_of(tiles, may_skip, logits[0]) + (dense is not None)
        detection_finish_kernel[(programs,)](
            self.table,
            pack(*out_logits),
            pack(*addresses),
            tuple(pack(*column) for column in zip(*strides)),
            self.truth,
            self.marks,
            self.scratch,
            FinishNumbers(
                cls_scale,
                loc_scale,
                logits[0] if expected[0] is None else expected[0],
            ),
            self.matched,
            self.anchors,
            *(dense.losses() if dense else (pack(0, 0), pack(0))),
            self.per_image,
            tiles,
            scale,
            expected[1],
            self.lambda_,
            self.beta,
            *self.weights,
            T=TYPES[logits[0].dtype],
            DELTA_T=TYPES[deltas[0].dtype],
            BOX_T=self.gt_options["BOX_T"],
            PADDED=self.gt_options["PADDED"],
            OWN_ANCHORS=self.anchors.ndim == 3,
            FOVEA=self.fovea,
            SCOPE=self.scope,
            WANT_LOSS=dense is not None,
            LOGITS=len(grad_logits) > 0,
            DELTAS=len(grad_deltas) > 0,
            MAY_SKIP=may_skip,
            SCALE_GIVEN=len(given) > 0,
            EXPECTED_GIVEN=expected[0] is not None,
            CLASSES=self.classes,
            TILE=positives.TILE,
            LANES=positives.LANES,
            num_warps=4,
            maxnreg=POSITIVES_REGISTERS,
        )


def _no_anchors(sums: Tensor, outputs: Sequence[Tensor], compute_sums: bool) -> None:
    """Losses of a batch without anchors or images; with a process group the sums are those of all ranks."""
    if compute_sums:
        sums.zero_()
    count, iou, bad = sums[0, 0], sums[0, 1], sums[0, 2]
    outputs[0].copy_((count * 0).masked_fill(bad != 0, float("nan")))
    outputs[1].copy_(outputs[0])
    outputs[2].copy_(count)
    outputs[3].copy_(iou / count.clamp(min=1))


def detection_sums(*arguments: Any) -> None:
    *inputs, sums, workspace = arguments
    with on_device(inputs[3]):
        op = _Detection(*inputs, workspace)
        if op.empty:
            sums.zero_()
            return
        op.find_positives()
        op.coefficients(sums, True).launch()


def detection_fill(*arguments: Any) -> None:
    """compute_sums false: `workspace` is as detection_sums left it, and `sums` holds those of all ranks."""
    inputs, rest = arguments[:15], arguments[15:]
    eps, w_loc, normalize_loc, cls_weight, cls_avg, cls_divisor, loc_avg, loc_divisor, world_size, *rest = rest
    scale_tensor, grad_scale, compute_sums, sums, outputs, grad_logits, grad_deltas, workspace = rest
    with on_device(inputs[3]):
        op = _Detection(*inputs, workspace)
        if op.empty:
            _no_anchors(sums, outputs, compute_sums)
            return
        if compute_sums:
            op.find_positives()
        coefficients = op.coefficients(sums, compute_sums)
        coefficients.eps, coefficients.w_loc, coefficients.normalize_loc = eps, w_loc, normalize_loc
        coefficients.cls_weight, coefficients.world_size = cls_weight, world_size
        coefficients.cls_avg, coefficients.cls_divisor = cls_avg, cls_divisor
        coefficients.loc_avg, coefficients.loc_divisor = loc_avg, loc_divisor
        coefficients.outputs = tuple(out.data_ptr() for out in outputs)
        coefficients.zeros = grad_deltas
        coefficients.launch()
        scale = (scale_tensor, grad_scale)
        dense = op.fill_logits(grad_logits, scale=scale, loss=outputs[0])
        op.finish(dense, grad_logits, grad_deltas, (scale_tensor, scale_tensor, grad_scale), scale, False)


def detection_backward(*arguments: Any) -> None:
    """Leaves gradients filled for the expected grad_output as they are, computes the others anew. An empty list: not
    wanted. `workspace` is as detection_fill left it."""
    inputs, rest = arguments[:15], arguments[24:]
    scale_tensor, grad_scale, filled, _, grad_cls, grad_loc, grad_logits, grad_deltas, workspace = rest
    with on_device(inputs[3]):
        op = _Detection(*inputs, workspace)
        if op.empty:
            return
        expected = (scale_tensor, grad_scale)
        if grad_logits:
            op.fill_logits(grad_logits, scale=(grad_cls, 0.0), expected=expected, may_skip=filled)
        if grad_deltas and not filled:
            torch._foreach_zero_(list(grad_deltas))
        if grad_logits or grad_deltas:
            op.finish(None, grad_logits, grad_deltas, (grad_cls, grad_loc, 0.0), expected, filled)
