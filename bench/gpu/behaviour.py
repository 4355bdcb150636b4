"""GPU check: what must hold of a run besides its values: repeatable, capturable, asynchronous, few launches, lean."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

import ioubal_kernels as ik
from ioubal_kernels import testing, testing_matching
from ioubal_kernels.functional_matching import FOVEA_SCALE_RANGES, FOVEA_STRIDES

from .. import inputs as bench_inputs
from . import matching_cases
from .cases import Case, Figure, check, short
from .sections import NotRun, Plan, Tally

# Most launches forward and backward. Triton has one of its own for positives and deltas, and one more for odd maps.
LAUNCHES = {"cuda": (4, 1), "triton": (5, 3)}
MEMORY_EXTRA, MEMORY_IN_PLACE = 1.1, 0.05  # x logits
MATCHING_LAUNCHES = 3  # at most, for a batch
OURS = "ioubal"  # in the name of every kernel of the library; Triton's have plain names, torch's are C++

Step = Callable[[], list[Tensor]]


def losses(plan: Plan, dtype: torch.dtype = torch.float32, seed: int = 0, large: bool = True) -> dict[str, Step]:
    """Forward and backward of every loss, several blocks each; a step returns losses and gradients."""
    levels = ((40, 50), (9, 7)) if large else ((5, 4), (2, 3))
    rows = 5000 if large else 100
    steps: dict[str, Step] = {}
    for layout in testing.LAYOUTS:
        heads = testing.detection_inputs(
            seed=seed,
            images=2,
            classes=80,
            per_location=9,
            levels=levels,
            positive_share=0.01,
            ignored_share=0.01,
            layout=layout,
            dtype=dtype,
            device=plan.device,
        ).requiring_grad()

        def detection(heads: testing.DetectionInputs = heads) -> list[Tensor]:
            out = ik.iou_balanced_detection_loss(*heads.arguments(), normalize_loc=True, backend=plan.backend)
            grads = torch.autograd.grad(out.classification + out.localization, heads.heads())
            return [*(t.detach() for t in out), *grads]

        steps[f"detection {layout}"] = detection
    draw = testing.classification_inputs(
        seed=seed, rows=rows, classes=33, softmax=True, dtype=dtype, device=plan.device
    )
    pred, target = testing.delta_inputs(seed=seed, rows=rows, dtype=dtype, device=plan.device)
    flat = {
        "focal": (ik.iou_balanced_sigmoid_focal_loss, draw.logits, (draw.labels, draw.iou)),
        "cross entropy": (ik.iou_balanced_cross_entropy, draw.logits, (draw.labels, draw.iou)),
        "smooth L1": (ik.iou_balanced_smooth_l1_loss, pred, (target,)),
    }
    for name, (function, x, rest) in flat.items():
        leaf = x.clone().requires_grad_()

        def step(function: Any = function, x: Tensor = leaf, rest: Any = rest) -> list[Tensor]:
            loss = function(x, *rest, backend=plan.backend)
            return [loss.detach(), *torch.autograd.grad(loss, x)]

        steps[name] = step
    return steps | matching(plan, seed, large)


def matching(plan: Plan, seed: int = 0, large: bool = True) -> dict[str, Step]:
    """Matching of anchors, by every rule, and of cells: several blocks, boxes as a list and padded."""
    levels = matching_cases.FOVEA_LEVELS if large else matching_cases.FOVEA_LEVELS[3:]
    anchors = matching_cases.retinanet_anchors(plan.device, levels)
    boxes = matching_cases.picture_boxes(seed, 6, 20, plan.device)
    padded = testing_matching.padded_boxes(boxes)
    cells = {
        "level_shapes": levels,
        "strides": FOVEA_STRIDES[: len(levels)],
        "scale_ranges": FOVEA_SCALE_RANGES[: len(levels)],
    }
    steps: dict[str, Step] = {}
    for form, given in (("listed", boxes), ("padded", padded)):
        for name, rule in ik.MATCHING_RULES.items():
            steps[f"matching {name}, {form}"] = lambda g=given, r=rule: [
                ik.match_anchors(anchors, g, **r, backend=plan.backend)
            ]
        steps[f"fovea, {form}"] = lambda g=given: [ik.match_fovea(g, **cells, backend=plan.backend)]
    return steps


def must_equal(got: list[Tensor], want: list[Tensor], what: str) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), f"{what}: result {i} differs in {int((a != b).sum())} of {a.numel()} elements"


def repeat(step: Step, count: int, name: str) -> None:
    want = step()
    for i in range(count):
        must_equal(step(), want, f"{name}, repeat {i}")


def repeats(tally: Tally) -> None:
    """Bitwise the same, again and again: sums have a fixed order."""
    plan = tally.plan
    count = plan.few(100, 3)
    dtypes = (torch.float32, torch.bfloat16)
    cases = [(f"{n}, {short(d)}", s) for d in dtypes for n, s in losses(plan, d, large=not plan.small).items()]
    tally.facts["repeats"] = count
    tally.each([(name, lambda s=step, n=name: repeat(s, count, n)) for name, step in cases])


# ---------------------------------------------------------------------------------------------- graphs and streams


def on_side_stream(step: Step, times: int = 3) -> torch.cuda.Stream:
    """A stream on which a step has run: what a capture wants as its warm-up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    return stream


def graph_replays(plan: Plan, layout: str, dtype: torch.dtype, count: int) -> None:
    """One captured step, replayed on new data in the same tensors, equals the eager step; grad_output changes, too."""

    def draw(seed: int) -> testing.DetectionInputs:
        shape = {"images": 3, "classes": 20, "per_location": 3, "levels": ((30, 20), (5, 7)), "max_boxes": 6}
        inputs = testing.detection_inputs(seed=seed, **shape, dtype=dtype, device=plan.device)
        # Padded to one size, so that every draw fits the same tensors.
        padded = inputs.padded(extra=7 - max(b.shape[0] for b in inputs.gt_boxes))
        return padded.in_layout(layout)

    static = draw(0).requiring_grad()
    factor = torch.ones((), device=plan.device)

    def step(inputs: testing.DetectionInputs = static) -> list[Tensor]:
        out = ik.iou_balanced_detection_loss(*inputs.arguments(), backend=plan.backend)
        total = out.classification + out.localization
        return [*(t.detach() for t in out), *torch.autograd.grad(total, inputs.heads(), factor)]

    stream = on_side_stream(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = step()
    for i in range(count):
        fresh = draw(i + 1)
        for old, new in zip(tensors_of(static), tensors_of(fresh), strict=True):
            old.detach().copy_(new)
        factor.fill_((1.0, 2.0, 1.0, 0.5)[i % 4])
        graph.replay()
        must_equal([t.clone() for t in results], step(fresh.requiring_grad()), f"replay {i}")


def tensors_of(inputs: testing.DetectionInputs) -> list[Tensor]:
    return [*inputs.heads(), inputs.anchors, inputs.matched_idxs, inputs.gt_boxes, inputs.gt_labels]


def flat_graph(step: Step) -> None:
    stream = on_side_stream(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = step()
    for i in range(3):
        for t in results:
            t.zero_()
        graph.replay()
        must_equal(results, step(), f"replay {i}")


def graphs(tally: Tally) -> None:
    plan = tally.plan
    plan.only_cuda()
    count = plan.few(100, 3)
    tally.facts["replays"] = count
    cases = [
        (f"{la}, {short(d)}", lambda la=la, d=d: graph_replays(plan, la, d, count))
        for la, d in product(testing.LAYOUTS, (torch.float32, torch.bfloat16))
    ]
    tally.each(cases + [(name, lambda s=step: flat_graph(s)) for name, step in losses(plan).items()])


def streams(tally: Tally) -> None:
    """Work on two streams at once, from one thread and from two, equals the same work alone."""
    plan = tally.plan
    plan.only_cuda()
    rounds = 20
    works = [losses(plan, seed=seed) for seed in (1, 2)]
    want = [{name: step() for name, step in work.items()} for work in works]
    torch.cuda.synchronize()

    def one_thread(name: str) -> None:
        sides = [torch.cuda.Stream(), torch.cuda.Stream()]
        results: list[list[list[Tensor]]] = [[], []]
        for _ in range(rounds):
            for i, side in enumerate(sides):
                with torch.cuda.stream(side):
                    results[i].append(works[i][name]())
        torch.cuda.synchronize()
        for i, found in enumerate(results):
            for r, result in enumerate(found):
                must_equal(result, want[i][name], f"{name}, stream {i}, round {r}")

    def two_threads(name: str) -> None:
        results: dict[int, list[list[Tensor]]] = {}

        def work(i: int) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                results[i] = [works[i][name]() for _ in range(rounds)]

        threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        torch.cuda.synchronize()
        assert len(results) == 2, "a thread ended early"
        for i, found in results.items():
            for result in found:
                must_equal(result, want[i][name], f"{name}, thread {i}")

    tally.each([(f"{name}, two streams", lambda n=name: one_thread(n)) for name in want[0]])
    tally.each([(f"{name}, two threads", lambda n=name: two_threads(n)) for name in want[0]])


# ---------------------------------------------------------------------------------------------- host side


@contextmanager
def synchronising_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def no_sync(tally: Tally) -> None:
    """Forward and backward never wait for the GPU."""
    plan = tally.plan
    plan.only_cuda()

    def quiet(step: Step) -> None:
        with synchronising_is_an_error():
            step()

    def many_images() -> None:
        inputs = testing.detection_inputs(images=65, device=plan.device).requiring_grad()
        with synchronising_is_an_error():
            out = ik.iou_balanced_detection_loss(*inputs.arguments(), backend=plan.backend)
            (out.classification + out.localization).backward(torch.full((), 3.0, device=plan.device))

    def the_mode_finds_one() -> None:
        with synchronising_is_an_error():
            try:
                torch.ones(1, device=plan.device).item()
            except RuntimeError:
                return
        raise AssertionError("the debug mode did not notice .item()")

    steps = losses(plan)
    tally.each([("the mode itself", the_mode_finds_one)])
    tally.each([(name, lambda s=step: quiet(s)) for name, step in steps.items()])
    tally.each([("65 images, listed boxes, another grad_output", many_images)])


def kernels_of(call: Callable[[], Any]) -> list[str]:
    """Names of the GPU kernels that a call launched."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in names if not name.startswith(("Memcpy", "Memset"))]


def launches(tally: Tally) -> None:
    """Launches of our library in one forward and one backward of every loss."""
    plan = tally.plan
    plan.only_cuda()
    if not kernels_of(lambda: torch.ones(8, device=plan.device).add_(1)):
        raise NotRun("the profiler sees no kernels here (CUPTI not permitted?)")
    counts: dict[str, Any] = {}

    def count(name: str, forward: Callable[[], Any]) -> None:
        out: list[Any] = []
        forward()
        first = kernels_of(lambda: out.append(forward()))
        second = kernels_of(lambda: torch.autograd.grad(*out[0]))
        triton = plan.backend == "triton"
        ours = [sum("::" not in k if triton else OURS in k for k in kernels) for kernels in (first, second)]
        most = LAUNCHES[plan.backend]
        counts[name] = {"forward": ours[0], "backward": ours[1], "all": [len(first), len(second)]}
        assert 1 <= ours[0] <= most[0], f"{ours[0]} launches forward: {first}"
        assert 1 <= ours[1] <= most[1], f"{ours[1]} launches backward: {second}"

    def count_matching(name: str, step: Step) -> None:
        step()
        kernels = kernels_of(step)
        ours = sum("::" not in k if plan.backend == "triton" else OURS in k for k in kernels)
        counts[name] = {"forward": ours, "all": [len(kernels)]}
        assert 1 <= ours <= MATCHING_LAUNCHES, f"{ours} launches: {kernels}"

    cases: list[tuple[str, Callable[[], Any]]] = []
    for layout in testing.LAYOUTS:
        heads = testing.detection_inputs(classes=80, layout=layout, device=plan.device).requiring_grad()

        def forward(heads: testing.DetectionInputs = heads) -> Any:
            out = ik.iou_balanced_detection_loss(*heads.arguments(), backend=plan.backend)
            return out.classification + out.localization, heads.heads()

        cases.append((f"detection {layout}", lambda la=layout, f=forward: count(f"detection {la}", f)))
    draw = testing.classification_inputs(rows=500, classes=80, softmax=True, device=plan.device)
    pred, target = testing.delta_inputs(device=plan.device)
    flat = {
        "focal": (ik.iou_balanced_sigmoid_focal_loss, draw.logits, (draw.labels, draw.iou)),
        "cross entropy": (ik.iou_balanced_cross_entropy, draw.logits, (draw.labels, draw.iou)),
        "smooth L1": (ik.iou_balanced_smooth_l1_loss, pred, (target,)),
    }
    for name, (function, x, rest) in flat.items():
        leaf = x.clone().requires_grad_()
        call = lambda f=function, leaf=leaf, rest=rest: (f(leaf, *rest, backend=plan.backend), leaf)  # noqa: E731
        cases.append((name, lambda n=name, c=call: count(n, c)))
    tally.each(cases)
    tally.each([(name, lambda n=name, s=step: count_matching(n, s)) for name, step in matching(plan).items()])
    tally.facts["launches"] = counts


# ---------------------------------------------------------------------------------------------- torch's other parts


def compiled(tally: Tally) -> None:
    """torch.compile(fullgraph=True): the same losses, and gradients within the budget."""
    plan = tally.plan
    backend = "inductor" if plan.device == "cuda" else "aot_eager"
    tally.facts["compiler"] = backend

    def detection(layout: str) -> Case:
        def evaluate(name: str, device: str, wide: bool) -> list[Figure]:
            draw = testing.detection_inputs(seed=4, classes=20, device=device)
            heads = (draw.double() if wide else draw.in_layout(layout)).requiring_grad()
            call = lambda *arguments: ik.iou_balanced_detection_loss(*arguments, backend=name)  # noqa: E731
            if not wide:
                torch._dynamo.reset()
                call = torch.compile(call, fullgraph=True, backend=backend)
            out = call(*heads.arguments())
            grads = torch.autograd.grad(out[0] + 2 * out[1], heads.heads())
            half = len(grads) // 2
            logits, deltas = grads[0], grads[1]
            if half > 1:
                logits, deltas = (testing.from_levels(g, draw.per_location) for g in (grads[:half], grads[half:]))
            figures = [Figure(str(i), t.detach(), "loss", torch.float32) for i, t in enumerate(out)]
            more = [Figure(n, t, "gradient", torch.float32) for n, t in (("logits", logits), ("deltas", deltas))]
            return figures + more

        return Case("detection", f"compiled {layout}", evaluate)

    def focal() -> Case:
        def evaluate(name: str, device: str, wide: bool) -> list[Figure]:
            draw = testing.classification_inputs(rows=300, classes=80, device=device)
            x = (draw.logits.double() if wide else draw.logits).requires_grad_()
            call = lambda x: ik.iou_balanced_sigmoid_focal_loss(x, draw.labels, draw.iou, backend=name) * 2  # noqa: E731
            loss = call(x) if wide else torch.compile(call, fullgraph=True, backend=backend)(x)
            gradient = torch.autograd.grad(loss, x)[0]
            return [
                Figure("loss", loss.detach(), "loss", torch.float32),
                Figure("gradient", gradient, "gradient", torch.float32),
            ]

        return Case("focal", "compiled focal", evaluate)

    cases = [detection(layout) for layout in testing.LAYOUTS] + [focal()]
    tally.each([(case.name, lambda c=case: check(c, plan.backend, plan.device)) for case in cases])


def autocast(tally: Tally) -> None:
    """Under autocast the heads give 16 bits; the loss is float32, the same as outside, and within the budget."""
    plan = tally.plan

    def run(dtype: torch.dtype, layout: str) -> None:
        draw = testing.detection_inputs(seed=6, classes=20, levels=((20, 20), (7, 5)), device=plan.device)
        heads = draw.in_layout(layout).requiring_grad()
        mixed = replace(heads)
        with torch.autocast(plan.device, dtype=dtype):
            # A product with an identity is what autocast rounds to 16 bits.
            scores = [heads.cls_logits] if layout == "flat" else heads.cls_logits
            rounded = [through_matmul(t) for t in scores]
            if layout == "channels_last":
                rounded = [t.contiguous(memory_format=torch.channels_last) for t in rounded]
            assert all(t.dtype == dtype for t in rounded), "autocast did not round"
            mixed.cls_logits = rounded[0] if layout == "flat" else rounded
            out = ik.iou_balanced_detection_loss(*mixed.arguments(), backend=plan.backend)
            grads = torch.autograd.grad(out.classification, rounded, retain_graph=True)
        assert out.classification.dtype == torch.float32, f"the loss is {out.classification.dtype}"
        outside = ik.iou_balanced_detection_loss(*mixed.arguments(), backend=plan.backend)
        must_equal([out.classification, out.localization], [outside.classification, outside.localization], "outside")
        flat = rounded[0] if layout == "flat" else testing.from_levels(rounded, draw.per_location)
        wide = draw.double()
        wide.cls_logits = flat.detach().double().requires_grad_()
        want = ik.iou_balanced_detection_loss(*wide.arguments(), backend="reference")
        exact = torch.autograd.grad(want.classification, wide.cls_logits)[0]
        testing.assert_close_budget(out.classification, want.classification, torch.float32, "loss", what="loss")
        got = grads[0] if layout == "flat" else testing.from_levels(grads, draw.per_location)
        testing.assert_close_budget(got, exact, dtype, what="gradient")

    dtypes = (torch.bfloat16, torch.float16) if plan.device == "cuda" else (torch.bfloat16,)
    cases = product(dtypes, testing.LAYOUTS)
    tally.each([(f"{short(d)}, {la}", lambda d=d, la=la: run(d, la)) for d, la in cases])


def through_matmul(x: Tensor) -> Tensor:
    identity = torch.eye(x.shape[-1], device=x.device)
    return x @ identity


def memory(tally: Tally) -> None:
    """Peak memory above the inputs. In place the box gradient, 4/80 of the logits by itself, is told apart: autograd
    returns it whatever the kernels do, and the limit is on what comes on top of it."""
    plan = tally.plan
    plan.only_cuda()
    found: dict[str, Any] = {}

    def measure(dtype: torch.dtype, layout: str, inplace: bool) -> None:
        targets = bench_inputs.targets(0, testing.RETINANET_LEVELS, 2, plan.device)
        heads = bench_inputs.with_logits(targets, dtype, layout, 0, delta_dtype=dtype)
        boxes = sum(t.nbytes for t in heads.heads()) - (size := logit_bytes(heads))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = ik.iou_balanced_detection_loss(*heads.arguments(), inplace=inplace, backend=plan.backend)
        grads = torch.autograd.grad(out.classification + out.localization, heads.heads())
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
        del grads
        name = f"{short(dtype)} {layout}{' in place' if inplace else ''}"
        found[name] = {"extra_x_logits": round(extra / size, 4), "box_gradient_x_logits": round(boxes / size, 4)}
        if inplace:
            assert extra - boxes <= MEMORY_IN_PLACE * size, f"{(extra - boxes) / size:.3f} beyond the box gradient"
        else:
            assert extra <= MEMORY_EXTRA * size, f"{extra / size:.3f} of the logits"

    variants = product((torch.float32, torch.bfloat16), testing.LAYOUTS, (False, True))
    tally.each([(f"{short(d)}, {la}, {i}", lambda d=d, la=la, i=i: measure(d, la, i)) for d, la, i in variants])
    tally.facts["memory"] = found


def logit_bytes(heads: testing.DetectionInputs) -> int:
    logits = heads.cls_logits
    return logits.nbytes if isinstance(logits, Tensor) else sum(t.nbytes for t in logits)
