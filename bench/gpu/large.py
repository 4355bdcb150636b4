"""GPU check: more than 2^31 and 2^32 elements. The oracle works chunk by chunk, so the case is one that adds up:
IoUs whose weights cancel (one value for all, or exponents 0) and a given divisor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import ioubal_kernels as ik
from ioubal_kernels import testing

from .. import inputs as bench_inputs
from .sections import NotRun, Plan, Tally

CHUNK = 1 << 27  # elements of one float64 step of the oracle, which keeps about 15 tensors of them
SAMPLED = 4096  # rows whose gradient is compared at each place


def need(plan: Plan, gib: float) -> None:
    """NotRun where the GPU's free memory is smaller."""
    if plan.device != "cuda":
        return
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        raise NotRun(f"needs {gib:.0f} GiB, {free:.0f} GiB are free")


def places(rows: int, columns: int) -> Iterator[slice]:
    """Where to look at gradients: both ends, and where the element's number passes 2^31 and 2^32."""
    for at in (0, rows - SAMPLED, *((1 << bits) // columns - SAMPLED // 2 for bits in (31, 32))):
        start = max(at, 0)
        if start < rows:
            yield slice(start, min(start + SAMPLED, rows))


def flat_loss(tally: Tally, name: str, rows: int, columns: int) -> None:
    """A flat classification loss of bfloat16 logits: the sum against chunks, the gradient at chosen places."""
    plan, softmax = tally.plan, name == "cross entropy"
    need(plan, rows * columns * 4 / 2**30 + 24 * CHUNK * 8 / 2**30)
    function: Callable[..., Tensor] = ik.iou_balanced_cross_entropy if softmax else ik.iou_balanced_sigmoid_focal_loss
    generator = torch.Generator(plan.device).manual_seed(1)
    logits = torch.empty(rows, columns, dtype=torch.bfloat16, device=plan.device)
    for part in logits.split(max((1 << 28) // columns, 1)):
        part.normal_(-3.0, 1.5, generator=generator)
    kind = torch.rand(rows, device=plan.device, generator=generator)
    classes = torch.randint(0, columns, (rows,), device=plan.device, generator=generator, dtype=torch.int32)
    labels = torch.where(kind < 0.01, classes, 0 if softmax else ik.BACKGROUND)
    labels = torch.where(kind > 0.99, -2, labels).to(torch.int32)
    iou = torch.full((rows,), 0.5, device=plan.device)
    # One IoU for all positives: iou^eta cancels against the normaliser, so every chunk's weights are 1.
    logits.requires_grad_()
    loss = function(logits, labels, iou, reduction="sum", backend=plan.backend)
    (grad,) = torch.autograd.grad(loss, logits)
    want = torch.zeros((), dtype=torch.float64, device=plan.device)
    step = max(CHUNK // columns, 1)
    with torch.no_grad():
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            exact = logits[part].double()
            want += function(exact, labels[part], iou[part], reduction="sum", backend="reference")
    testing.assert_close_budget(loss, want, torch.bfloat16, "loss", what="the sum")
    for part in places(rows, columns):
        exact = logits[part].detach().double().requires_grad_()
        # eta 0: the same weights, also for a chunk without a positive.
        small = function(exact, labels[part], iou[part], eta=0.0, reduction="sum", backend="reference")
        floor: Any = testing.FLOOR
        if softmax:  # softmax - 1 cancels at the target
            floor = floor + torch.nn.functional.one_hot(labels[part].long().clamp(min=0), columns).double()
        (expected,) = torch.autograd.grad(small, exact)
        testing.assert_close_budget(grad[part], expected, torch.bfloat16, "gradient", floor, f"rows {part}")


def detection(tally: Tally, layout: str, images: int) -> None:
    """The fused loss: exponents 0 and a given divisor, so that images add up."""
    plan = tally.plan
    levels = bench_inputs.SMALL_LEVELS if plan.small else testing.RETINANET_LEVELS
    elements = images * bench_inputs.anchors_of(levels) * bench_inputs.CLASSES
    need(plan, elements * 8 / 2**30 + 24 * CHUNK * 8 / 2**30)
    few = bench_inputs.targets(3, levels, min(images, 8), plan.device, torch.int32).padded()
    # The same 8 images of targets again and again; logits and deltas are their own in each.
    again = lambda t: t[torch.arange(images, device=plan.device) % t.shape[0]]  # noqa: E731
    heads = replace(
        few, **{name: again(getattr(few, name)) for name in ("matched_idxs", "gt_boxes", "gt_labels", "bbox_deltas")}
    )
    rows = heads.matched_idxs.shape[1]
    generator = torch.Generator(plan.device).manual_seed(2)
    logits = torch.empty(images, rows, bench_inputs.CLASSES, dtype=torch.bfloat16, device=plan.device)
    for part in logits.split(8):
        part.normal_(-4.6, 1.5, generator=generator)
    heads = replace(heads, cls_logits=logits, bbox_deltas=heads.bbox_deltas.to(torch.bfloat16))
    tested = heads.in_layout(layout)
    del heads, logits, part  # else the flat logits stay beside the maps
    for t in tested.heads():
        t.requires_grad_()
    options = {"eta": 0.0, "lambda_": 0.0, "avg_factor": 1.0}
    out = ik.iou_balanced_detection_loss(*tested.arguments(), **options, backend=plan.backend)
    grads = torch.autograd.grad(out.classification + out.localization, tested.heads())
    want = torch.zeros(2, dtype=torch.float64, device=plan.device)
    step = max(CHUNK // (rows * bench_inputs.CLASSES), 1)
    looked_at = {0, images - 1, *((1 << bits) // (rows * bench_inputs.CLASSES) for bits in (31, 32))}
    with torch.no_grad():
        for start in range(0, images, step):
            part = of_images(tested, slice(start, start + step)).double()
            exact = ik.iou_balanced_detection_loss(*part.arguments(), **options, backend="reference")
            want += torch.stack([exact.classification, exact.localization])
    testing.assert_close_budget(out.classification, want[0], torch.bfloat16, "loss", what="classification")
    testing.assert_close_budget(out.localization, want[1], torch.bfloat16, "loss", what="localization")
    for image in sorted(i for i in looked_at if i < images):
        one = of_images(tested, slice(image, image + 1)).double().requiring_grad()
        exact = ik.iou_balanced_detection_loss(*one.arguments(), **options, backend="reference")
        expected = torch.autograd.grad(exact.classification + exact.localization, one.heads())
        for got, exact_grad in zip(grads, expected, strict=True):
            what = f"image {image}"
            testing.assert_close_budget(got[image : image + 1], exact_grad, torch.bfloat16, "gradient", what=what)


def of_images(heads: testing.DetectionInputs, part: slice) -> testing.DetectionInputs:
    """Some images of padded inputs, detached."""
    cut = lambda t: [x.detach()[part] for x in t] if isinstance(t, list) else t.detach()[part]  # noqa: E731
    names = ("cls_logits", "bbox_deltas", "matched_idxs", "gt_boxes", "gt_labels")
    return replace(heads, **{name: cut(getattr(heads, name)) for name in names})


def large(tally: Tally) -> None:
    """Element counts beyond 32 bits. On a CPU the same code on few elements."""
    plan = tally.plan
    rows = plan.few(1 << 32, 1 << 16) // 80 + 1
    images = plan.few((1 << 32) // (bench_inputs.ANCHORS * bench_inputs.CLASSES) + 1, 3)
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("focal, > 2^31", lambda: flat_loss(tally, "focal", rows // 2 + 1, 80)),
        ("focal, > 2^32", lambda: flat_loss(tally, "focal", rows, 80)),
        ("cross entropy, > 2^31", lambda: flat_loss(tally, "cross entropy", rows // 2 + 1, 81)),
        ("detection flat, > 2^32", lambda: detection(tally, "flat", images)),
        ("detection nchw, > 2^32", lambda: detection(tally, "nchw", images)),
        # Its largest map alone has more than 2^32 elements.
        ("detection channels_last, a level > 2^32", lambda: detection(tally, "channels_last", images * 4 // 3 + 2)),
    ]
    tally.facts["elements"] = {"flat": rows * 80, "images": images, "dry_run": plan.small}
    tally.planned += len(cases)
    skipped = []
    for name, call in cases:
        if plan.left() < 5:
            break
        if plan.device == "cuda":
            torch.cuda.empty_cache()
        try:
            tally.check(name, call)
        except NotRun as reason:
            tally.done -= 1
            skipped.append(f"{name}: {reason}")
    if skipped:
        raise NotRun("; ".join(skipped))
