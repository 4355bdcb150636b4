"""Seeded inputs, edge cases and the error budget: shared by the tests and the benchmark, and free of any test
framework.

Inputs are drawn in float32 from one generator and then rounded to the wanted dtype, so that the same seed gives the
same numbers in every dtype and layout, and ``double()`` of them is what the float64 oracle sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from . import boxes as _boxes
from .boxes import BACKGROUND, IGNORE

LAYOUTS = ("flat", "nchw", "channels_last")
# RetinaNet on 800 x 1333 pixels: 200,700 anchors with 9 per location.
RETINANET_LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21), (7, 11))

# Relative error per element of a gradient: float32 by the kernels' polynomials, 16 bit by two half-ulp roundings.
GRADIENT_BUDGET = {torch.float32: 8e-6, torch.float64: 1e-10, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
# Relative error of a loss (a sum); 16-bit inputs are accumulated in float32.
LOSS_BUDGET = {torch.float32: 1e-6, torch.float64: 1e-10, torch.bfloat16: 1e-6, torch.float16: 1e-6}
# Below this size an error counts as if the element had this size: kernels flush denormals to zero.
FLOOR = 1e-30


# ---------------------------------------------------------------------------------------------- error budget


def assert_close_budget(
    got: Tensor,
    want64: Tensor,
    dtype: torch.dtype,
    kind: str = "gradient",
    floor: float | Tensor = FLOOR,
    what: str = "",
) -> None:
    """Assert that got is within the error budget of the float64 oracle's want64.

    Args:
        got: the tested result.
        want64: float64, the same shape.
        dtype: the dtype of the tested computation's inputs, which sets the budget.
        kind: "gradient" (got has this dtype; the budget holds element by element) or "loss" (float32 or float64).
        floor: size, scalar or per element, below which an element's error is taken relative to the floor. Raise it
            where the result is a difference of larger numbers, to their size.
        what: named in the failure.

    Raises AssertionError naming the worst element. NaN must meet NaN, and infinities the same infinity.
    """
    if kind not in ("gradient", "loss"):
        raise ValueError(f"assert_close_budget: kind must be 'gradient' or 'loss', got {kind!r}")
    if got.shape != want64.shape:
        raise AssertionError(f"{what}: shape {tuple(got.shape)} instead of {tuple(want64.shape)}")
    value, want64 = got.detach().double(), want64.detach().double()
    relative = (GRADIENT_BUDGET if kind == "gradient" else LOSS_BUDGET)[dtype]
    allowed = relative * want64.abs().clamp(min=floor)
    good = (value == want64) | (value.isnan() & want64.isnan())
    if kind == "gradient" and dtype in (torch.float16, torch.bfloat16):
        limits = torch.finfo(dtype)
        allowed = allowed + limits.smallest_normal * limits.eps  # one subnormal step
        beyond = want64.abs() >= limits.max * (1.0 - relative)
        good = good | (beyond & value.isinf() & (value.sign() == want64.sign()))
    error = (value - want64).abs()
    good = good | (want64.isfinite() & (error <= allowed))  # false for NaN
    if bool(good.all()):
        return
    excess = torch.where(good, -1.0, (error / allowed).nan_to_num(nan=math.inf)).reshape(-1)
    worst = int(excess.argmax())
    raise AssertionError(
        f"{what or kind}: {int((~good).sum())} of {good.numel()} elements beyond the {dtype} budget of {relative:.3g};"
        f" worst at flat index {worst}: got {value.reshape(-1)[worst].item()!r},"
        f" expected {want64.reshape(-1)[worst].item()!r}, {excess[worst].item():.3g} times the budget"
    )


# ---------------------------------------------------------------------------------------------- inputs


@dataclass
class ClassificationInputs:
    """Arguments of the flat classification losses."""

    logits: Tensor  # (..., K)
    labels: Tensor  # (...)
    iou: Tensor  # (...)
    weight: Tensor  # (...)
    scope_ids: Tensor  # (...)
    num_scopes: int


def classification_inputs(
    seed: int = 0,
    rows: int | Sequence[int] = 64,
    classes: int = 5,
    *,
    positive_share: float = 0.25,
    ignored_share: float = 0.1,
    softmax: bool = False,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int64,
    num_scopes: int = 3,
    spread: float = 3.0,
    device: str = "cpu",
) -> ClassificationInputs:
    """Logits (rows, K) of normal distribution with this spread, labels, IoUs, weights in [0.5, 1.5) and scope ids.

    Sigmoid labels are classes, -1 and -2; with softmax=True column 0 is the background and ignored rows are -1.
    """
    g = torch.Generator().manual_seed(seed)
    shape = (rows,) if isinstance(rows, int) else tuple(rows)
    logits = torch.randn(*shape, classes, generator=g) * spread
    kind = torch.rand(shape, generator=g)
    first = min(1, classes - 1) if softmax else 0
    positive = torch.randint(first, classes, shape, generator=g)
    background, ignored = (0, -1) if softmax else (BACKGROUND, IGNORE)
    labels = torch.where(kind < positive_share, positive, background)
    labels = torch.where(kind >= 1.0 - ignored_share, ignored, labels)
    iou = torch.rand(shape, generator=g)
    weight = torch.rand(shape, generator=g) + 0.5
    scope_ids = torch.randint(0, num_scopes, shape, generator=g)
    return ClassificationInputs(
        logits.to(device, dtype),
        labels.to(device, index_dtype),
        iou.to(device, dtype),
        weight.to(device, dtype),
        scope_ids.to(device, index_dtype),
        num_scopes,
    )


def delta_inputs(
    seed: int = 0, rows: int = 64, *, noise: float = 0.3, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """pred_deltas and target_deltas (rows, 4): targets of unit size and predictions around them."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randn(rows, 4, generator=g) * 0.5
    pred = target + torch.randn(rows, 4, generator=g) * noise
    return pred.to(device, dtype), target.to(device, dtype)


@dataclass
class DetectionInputs:
    """Arguments of the fused loss; `arguments()` in its order."""

    cls_logits: Tensor | list[Tensor]
    bbox_deltas: Tensor | list[Tensor]
    anchors: Tensor
    matched_idxs: Tensor
    gt_boxes: Tensor | list[Tensor]
    gt_labels: Tensor | list[Tensor]
    levels: Sequence[tuple[int, int]] = field(default=())
    per_location: int = 1

    def arguments(self) -> tuple[Any, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))[:6]

    @property
    def level_sizes(self) -> list[int]:
        """Anchors of each level."""
        return [h * w * self.per_location for h, w in self.levels]

    def heads(self) -> list[Tensor]:
        """Every tensor of the two heads, logits first."""
        logits, deltas = self.cls_logits, self.bbox_deltas
        return [logits, deltas] if isinstance(logits, Tensor) else [*logits, *deltas]

    def requiring_grad(self) -> DetectionInputs:
        """The same with fresh leaves for the heads' outputs that require gradients and keep their layout."""
        return self._map_heads(lambda t: t.detach().clone(memory_format=torch.preserve_format).requires_grad_())

    def double(self) -> DetectionInputs:
        """The same numbers in float64, for the oracle."""
        wide = self._map_heads(lambda t: t.detach().double())
        gt = wide.gt_boxes
        gt = gt.double() if isinstance(gt, Tensor) else [b.double() for b in gt]
        return replace(wide, anchors=wide.anchors.double(), gt_boxes=gt)

    def in_layout(self, layout: str) -> DetectionInputs:
        """Flat inputs as level maps of the same numbers ("nchw" or "channels_last"), or themselves ("flat")."""
        if layout == "flat":
            return self
        return replace(
            self,
            cls_logits=to_levels(self.cls_logits, self.levels, self.per_location, layout),
            bbox_deltas=to_levels(self.bbox_deltas, self.levels, self.per_location, layout),
        )

    def padded(self, extra: int = 2) -> DetectionInputs:
        """Listed gt boxes as padded tensors with `extra` unused places; padding boxes are NaN, their labels -1."""
        longest = max((b.shape[0] for b in self.gt_boxes), default=0) + extra
        like = self.anchors
        boxes = torch.full((len(self.gt_boxes), longest, 4), math.nan, dtype=like.dtype, device=like.device)
        labels = torch.full(
            boxes.shape[:2], -1, dtype=self.gt_labels[0].dtype if self.gt_labels else torch.int64, device=like.device
        )
        for i, (box, label) in enumerate(zip(self.gt_boxes, self.gt_labels, strict=True)):
            boxes[i, : box.shape[0]] = box
            labels[i, : label.shape[0]] = label
        return replace(self, gt_boxes=boxes, gt_labels=labels)

    def _map_heads(self, function: Any) -> DetectionInputs:
        if isinstance(self.cls_logits, Tensor):
            return replace(self, cls_logits=function(self.cls_logits), bbox_deltas=function(self.bbox_deltas))
        return replace(
            self,
            cls_logits=[function(t) for t in self.cls_logits],
            bbox_deltas=[function(t) for t in self.bbox_deltas],
        )


def detection_inputs(
    seed: int = 0,
    images: int = 2,
    classes: int = 3,
    *,
    per_location: int = 2,
    levels: Sequence[tuple[int, int]] = ((4, 5), (2, 3)),
    positive_share: float = 0.15,
    ignored_share: float = 0.1,
    max_boxes: int = 5,
    box_coder: str = "delta",
    layout: str = "flat",
    gt: str = "list",
    shared_anchors: bool = True,
    dtype: torch.dtype = torch.float32,
    box_dtype: torch.dtype | None = None,
    index_dtype: torch.dtype = torch.int64,
    device: str = "cpu",
) -> DetectionInputs:
    """A batch whose predictions lie around their targets, so that the positives' IoUs fill (0, 1).

    Each image has 1 to max_boxes gt boxes; anchors lie around them. Layout: "flat", "nchw" or "channels_last"; gt:
    "list" or "padded". Head tensors get `dtype`, anchors and boxes `box_dtype` (default: float64 for float64, else
    float32).
    """
    g = torch.Generator().manual_seed(seed)
    if box_dtype is None:
        box_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    rows = per_location * sum(h * w for h, w in levels)

    def draw_boxes(count: int) -> Tensor:
        centre = torch.rand(count, 2, generator=g) * 200 + 100
        size = torch.rand(count, 2, generator=g) * 60 + 40
        return torch.cat((centre - size / 2, centre + size / 2), 1)

    counts = torch.randint(1, max_boxes + 1, (images,), generator=g).tolist()
    gt_boxes = [draw_boxes(count) for count in counts]
    gt_labels = [torch.randint(0, classes, (count,), generator=g) for count in counts]
    anchor_sets = 1 if shared_anchors else images
    anchors = draw_boxes(rows * anchor_sets).reshape(anchor_sets, rows, 4)

    kind = torch.rand(images, rows, generator=g)
    choice = torch.rand(images, rows, generator=g)
    count = torch.tensor(counts).reshape(images, 1)
    matched = (choice * count).to(torch.int64).clamp(max=(count - 1).clamp(min=0))
    matched = torch.where(kind < positive_share, matched, BACKGROUND)
    matched = torch.where(kind >= 1.0 - ignored_share, IGNORE, matched)

    logits = torch.randn(images, rows, classes, generator=g) * 2 - 2
    deltas = torch.randn(images, rows, 4, generator=g) * 0.2
    for image in range(images):
        at = (matched[image] >= 0).nonzero().squeeze(1)
        own = anchors[0 if shared_anchors else image][at]
        deltas[image, at] += _boxes.encode(gt_boxes[image][matched[image, at]], own, box_coder=box_coder)
    inputs = DetectionInputs(
        logits.to(device, dtype),
        deltas.to(device, dtype),
        (anchors[0] if shared_anchors else anchors).to(device, box_dtype),
        matched.to(device, index_dtype),
        [b.to(device, box_dtype) for b in gt_boxes],
        [t.to(device, index_dtype) for t in gt_labels],
        tuple(levels),
        per_location,
    )
    inputs = inputs.in_layout(layout)
    return inputs.padded() if gt == "padded" else inputs


def to_levels(flat: Tensor, levels: Sequence[tuple[int, int]], per_location: int, layout: str) -> list[Tensor]:
    """(N, R, C) in anchor order level, h, w, a as level maps (N, A*C, H, W), contiguous ("nchw") or "channels_last"."""
    if layout not in LAYOUTS[1:]:
        raise ValueError(f"to_levels: layout must be one of {', '.join(LAYOUTS[1:])}, got {layout!r}")
    images, _, channels = flat.shape
    memory_format = torch.contiguous_format if layout == "nchw" else torch.channels_last
    maps = []
    for (height, width), part in zip(levels, flat.split([h * w * per_location for h, w in levels], 1), strict=True):
        level = part.reshape(images, height, width, per_location * channels).permute(0, 3, 1, 2)
        maps.append(level.contiguous(memory_format=memory_format))
    return maps


def from_levels(maps: Sequence[Tensor], per_location: int) -> Tensor:
    """The inverse of ``to_levels``."""
    parts = [m.permute(0, 2, 3, 1).reshape(m.shape[0], -1, m.shape[1] // per_location) for m in maps]
    return torch.cat(parts, 1)


def loss_and_gradient(function: Any, inputs: Any, **options: Any) -> tuple[Any, Any]:
    """One forward and backward: (loss, gradient) with fresh leaves.

    A classification loss on ClassificationInputs gives the gradient of the logits; the fused loss on DetectionInputs
    the list of gradients of the heads' tensors, for the sum of both losses.
    """
    if isinstance(inputs, DetectionInputs):
        leaves = inputs.requiring_grad()
        loss = function(*leaves.arguments(), **options)
        return loss, list(torch.autograd.grad(loss[0] + loss[1], leaves.heads()))
    logits = inputs.logits.detach().clone().requires_grad_()
    loss = function(logits, inputs.labels, inputs.iou, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]


def check_saved_elsewhere(loss: Callable[[], Tensor], leaves: Sequence[Tensor]) -> None:
    """Asserts that gradients are the same to the bit wherever autograd keeps what a loss saves: in clones, or in
    contiguous copies (``torch.autograd.graph.save_on_cpu(pin_memory=True)``). For another grad_output than the
    expected one, so that they are computed from it.
    """
    value = loss()
    want = torch.autograd.grad(value, leaves, torch.full_like(value, 2.0))
    for copy in (Tensor.clone, lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)):
        with torch.autograd.graph.saved_tensors_hooks(lambda x, copy=copy: copy(x.detach()), lambda x: x):
            value = loss()
        got = torch.autograd.grad(value, leaves, torch.full_like(value, 2.0))
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert a.stride() == b.stride(), f"strides of gradient {i}"
            assert torch.equal(a, b), f"gradient {i}: off by up to {(a - b).abs().max()}"


# ---------------------------------------------------------------------------------------------- edge cases

# Logits where careless formulas overflow, cancel or give 0 * inf.
EXTREME_LOGITS = (
    0.0, -0.0, 1e-45, -1e-45, 1e-38, 1e-8, -1e-8, 1.0, -1.0, 9.4, -9.4, 15.0, -15.0, 18.0, -18.0, 20.0, -20.0, 31.0,
    -31.0, 44.0, -44.0, 87.0, -87.0, 88.0, -88.0, 88.8, -88.8, 100.0, -100.0, 104.0, -104.0, 745.0, -745.0, 1e4, -1e4,
    65504.0, -65504.0, 3e38, -3e38, math.inf, -math.inf,
)  # fmt: skip
# Rows and classes around the sizes at which vector loops, blocks and tiles end.
AWKWARD_ROWS = (1, 2, 3, 7, 31, 32, 33, 127, 128, 129, 255, 257, 1023, 1025)
AWKWARD_CLASSES = (1, 2, 3, 5, 7, 15, 16, 17, 20, 21, 80, 90, 91, 365, 1203)


def extreme_logits(dtype: torch.dtype = torch.float32) -> Tensor:
    """EXTREME_LOGITS rounded to dtype, without the values that become infinite only there."""
    values = torch.tensor(EXTREME_LOGITS, dtype=torch.float64)
    rounded = values.to(dtype)
    return rounded[~(rounded.isinf() & values.isfinite())]


def saturated_positives(logit: float, difference: float) -> Iterator[tuple[str, Tensor, tuple[Tensor, Tensor], dict]]:
    """Losses (name, first argument, the other ones, options) of two positives: one without an IoU, one that has an IoU
    and next to no loss, by its logit or its difference: S / D would overflow float32 if it were not bounded.
    """
    labels, iou = torch.tensor([0, 1]), torch.tensor([0.0, 0.9])
    logits = torch.tensor([[0.0, -1.0], [2.0, logit]])
    far = torch.tensor([[2.0, 0.0, 0.0, 0.0], [difference, 0.0, 0.0, 0.0]])
    yield "iou_balanced_sigmoid_focal_loss", logits.clone(), (labels, iou), {"gamma": 5.0}
    yield "iou_balanced_cross_entropy", logits, (labels, iou), {}
    yield "iou_balanced_smooth_l1_loss", far, (torch.zeros(2, 4), iou), {"normalize": True}


def placed(t: Tensor, offset: int = 0) -> Tensor:
    """The same values and strides at an offset (elements) of an allocation that ends where the tensor ends."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return t.new_empty(offset + span).as_strided(t.shape, t.stride(), offset).copy_(t.detach())


def same_values_other_memory(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors equal to t (2 or more dimensions) that lie differently in memory: (name, tensor)."""
    yield "contiguous", t.contiguous()
    yield "transposed", t.transpose(0, -1).contiguous().transpose(0, -1)
    wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1] + 1, dtype=t.dtype, device=t.device)
    wide[..., 1 : 2 * t.shape[-1] + 1 : 2] = t
    yield "strided", wide[..., 1 : 2 * t.shape[-1] + 1 : 2]
    for offset in (1, 3, 15):
        store = torch.zeros(t.numel() + offset, dtype=t.dtype, device=t.device)
        store[offset:] = t.reshape(-1)
        yield f"offset{offset}", store[offset:].view(t.shape)
    rows = torch.zeros(t.shape[0] + 2, *t.shape[1:], dtype=t.dtype, device=t.device)
    rows[1:-1] = t
    yield "sliced", rows[1:-1]
