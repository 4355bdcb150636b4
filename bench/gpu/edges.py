"""GPU check: special values of the arithmetic, edge cases of inputs, and labels that nobody has checked."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor

import ioubal_kernels as ik
from ioubal_kernels import testing

from .cases import DTYPES, Case, Figure, check, detection_case, flat_figures, short
from .sections import Plan, Tally

Check = tuple[str, Callable[[], Any]]


def gradient_of(plan: Plan, logits: Tensor, label: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the summed focal loss, every row with this label and IoU 1."""
    x = logits.detach().reshape(-1, 1).requires_grad_()
    labels = torch.full((x.shape[0],), label, device=x.device)
    iou = torch.ones(x.shape[0], device=x.device)
    loss = ik.iou_balanced_sigmoid_focal_loss(x, labels, iou, reduction="sum", backend=plan.backend, **options)
    return loss.detach(), torch.autograd.grad(loss, x)[0][:, 0]


def exactly(plan: Plan, dtype: torch.dtype, gamma: float, alpha: float | None) -> None:
    """Where e^-|x| vanishes beside 1, p is exactly 1: the reciprocal of 1 must be 1. Other ends: nothing left."""
    large = torch.tensor([60.0, 88.0, 200.0, 1e4, 6e4], device=plan.device, dtype=dtype)
    factor = 1.0 if alpha is None else 1.0 - alpha
    _, grad = gradient_of(plan, large, -1, gamma=gamma, alpha=alpha)
    assert bool((grad == factor).all()), f"gradients of large negatives {grad.tolist()} instead of {factor}"
    loss, grad = gradient_of(plan, -large[2:], -1, gamma=gamma, alpha=alpha)
    assert bool((grad.float().abs() < testing.FLOOR).all()) and float(loss) < testing.FLOOR, (
        f"easy negatives: {grad.tolist()}"
    )
    loss, grad = gradient_of(plan, large[2:], 0, gamma=gamma, alpha=alpha)
    assert bool((grad.float().abs() < testing.FLOOR).all()) and float(loss) < testing.FLOOR, (
        f"easy positives: {grad.tolist()}"
    )


def every_16_bit_logit(dtype: torch.dtype, gamma: float, label: int, reduction: str) -> Case:
    """All finite bit patterns: for "none" the values themselves in float32, else the fused pass in the dtype."""

    def evaluate(backend: str, device: str, wide: bool) -> list[Figure]:
        x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
        x = x[x.isfinite()].reshape(-1, 1).to(device)
        x = x.float() if reduction == "none" else x
        ones = torch.ones(x.shape[0], device=device)
        labels = torch.full((x.shape[0],), label, device=device)
        options = {"gamma": gamma, "eta": 0.0, "reduction": reduction}
        figures = flat_figures(ik.iou_balanced_sigmoid_focal_loss, x, (labels, ones), backend, wide, **options)
        # A sum over values up to 3e38 is infinite in float32; its terms are judged by reduction "none".
        return figures if reduction == "none" else figures[1:]

    name = f"all {short(dtype)} logits, gamma {gamma}, label {label}, {reduction}"
    return Case("focal", name, evaluate)


def special_functions(tally: Tally) -> None:
    """Exactness of exp2 and reciprocal at their ends, and every 16-bit logit there is."""
    plan = tally.plan
    cases: list[Check] = []
    for dtype, gamma, alpha in product(DTYPES, (0.0, 1.0, 2.0), (None, 0.25)):  # other powers have the budget only
        name = f"exact ends, {short(dtype)}, gamma {gamma}, alpha {alpha}"
        cases.append((name, lambda d=dtype, g=gamma, a=alpha: exactly(plan, d, g, a)))
    for dtype, gamma, label, reduction in product(DTYPES[1:], (0.0, 1.0, 2.0, 0.5), (-1, 0), ("none", "sum")):
        case = every_16_bit_logit(dtype, gamma, label, reduction)
        cases.append((case.name, lambda case=case: check(case, plan.backend, plan.device)))
    tally.each(cases if not plan.small else cases[:: len(cases) // 8])


# ---------------------------------------------------------------------------------------------- inputs at their edges


def extreme(dtype: torch.dtype, gamma: float, alpha: float | None, positive: bool) -> Case:
    """Logits where careless formulas overflow or give 0 * inf; each row in a scope of its own."""

    def evaluate(backend: str, device: str, wide: bool) -> list[Figure]:
        x = testing.extreme_logits(dtype)[:, None].to(device)
        rows = len(x)
        rest = (torch.full((rows,), 0 if positive else -1, device=device), torch.ones(rows, device=device))
        options = {"scope_ids": torch.arange(rows, device=device), "num_scopes": rows, "reduction": "none"}
        options |= {"alpha": alpha, "gamma": gamma}
        figures = flat_figures(
            ik.iou_balanced_sigmoid_focal_loss, x, rest, backend, wide, 1e-25, loss_floor=1e-25, **options
        )
        if not wide:
            assert not bool(figures[0].value.isnan().any()), "a loss is NaN"
        # float32 has no numbers beyond its largest: there the loss may be that or infinite.
        largest = torch.finfo(torch.float32).max
        clamped = figures[0].value.double().clamp(-largest, largest)
        return [Figure("loss", clamped, "gradient", torch.float32, 1e-25), figures[1]]

    name = f"extreme {short(dtype)} logits, gamma {gamma}, alpha {alpha}, {'positive' if positive else 'negative'}"
    return Case("focal", name, evaluate)


def ignored_rows(plan: Plan, layout: str, dtype: torch.dtype) -> None:
    """Logits and deltas of ignored anchors are NaN: no trace in the losses, gradients exactly 0."""
    clean = testing.detection_inputs(seed=8, classes=16, ignored_share=0.3, dtype=dtype, device=plan.device)
    dirty = testing.detection_inputs(seed=8, classes=16, ignored_share=0.3, dtype=dtype, device=plan.device)
    at = clean.matched_idxs == ik.IGNORE
    dirty.cls_logits[at], dirty.bbox_deltas[at] = math.nan, math.nan
    results = []
    for inputs in (clean.in_layout(layout), dirty.in_layout(layout)):
        loss, grads = testing.loss_and_gradient(ik.iou_balanced_detection_loss, inputs, backend=plan.backend)
        half = len(grads) // 2
        logits = grads[0] if half == 1 else testing.from_levels(grads[:half], clean.per_location)
        deltas = grads[1] if half == 1 else testing.from_levels(grads[half:], clean.per_location)
        assert not logits[at].any() and not deltas[at].any(), "an ignored anchor has a gradient"
        results.append([*(t.detach() for t in loss), logits, deltas])
    same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert same, "NaN at ignored anchors changes the result"


def empty(plan: Plan, what: str, layout: str) -> None:
    """Nothing to count: losses of exactly 0, gradients finite and of their input's shape."""
    draw: dict[str, Any] = {"seed": 1, "images": 2, "classes": 4, "device": plan.device}
    if what == "no images":
        draw["images"] = 0
    elif what == "no positives":
        draw["positive_share"] = 0.0
    elif what == "all ignored":
        draw |= {"positive_share": 0.0, "ignored_share": 1.0}
    inputs = testing.detection_inputs(**draw)
    if what == "no boxes":
        inputs.matched_idxs = inputs.matched_idxs.clamp(max=-1)
        inputs.gt_boxes = [b[:0] for b in inputs.gt_boxes]
        inputs.gt_labels = [t[:0] for t in inputs.gt_labels]
    inputs = inputs.in_layout(layout)
    loss, grads = testing.loss_and_gradient(ik.iou_balanced_detection_loss, inputs, backend=plan.backend)
    assert loss.localization.item() == 0.0 and loss.num_positives.item() == 0 and loss.mean_iou.item() == 0.0
    assert loss.classification.isfinite() and all(bool(g.isfinite().all()) for g in grads)
    if what in ("no images", "all ignored"):
        assert loss.classification.item() == 0.0 and not any(bool(g.any()) for g in grads)


def empty_rows(plan: Plan) -> None:
    x = torch.empty(0, 7, device=plan.device, requires_grad=True)
    labels, iou = torch.empty(0, dtype=torch.int64, device=plan.device), torch.empty(0, device=plan.device)
    for function in (ik.iou_balanced_sigmoid_focal_loss, ik.iou_balanced_cross_entropy):
        loss = function(x, labels, iou, backend=plan.backend)
        assert loss.item() == 0.0 and torch.autograd.grad(loss, x)[0].shape == x.shape
    deltas = torch.empty(0, 4, device=plan.device, requires_grad=True)
    loss = ik.iou_balanced_smooth_l1_loss(deltas, deltas.detach(), backend=plan.backend)
    assert loss.item() == 0.0 and torch.autograd.grad(loss, deltas)[0].shape == deltas.shape


def degenerate(plan: Plan, layout: str, which: str) -> None:
    """Anchors or boxes without area: positives of IoU 0 without a localisation loss, as the oracle has them."""
    inputs = testing.detection_inputs(seed=2, classes=5, positive_share=0.4, device=plan.device)
    if which == "anchors":
        inputs.anchors[::3, 2] = inputs.anchors[::3, 0]
    else:
        for boxes in inputs.gt_boxes:
            boxes[0, 3] = boxes[0, 1] - 1.0
    out, grads = testing.loss_and_gradient(
        ik.iou_balanced_detection_loss, inputs.in_layout(layout), backend=plan.backend
    )
    want, exact = testing.loss_and_gradient(ik.iou_balanced_detection_loss, inputs.double(), backend="reference")
    for name in ("classification", "localization"):
        testing.assert_close_budget(getattr(out, name), getattr(want, name), torch.float32, "loss", what=name)
    half = len(grads) // 2
    for part, expected in zip((grads[:half], grads[half:]), exact, strict=True):
        got = part[0] if half == 1 else testing.from_levels(part, inputs.per_location)
        testing.assert_close_budget(got, expected, torch.float32)


# ---------------------------------------------------------------------------------------------- unchecked values


@contextmanager
def unchecked() -> Iterator[None]:
    """IOUBAL_CHECK=0: a GPU's values are never read on the host, so the kernels must live with any of them."""
    before = os.environ.get("IOUBAL_CHECK")
    os.environ["IOUBAL_CHECK"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["IOUBAL_CHECK"]
        else:
            os.environ["IOUBAL_CHECK"] = before


BAD = (7, 99, -3, 2**31 - 1, -(2**31), 2**40)


def bad_labels(plan: Plan, bad: int) -> None:
    """A label that is no class makes the loss NaN and reads nothing out of bounds."""
    inputs = testing.classification_inputs(rows=40, classes=7, device=plan.device)
    labels = inputs.labels.clone()
    labels[13] = bad
    focal, softmax = ik.iou_balanced_sigmoid_focal_loss, ik.iou_balanced_cross_entropy
    with unchecked():
        assert focal(inputs.logits, labels, inputs.iou, backend=plan.backend).isnan(), "the focal loss is not NaN"
        each = focal(inputs.logits, labels, inputs.iou, reduction="none", backend=plan.backend)
        assert bool(each[13].isnan().all()) and int(each.isnan().sum()) == 7, "NaN is not at that row alone"
        if bad >= 7:
            loss = softmax(inputs.logits, labels.clamp(min=0), inputs.iou, backend=plan.backend)
            assert loss.isnan(), "the cross entropy is not NaN"


def bad_matches(plan: Plan, bad: int, layout: str) -> None:
    inputs = testing.detection_inputs(device=plan.device).padded()
    inputs.matched_idxs[1, 3] = bad
    with unchecked():
        inputs = inputs.in_layout(layout).requiring_grad()
        out = ik.iou_balanced_detection_loss(*inputs.arguments(), backend=plan.backend)
        (out.classification + out.localization).backward()
        assert out.classification.isnan() and out.localization.isnan(), "a loss is not NaN"


def bad_gt_labels(plan: Plan, layout: str) -> None:
    inputs = testing.detection_inputs(positive_share=0.5, device=plan.device).padded()
    inputs.gt_labels[:, 0] = 10**6
    with unchecked():
        out = ik.iou_balanced_detection_loss(*inputs.in_layout(layout).arguments(), backend=plan.backend)
        assert out.classification.isnan(), "the loss is not NaN"


def still_right(plan: Plan) -> None:
    """After all the bad values: the same process computes what it should."""
    check(detection_case("afterwards", {"seed": 3}, "nchw"), plan.backend, plan.device)


def edge_cases(tally: Tally) -> None:
    plan = tally.plan
    cases: list[Check] = []
    numbers = ((None, 0.0), (0.25, 0.5), (0.25, 1.0), (0.25, 2.0), (0.6, 10.0), (0.25, 1.5))
    for dtype, (alpha, gamma), positive in product(DTYPES, numbers, (False, True)):
        case = extreme(dtype, gamma, alpha, positive)
        cases.append((case.name, lambda case=case: check(case, plan.backend, plan.device)))
    for layout, dtype in product(testing.LAYOUTS, DTYPES):
        name = f"NaN at ignored anchors, {layout}, {short(dtype)}"
        cases.append((name, lambda la=layout, d=dtype: ignored_rows(plan, la, d)))
    for what, layout in product(("no images", "no positives", "all ignored", "no boxes"), testing.LAYOUTS):
        cases.append((f"{what}, {layout}", lambda w=what, la=layout: empty(plan, w, la)))
    cases.append(("no rows", lambda: empty_rows(plan)))
    for layout, which in product(testing.LAYOUTS, ("anchors", "boxes")):
        cases.append((f"{which} without area, {layout}", lambda la=layout, w=which: degenerate(plan, la, w)))
    for bad in BAD:
        cases.append((f"unchecked label {bad}", lambda b=bad: bad_labels(plan, b)))
        for layout in testing.LAYOUTS:
            cases.append((f"unchecked match {bad}, {layout}", lambda b=bad, la=layout: bad_matches(plan, b, la)))
    for layout in testing.LAYOUTS:
        cases.append((f"unchecked gt label, {layout}", lambda la=layout: bad_gt_labels(plan, la)))
    cases.append(("right results afterwards", lambda: still_right(plan)))
    tally.each(cases)
