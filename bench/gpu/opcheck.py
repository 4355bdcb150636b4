"""GPU check: torch.library.opcheck on every op, on the very arguments the public functions hand to it.

Recording the calls keeps the samples right whatever the schemas become; the ``_sums`` ops, which only a process group
calls, take the leading arguments of ``_fill``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import ioubal_kernels as ik
from ioubal_kernels import testing, testing_matching
from ioubal_kernels.ops.library import OVERLOAD, SCHEMAS, op

from .cases import DTYPES
from .sections import Plan, Tally

SAMPLES = 10
Sample = tuple[Any, ...]


class Recorder(TorchDispatchMode):
    """Keeps the arguments of this package's ops as they were at the call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[Sample]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ioubal":
            name = func._schema.name.split("::")[1]
            self.calls.setdefault(name, []).append(tree_map_only(torch.Tensor, lambda t: t.detach().clone(), args))
        return func(*args, **(kwargs or {}))


def calls(plan: Plan, i: int) -> list[Callable[[], Any]]:
    """The i-th variation of every public function: dtypes, sizes (0 rows as well), optional arguments in turn."""
    dtype, rows = DTYPES[i % 3], (0, 1, 5, 33)[i // 3 % 4]
    flags = {"weight": i % 2 == 1, "scopes": i % 3 == 0, "none": i % 4 == 3, "tensor": i % 5 == 0}
    options: dict[str, Any] = {"backend": plan.backend, "reduction": "none" if flags["none"] else "mean"}
    if not flags["none"]:
        scale = torch.tensor(2.0, device=plan.device) if flags["tensor"] else 1.0
        options |= {"avg_factor": torch.tensor(3.0, device=plan.device) if i % 4 == 1 else None, "grad_scale": scale}
    made: list[Callable[[], Any]] = []
    for function in (ik.iou_balanced_sigmoid_focal_loss, ik.iou_balanced_cross_entropy):
        softmax = function is ik.iou_balanced_cross_entropy
        draw = testing.classification_inputs(i, rows, 3 + i, softmax=softmax, dtype=dtype, device=plan.device)
        keywords = dict(options)
        if flags["weight"]:
            keywords["weight"] = draw.weight
        if flags["scopes"]:
            keywords |= {"scope_ids": draw.scope_ids, "num_scopes": draw.num_scopes}
        leaf = draw.logits.requires_grad_()
        made.append(
            lambda f=function, x=leaf, d=draw, k=keywords: f(x, d.labels, d.iou, **k).sum().backward()  # type: ignore
        )
    pred, target = testing.delta_inputs(i, rows, dtype=dtype, device=plan.device)
    pred.requires_grad_()
    made.append(lambda: ik.iou_balanced_smooth_l1_loss(pred, target, normalize=i % 2 == 0, **options).sum().backward())
    layout, scope = testing.LAYOUTS[i % 3], ("batch", "level", "image")[i // 3 % 3]
    heads = testing.detection_inputs(i, dtype=dtype, layout=layout, device=plan.device)
    sizes = heads.level_sizes
    heads = (heads.padded() if i % 2 else heads).requiring_grad()

    def detection() -> None:
        coder = ("delta", "fovea")[i % 2]
        keywords = {"normalizer_scope": scope, "anchors_per_level": sizes, "box_coder": coder, "backend": plan.backend}
        out = ik.iou_balanced_detection_loss(*heads.arguments(), **keywords)
        (out.classification + 2 * out.localization).backward()

    made.append(detection)
    given = testing.classification_inputs(i, rows, 3 + i, dtype=dtype, device=plan.device)
    consumed = given.logits.requires_grad_()

    def in_place() -> None:
        loss = ik.iou_balanced_sigmoid_focal_loss(consumed, given.labels, given.iou, inplace=True, backend=plan.backend)
        loss.backward(torch.full_like(loss, 1.0 + i % 2))

    made.append(in_place)
    corner = torch.tensor([0.0, 0.0, 5.0, 5.0], dtype=dtype, device=plan.device)
    deltas, anchors = (pred.detach() * 0.1).requires_grad_(), corner + target
    coder = {"box_coder": ("delta", "fovea")[i % 2], "backend": plan.backend}
    made.append(lambda: ik.decode_boxes(deltas, anchors, **coder).sum().backward())
    made.append(lambda: ik.encode_boxes(anchors + 1, anchors, **coder))
    made.append(lambda: ik.paired_box_iou(anchors + 1, anchors, backend=plan.backend))
    made.append(lambda: ik.delta_iou(pred.detach(), target, **coder))
    case = testing_matching.matching_case(i, dtype, plan.device)
    boxes = testing_matching.padded_boxes(case.gt_boxes) if i % 2 else case.gt_boxes
    index = {"dtype": (torch.int64, torch.int32)[i // 2 % 2], "backend": plan.backend}
    levels = {"level_shapes": ((9, 7), (i, 2)), "strides": (8, 16), "scale_ranges": ((0, 64), (32, 1000))}
    made.append(lambda: ik.match_anchors(case.anchors, boxes, **case.options, **index))
    made.append(lambda: ik.match_fovea(boxes, **levels, **index))
    return made


def record(plan: Plan, count: int) -> dict[str, list[Sample]]:
    """`count` samples or more of every op."""
    found: dict[str, list[Sample]] = {}
    names = declared()
    i = 0
    while i < 40 and (not complete(found, count) or i < count):
        with Recorder() as recorder:
            for call in calls(plan, i):
                call()
        for name, samples in recorder.calls.items():
            if name not in names:
                continue  # what reads values on the host has no fake
            found.setdefault(name, []).extend(samples)
        for name in ("focal", "cross_entropy", "smooth_l1", "detection"):
            schema = getattr(op(f"{name}_sums", plan.backend), "_schema")  # noqa: B009
            leading = len(schema.arguments) - 2
            scopes = op(f"{name}_fill", plan.backend)._schema.arguments
            sums_at = [a.name for a in scopes].index("sums")
            for sample in recorder.calls.get(f"{name}_fill", []):
                sums = (*sample[:leading], sample[sums_at], sample[-1])
                found.setdefault(f"{name}_sums", []).append(sums)
        i += 1
    return {name: spread(samples, count) for name, samples in found.items()}


def complete(found: dict[str, list[Sample]], count: int) -> bool:
    return all(len(found.get(name, [])) >= count for name in declared())


def declared() -> list[str]:
    return [schema.split(".")[0] for schema in SCHEMAS]


def spread(samples: list[Sample], count: int) -> list[Sample]:
    """`count` of them, from the first to the last."""
    return [samples[i * len(samples) // count] for i in range(count)] if len(samples) > count else samples


def opcheck(tally: Tally) -> None:
    """Schema, fake, autograd registration and AOT dispatch of every op."""
    plan = tally.plan
    count = plan.few(SAMPLES, 1)
    samples = record(plan, count)
    missing = [name for name in declared() if len(samples.get(name, [])) < count]
    tally.facts |= {"ops": len(samples), "samples_each": count, "overload": OVERLOAD[plan.backend]}

    def enough() -> None:
        assert not missing, f"too few samples of {missing}"

    def one(name: str, sample: Sample) -> None:
        results = torch.library.opcheck(op(name, plan.backend), sample)
        assert set(results.values()) == {"SUCCESS"} and len(results) == 4, str(results)

    tally.each([("every op has samples", enough)])
    # In turn, so that a time limit leaves a share of every op.
    cases = [
        (f"{n} {i}", lambda n=n, s=s[i]: one(n, s)) for i in range(count) for n, s in samples.items() if i < len(s)
    ]
    tally.each(cases)
