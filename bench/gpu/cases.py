"""Parity cases of every op, for any device and backend: seeded inputs, one evaluation, figures with their budgets.

`evaluate(backend, device, wide)` runs a case; with `wide` it is the float64 oracle's turn. The same list serves the
parity matrix and, without the oracle, the sanitizers.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

import ioubal_kernels as ik
from ioubal_kernels import testing

from . import matching_cases

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows x classes: vector tails, single classes, several blocks, COCO's and LVIS's class counts.
SHAPES = ((1, 1), (33, 3), (257, 7), (40, 21), (129, 80), (900, 80), (31, 91), (5, 1203))
ODD_LEVELS = ((9, 13), (4, 7), (3, 3), (1, 2), (1, 1))


@dataclass(frozen=True)
class Figure:
    """One result and how it is judged."""

    what: str
    value: Tensor
    kind: str  # of assert_close_budget, or "exact"
    budget: torch.dtype
    floor: float | Tensor = testing.FLOOR


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    evaluate: Callable[[str, str, bool], list[Figure]]  # backend, device, whether in float64


def check(case: Case, backend: str, device: str) -> None:
    """Raises AssertionError unless the backend's figures are within their budgets of the oracle's on that device."""
    got = case.evaluate(backend, device, False)
    want = case.evaluate("reference", device, True)
    for figure, exact in zip(got, want, strict=True):
        what = f"{case.name}: {figure.what}"
        if figure.kind == "exact":
            same = figure.value == exact.value
            assert bool(same.all()), f"{what}: {int((~same).sum())} of {same.numel()} differ"
            continue
        testing.assert_close_budget(figure.value, exact.value, figure.budget, figure.kind, figure.floor, what=what)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def on_device(value: Any, device: str) -> Any:
    """Tensors of an option, also within a pair, on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    return tuple(on_device(v, device) for v in value) if isinstance(value, tuple) else value


# ---------------------------------------------------------------------------------------------- flat losses


def flat_figures(
    function: Callable[..., Tensor],
    x: Tensor,
    rest: tuple[Any, ...],
    backend: str,
    wide: bool,
    floor: float | Tensor = testing.FLOOR,
    loss_floor: float = testing.FLOOR,
    **options: Any,
) -> list[Figure]:
    """Loss and gradient of a flat loss. x keeps its place in memory."""
    leaf = (x.double() if wide else x).detach().requires_grad_()
    loss = function(leaf, *rest, backend=backend, **options)
    loss.backward(torch.ones_like(loss))
    if not wide:
        assert loss.dtype == torch.float32, f"the loss is {loss.dtype}"
        assert leaf.grad.dtype == x.dtype, f"the gradient is {leaf.grad.dtype}"
    kind = "gradient" if loss.ndim else "loss"  # single losses have the elements' budget
    return [
        Figure("loss", loss.detach(), kind, torch.float32, loss_floor),
        Figure("gradient", leaf.grad, "gradient", x.dtype, floor),
    ]


OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum, eps": {"reduction": "sum", "eps": 0.3},
    "weight, scopes, divisor": {"weight": True, "scope_ids": True, "avg_factor": 17.5},
}


def options_of(name: str, inputs: testing.ClassificationInputs) -> dict[str, Any]:
    options = dict(OPTIONS[name])
    if "weight" in options:
        options |= {"weight": inputs.weight, "scope_ids": inputs.scope_ids, "num_scopes": inputs.num_scopes}
    return options


def focal_case(name: str, draw: dict[str, Any], options: str | dict[str, Any], **more: Any) -> Case:
    """A sigmoid focal loss on `classification_inputs(**draw)`; options by name or as they are."""

    def evaluate(backend: str, device: str, wide: bool) -> list[Figure]:
        inputs = testing.classification_inputs(**draw, device=device)
        chosen = options_of(options, inputs) if isinstance(options, str) else dict(options)
        if chosen.get("weight") is True:
            chosen["weight"] = inputs.weight
        rest = (inputs.labels, inputs.iou)
        function = ik.iou_balanced_sigmoid_focal_loss
        return flat_figures(function, inputs.logits, rest, backend, wide, **chosen, **more)

    return Case("focal", f"focal {name}", evaluate)


def focal_cases() -> Iterator[Case]:
    for dtype, gamma, (rows, classes), options in product(DTYPES, (0.0, 1.0, 2.0, 1.5), SHAPES, OPTIONS):
        draw = {"seed": rows, "rows": rows, "classes": classes, "dtype": dtype}
        yield focal_case(f"{short(dtype)} gamma {gamma} {rows}x{classes} {options}", draw, options, gamma=gamma)
    for dtype, reduction, alpha, eta in product(DTYPES, ("none", "mean"), (None, 0.0, 1.0, 0.6), (0.0, 0.7, 3.0)):
        draw = {"seed": 3, "rows": (4, 29), "classes": 11, "dtype": dtype, "index_dtype": torch.int32}
        more = {"alpha": alpha, "eta": eta, "reduction": reduction}
        yield focal_case(f"{short(dtype)} {reduction} alpha {alpha} eta {eta}", draw, {"weight": True}, **more)
    for classes, ignored, share in product((1, 6, 80), (0.0, 0.3, 1.0), (0.0, 0.01, 0.5, 1.0)):
        draw = {"seed": 5, "rows": 3000, "classes": classes, "positive_share": share}
        draw["ignored_share"] = min(ignored, 1 - share)
        yield focal_case(f"3000x{classes} positive {share} ignored {ignored}", draw, {})


def in_place_cases() -> Iterator[Case]:
    """The gradient written over the logits, and rescaled where grad_output is not the expected one."""
    for dtype, scale in product(DTYPES, (1.0, 0.5)):

        def evaluate(
            backend: str, device: str, wide: bool, dtype: torch.dtype = dtype, scale: float = scale
        ) -> list[Figure]:
            inputs = testing.classification_inputs(rows=300, classes=21, dtype=dtype, device=device)
            options = {} if wide else {"inplace": True, "grad_scale": scale}
            rest = (inputs.labels, inputs.iou)
            return flat_figures(ik.iou_balanced_sigmoid_focal_loss, inputs.logits, rest, backend, wide, **options)

        yield Case("focal", f"focal {short(dtype)} in place, grad_scale {scale}", evaluate)


def memory_cases() -> Iterator[Case]:
    """The same values at other addresses and strides: every alignment has its own path."""
    example = testing.classification_inputs(rows=70, classes=16).logits
    for dtype, name in product(DTYPES, [name for name, _ in testing.same_values_other_memory(example)]):

        def evaluate(
            backend: str, device: str, wide: bool, dtype: torch.dtype = dtype, name: str = name
        ) -> list[Figure]:
            inputs = testing.classification_inputs(rows=70, classes=16, dtype=dtype, device=device)
            x = dict(testing.same_values_other_memory(inputs.logits))[name]
            rest = (inputs.labels, inputs.iou)
            return flat_figures(ik.iou_balanced_sigmoid_focal_loss, x, rest, backend, wide)

        yield Case("focal", f"focal {short(dtype)}, logits {name}", evaluate)


def cross_entropy_cases() -> Iterator[Case]:
    shapes = [shape for shape in SHAPES if shape[1] > 1]
    for dtype, background, (rows, classes), options in product(DTYPES, (0, -1), shapes, [*OPTIONS, "none"]):

        def evaluate(
            backend: str,
            device: str,
            wide: bool,
            dtype: torch.dtype = dtype,
            background: int = background,
            rows: int = rows,
            classes: int = classes,
            options: str = options,
        ) -> list[Figure]:
            draw = {"seed": rows, "rows": rows, "classes": classes, "softmax": True, "dtype": dtype}
            inputs = testing.classification_inputs(**draw, device=device)
            chosen = {"reduction": "none"} if options == "none" else options_of(options, inputs)
            # softmax - 1 cancels at the target: that entry is judged against the row's own scale.
            divisor = {"mean": max(int((inputs.labels >= 0).sum()), 1), "sum, eps": 1.0, "none": 1.0}
            row = inputs.weight if "weight" in chosen else torch.ones(rows, device=device)
            target = torch.nn.functional.one_hot(inputs.labels.clamp(min=0).long(), classes)
            floor = testing.FLOOR + target * row[:, None].double() / divisor.get(options, 17.5)
            return flat_figures(
                ik.iou_balanced_cross_entropy,
                inputs.logits,
                (inputs.labels, inputs.iou),
                backend,
                wide,
                floor,
                # log(sum) of a confident row: float32's sum, 1 + the rest, has an absolute error of 6e-8.
                loss_floor=0.1 if options == "none" else testing.FLOOR,
                background_index=background % classes,
                **chosen,
            )

        yield Case("cross_entropy", f"cross entropy {short(dtype)} {rows}x{classes} {background} {options}", evaluate)


def smooth_l1_cases() -> Iterator[Case]:
    variants = product(DTYPES, (0.0, 0.11, 1.0), (None, 1, 2), (True, False), (True, False), ("mean", "none"))
    for dtype, beta, weight, normalize, given, reduction in variants:

        def evaluate(
            backend: str,
            device: str,
            wide: bool,
            dtype: torch.dtype = dtype,
            weight: int | None = weight,
            given: bool = given,
            keywords: dict[str, Any] = {"beta": beta, "normalize": normalize, "reduction": reduction},  # noqa: B006
        ) -> list[Figure]:
            rows = 5000 if weight is None else 57
            pred, target = testing.delta_inputs(seed=2, rows=rows, dtype=dtype, device=device)
            iou = torch.rand(rows, generator=torch.Generator().manual_seed(1)).to(device) if given else None
            columns = torch.linspace(0, 2, 4 * rows, device=device).reshape(rows, 4)
            weights = {None: None, 1: torch.linspace(0, 2, rows, device=device), 2: columns}[weight]
            box_weights = (10.0, 10.0, 5.0, 5.0) if weight else (1.0, 1.0, 1.0, 1.0)
            options = {"weight": weights, "box_weights": box_weights, "w_loc": 3.049, **keywords}
            return flat_figures(ik.iou_balanced_smooth_l1_loss, pred, (target, iou), backend, wide, **options)

        name = f"{short(dtype)} beta {beta} weight {weight} eq{7 if normalize else 6} {reduction}"
        yield Case("smooth_l1", f"smooth L1 {name}{' iou given' if given else ''}", evaluate)


# ---------------------------------------------------------------------------------------------- detection


def flat_gradients(inputs: testing.DetectionInputs) -> tuple[Tensor, Tensor]:
    """The .grad of both heads in flat layout; each must have its head's dtype and strides."""
    heads = inputs.heads()
    for head in heads:
        assert head.grad.dtype == head.dtype and head.grad.stride() == head.stride(), "a gradient of another layout"
    grads, half = [head.grad for head in heads], len(heads) // 2
    if isinstance(inputs.cls_logits, Tensor):
        return grads[0], grads[1]
    per_location = inputs.per_location
    return testing.from_levels(grads[:half], per_location), testing.from_levels(grads[half:], per_location)


def detection_case(
    name: str, draw: dict[str, Any], layout: str, padded: bool = False, offset: int = 0, **options: Any
) -> Case:
    """The fused loss on `detection_inputs(**draw)`. The oracle sees the same numbers flat. offset: elements by which
    flat logits lie off their allocation."""

    def evaluate(backend: str, device: str, wide: bool) -> list[Figure]:
        inputs = testing.detection_inputs(**draw, device=device)
        dtype = inputs.cls_logits.dtype
        chosen = {key: on_device(value, device) for key, value in options.items()}
        scale = chosen.pop("grad_scale", 1.0)
        if wide:
            inputs = inputs.double().requiring_grad()
        else:
            chosen["grad_scale"] = scale
            if layout != "flat":
                chosen.pop("anchors_per_level", None)
            inputs = (inputs.padded() if padded else inputs).in_layout(layout).requiring_grad()
            if offset:
                store = torch.zeros(inputs.cls_logits.numel() + offset, dtype=dtype, device=device)
                store[offset:] = inputs.cls_logits.detach().reshape(-1)
                inputs.cls_logits = store[offset:].view(inputs.cls_logits.shape).requires_grad_()
        out = ik.iou_balanced_detection_loss(*inputs.arguments(), backend=backend, **chosen)
        # The losses' gradients differ in their factor: a kernel that mixes them up is found.
        (out.classification + 2.0 * out.localization).backward()
        figures = [
            Figure(name, getattr(out, name).detach(), "loss", torch.float32)
            for name in ("classification", "localization", "mean_iou", "num_positives")
        ]
        logits, deltas = flat_gradients(inputs)
        return [*figures, Figure("logits", logits, "gradient", dtype), Figure("deltas", deltas, "gradient", dtype)]

    return Case("detection", f"detection {name}", evaluate)


PARAMETERS: tuple[dict[str, Any], ...] = (
    {"avg_factor": 5.5},
    {"avg_factor": torch.tensor(7.0)},
    {"avg_factor": torch.tensor([3.0, 4.0, 5.0])},
    {"avg_factor": torch.tensor([3, 4, 5])},
    {"avg_factor": (torch.tensor([3.0, 4.0, 5.0]), 2.0)},
    {"grad_scale": 1024.0},
    {"grad_scale": torch.tensor(0.5)},
    {"cls_weight": 0.3, "w_loc": 0.0},
    {"alpha": None, "eta": 0.0, "lambda_": 0.0},
    {"beta": 0.0, "box_weights": (10.0, 10.0, 5.0, 5.0)},
    {"eta": 4.0, "lambda_": 0.5, "alpha": 1.0},
    {"inplace": True},
    {"inplace": True, "grad_scale": 0.5},  # rescaled in the backward
)


def described(value: Any) -> str:
    """An option's value in a case's name."""
    return f"{short(value.dtype)} {list(value.shape)}" if isinstance(value, Tensor) else str(value)


def detection_cases() -> Iterator[Case]:
    variants = product(
        DTYPES,
        testing.LAYOUTS,
        (2.0, 1.5, 0.0),
        ("batch", "level", "image"),
        ("delta", "fovea"),
        (False, True),
        (False, True),
    )
    for dtype, layout, gamma, scope, coder, padded, normalize in variants:
        draw = {"seed": 7, "images": 2, "classes": 5, "per_location": 3, "levels": ODD_LEVELS, "dtype": dtype}
        draw["box_coder"] = coder
        options = {"gamma": gamma, "normalizer_scope": scope, "box_coder": coder, "normalize_loc": normalize}
        options |= {"w_loc": 3.049, "eps": 0.0 if normalize else 1e-6}
        options["anchors_per_level"] = [h * w * 3 for h, w in ODD_LEVELS]
        name = f"{short(dtype)} {layout} gamma {gamma} {scope} {coder} {'padded' if padded else 'listed'}"
        yield detection_case(f"{name} eq{7 if normalize else 6}", draw, layout, padded, **options)
    shapes = ((1, 1), (1, 9), (3, 1), (7, 2), (80, 9), (91, 3))
    levels = ((13, 17), (5, 3), (1, 1))
    for layout, (classes, per_location), ignored, share in product(
        testing.LAYOUTS, shapes, (0.0, 0.02, 0.4), (0.0, 0.01, 0.6)
    ):
        draw = {"seed": 3, "images": 3, "classes": classes, "per_location": per_location, "levels": levels}
        draw |= {"positive_share": share, "ignored_share": ignored, "index_dtype": torch.int32}
        name = f"{layout} K {classes} A {per_location} positive {share} ignored {ignored}"
        yield detection_case(name, draw, layout, padded=True)
    for dtype, layout, options in product(DTYPES, testing.LAYOUTS, PARAMETERS):
        draw = {"seed": 11, "images": 3, "classes": 4, "dtype": dtype}
        name = ", ".join(f"{k} {described(v)}" for k, v in options.items())
        yield detection_case(f"{short(dtype)} {layout} {name}", draw, layout, **options)
    for dtype, offset in product(DTYPES, (1, 2, 3, 4, 8)):
        draw = {"seed": 5, "images": 2, "classes": 16, "levels": ((20, 20),), "dtype": dtype}
        yield detection_case(f"{short(dtype)} flat, off by {offset}", draw, "flat", offset=offset)
    for layout, images in product(testing.LAYOUTS, (1, 65)):
        draw = {"seed": 6, "images": images, "classes": 3, "shared_anchors": False}
        yield detection_case(f"{layout} anchors of their own, {images} images, listed", draw, layout)
    for dtype, layout in product(DTYPES, testing.LAYOUTS):
        draw = {"seed": 1, "images": 1, "classes": 80, "per_location": 9, "levels": ((50, 84), (13, 21))}
        draw |= {"positive_share": 0.002, "ignored_share": 0.006, "dtype": dtype}
        yield detection_case(f"{short(dtype)} {layout} two RetinaNet levels", draw, layout)


# ---------------------------------------------------------------------------------------------- boxes


def box_cases() -> Iterator[Case]:
    for dtype, coder, op in product(DTYPES, ("delta", "fovea"), ("decode", "encode", "paired_box_iou", "delta_iou")):

        def evaluate(
            backend: str, device: str, wide: bool, dtype: torch.dtype = dtype, coder: str = coder, op: str = op
        ) -> list[Figure]:
            g = torch.Generator().manual_seed(4)
            corner = torch.rand(1000, 2, generator=g) * 100
            anchors = torch.cat([corner, corner + torch.rand(1000, 2, generator=g) * 50 + 10], 1).to(device, dtype)
            deltas = (torch.randn(1000, 4, generator=g) * 0.3).to(device, dtype)
            boxes = (anchors.float() + torch.randn(1000, 4, generator=g).to(device)).to(dtype)
            if wide:
                anchors, deltas, boxes = anchors.double(), deltas.double(), boxes.double()
            # A corner is centre - size / 2, both up to 300: three roundings of that are 10 times the float32 budget.
            # IoUs and encoded deltas are of size 1, and differences of coordinates as well.
            if op == "decode":
                leaf = deltas.requires_grad_()
                out = ik.decode_boxes(leaf, anchors, box_coder=coder, backend=backend)
                (grad,) = torch.autograd.grad((out * torch.tensor([1.0, 2, 3, 4], device=device)).sum(), leaf)
                boxes_figure = Figure("boxes", out.detach(), "gradient", torch.float32, 10.0)
                return [boxes_figure, Figure("gradient", grad, "gradient", dtype)]
            if op == "encode":
                out = ik.encode_boxes(boxes, anchors, box_coder=coder, backend=backend)
            elif op == "delta_iou":
                out = ik.delta_iou(deltas, deltas.flip(0), box_coder=coder, backend=backend)
            else:
                out = ik.paired_box_iou(boxes, anchors, backend=backend)
            return [Figure("values", out, "gradient", torch.float32, 1.0)]

        yield Case("boxes", f"{op} {short(dtype)} {coder}", evaluate)


def decision_cases() -> Iterator[Case]:
    """Matching: no budget."""
    for op, name, decide in matching_cases.decisions():

        def evaluate(backend: str, device: str, wide: bool, decide: matching_cases.Decide = decide) -> list[Figure]:
            return [Figure("matches", decide(backend, device), "exact", torch.float32)]

        yield Case(op, name, evaluate)


# ---------------------------------------------------------------------------------------------- the lists


def parity_cases() -> list[Case]:
    """Every case, in an order that mixes the ops: what a time limit cuts off is a share of each."""
    flat = (focal_cases, in_place_cases, memory_cases, cross_entropy_cases, smooth_l1_cases)
    generators = (*flat, detection_cases, box_cases, decision_cases)
    cases = [case for generator in generators for case in generator()]
    random.Random(0).shuffle(cases)
    return cases


def pairwise(cases: Iterable[Case]) -> list[Case]:
    """Cases in which every two options occur together that do so in all cases, the most telling first; an option is a
    word of a case's name. For a backend that compiles a kernel for each combination."""
    cases = list(cases)
    pairs = [set(combinations(sorted({case.op, *case.name.split()}), 2)) for case in cases]
    left, chosen = set().union(*pairs), []
    # What a case adds only falls as others are chosen: the old numbers are upper bounds, looked at again at the top.
    queue = [(-len(own), i) for i, own in enumerate(pairs)]
    heapq.heapify(queue)
    while left:
        bound, i = heapq.heappop(queue)
        added = len(pairs[i] & left)
        if added == -bound:
            left -= pairs[i]
            chosen.append(cases[i])
        elif added:
            heapq.heappush(queue, (-added, i))
    return chosen


def is_small(case: Case) -> bool:
    """Under an instrumented run a case of many blocks costs seconds and finds nothing that few blocks do not."""
    return all(size not in case.name for size in ("RetinaNet", "3000x", "900x"))


def small_cases(count: int) -> list[Case]:
    """`count` cases for a sanitizer: as many of each op as there are, smallest inputs excluded from none."""
    by_op: dict[str, list[Case]] = {}
    for case in parity_cases():
        if is_small(case):
            by_op.setdefault(case.op, []).append(case)
    chosen: list[Case] = []
    while len(chosen) < count and any(by_op.values()):
        for op in sorted(by_op):
            if by_op[op] and len(chosen) < count:
                chosen.append(by_op[op].pop())
    return chosen
