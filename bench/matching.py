"""Anchor matching on its own, and the whole loss stage: matching, losses, gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ioubal_kernels as ik
from ioubal_kernels import testing

from . import inputs as bench_inputs
from .clocks import sets_beyond_cache
from .peers import PLAIN_HEADS, WHOLE, Peer, make_eager, make_heads, torchvision_matches
from .retinanet import ORACLE_ENTRIES, Oracle, fused
from .work import BOTH, INFERENCE, Bench, Case, Contender, Problem, Work, short

MATCHES = "the index of each anchor's box, -1 background, -2 ignored"


def ours(anchors: Tensor, gt_boxes: list[Tensor], backend: str) -> Tensor:
    return ik.match_anchors(anchors, gt_boxes, **ik.MATCHING_RULES["retinanet"], dtype=torch.int32, backend=backend)


def match(bench: Bench, images: int, boxes: int) -> Problem:
    """So many boxes an image; the floor is a copy of a float an anchor."""
    levels = bench_inputs.SMALL_LEVELS if bench.small else testing.RETINANET_LEVELS
    anchors = bench_inputs.grid_anchors(levels, bench.device)
    drawn = [bench_inputs.draw_boxes(seed, images, boxes, bench.device) for seed in range(4)]
    theirs = lambda *given: torch.stack(torchvision_matches(*given))  # noqa: E731
    want = theirs(anchors, drawn[0])

    def check(_: Work, results: list[Tensor]) -> None:
        wrong = int((results[0].long() != want).sum())
        assert wrong == 0, f"{wrong} of {want.numel()} anchors are matched otherwise"

    def contender(path: str, call: Callable[[Tensor, list[Tensor]], Tensor], facts: dict[str, Any]) -> Contender:
        make = lambda i: Work(lambda: [call(anchors, drawn[max(i, 0)])])  # noqa: E731
        graph = path == "fused"  # torchvision's waits for the host
        return Contender(path, MATCHES, make, check, "every anchor", (INFERENCE,), facts, graph, "torchvision")

    contenders = [contender("fused", partial(ours, backend=name), {"backend": name}) for name in bench.backends]
    contenders.append(contender("reference backend", partial(ours, backend="reference"), {"backend": "reference"}))
    contenders.append(contender("torchvision box_iou + Matcher", theirs, {}))
    rows = images * anchors.shape[0]
    facts = {"case": "matching", "batch": images, "anchors": anchors.shape[0], "boxes": boxes, "dtype": "float32"}
    return Problem(facts, contenders, rows, torch.float32, len(drawn), {INFERENCE: rows * 4 + 16 * rows}, "anchor")


def stage(bench: Bench, images: int, boxes: int, dtype: torch.dtype) -> Problem:
    """Raw NCHW heads and boxes in; losses and the heads' gradients out."""
    levels = bench_inputs.SMALL_LEVELS if bench.small else testing.RETINANET_LEVELS
    anchors = bench_inputs.grid_anchors(levels, bench.device)
    elements = images * anchors.shape[0] * bench_inputs.CLASSES
    item = torch.finfo(dtype).bits // 8
    sets = sets_beyond_cache(2 * elements * item, bench.device)

    def draw(seed: int, count: int = images) -> tuple[testing.DetectionInputs, testing.DetectionInputs]:
        gt_boxes = bench_inputs.draw_boxes(seed, count, boxes, bench.device)
        found = bench_inputs.targets(seed, levels, count, bench.device, torch.int32)
        generator = torch.Generator().manual_seed(seed)
        labels = [torch.randint(0, bench_inputs.CLASSES, (boxes,), generator=generator) for _ in range(count)]
        matched = torch.stack(torchvision_matches(anchors, gt_boxes)).to(torch.int32)
        labels = [t.to(bench.device) for t in labels]
        generator = torch.Generator().manual_seed(seed + 100)
        deltas = (torch.randn(found.bbox_deltas.shape, generator=generator) * 0.2).to(bench.device)
        for image, (boxes_here, matches) in enumerate(zip(gt_boxes, matched.long(), strict=True)):
            at = (matches >= 0).nonzero()[:, 0]  # predictions lie around their boxes
            deltas[image, at] += ik.encode_boxes(boxes_here[matches[at]], anchors[at])
        found = replace(
            found, bbox_deltas=deltas, anchors=anchors, matched_idxs=matched, gt_boxes=gt_boxes, gt_labels=labels
        )
        flat = bench_inputs.with_logits(found, dtype, "flat", seed, dtype)
        return flat, flat.in_layout("nchw").requiring_grad()

    tested_images = images if elements <= ORACLE_ENTRIES else 1
    flat, tested = draw(0, tested_images)
    made = [draw(seed)[1] for seed in range(sets)] if tested_images < images else [tested]
    made += [draw(seed)[1] for seed in range(len(made), sets)]
    oracle = Oracle(flat)

    def heads_of(number: int) -> testing.DetectionInputs:
        return tested if number < 0 else made[number]

    def fused_stage(heads: testing.DetectionInputs, backend: str) -> Work:
        module = ik.RetinaNetLoss(**ik.MATCHING_RULES["retinanet"], backend=backend)
        given = (heads.cls_logits, heads.bbox_deltas, heads.anchors, heads.gt_boxes, heads.gt_labels)
        return Work(lambda: module(*given)[:2], heads.heads())

    def after_torchvision(heads: testing.DetectionInputs, make: Callable[[testing.DetectionInputs], Work]) -> Work:
        def losses() -> Any:
            matched = torch.stack(torchvision_matches(heads.anchors, heads.gt_boxes))
            return make(replace(heads, matched_idxs=matched)).losses()

        return Work(losses, heads.heads())

    parity = "every element" if tested_images == images else "every element of one image"
    contenders = [
        Contender(
            "fused stage",
            WHOLE,
            lambda i, backend=backend: fused_stage(heads_of(i), backend),
            lambda _, results: oracle.check(heads_of(-1), results, "fused stage"),
            parity,
            (BOTH,),
            {"backend": backend},
        )
        for backend in bench.backends
    ]
    contenders.append(
        Contender(
            "torchvision's matcher, fused loss",
            WHOLE,
            lambda i: after_torchvision(heads_of(i), partial(fused, backend=bench.backends[0])),
            lambda _, results: oracle.check(heads_of(-1), results, "fused loss"),
            parity,
            facts={"backend": bench.backends[0]},
            graph=False,
            package="torchvision",
        )
    )
    for name, computes, make in (
        ("torchvision's matcher and heads", PLAIN_HEADS, make_heads),
        ("torchvision's matcher, eager PyTorch (README)", WHOLE, make_eager),
    ):
        peer = Peer(name, computes, make)
        contenders.append(
            Contender(
                name,
                computes,
                lambda i, make=make: after_torchvision(heads_of(i), make),
                lambda _, results, peer=peer: oracle.check_peer(peer, heads_of(-1), results, 2),
                f"{parity.removeprefix('every element').strip() or 'every entry'}, in norm",
                graph=False,
                package="torchvision",
            )
        )
    facts = {
        "case": "loss stage",
        "batch": images,
        "layout": "nchw",
        "anchors": anchors.shape[0],
        "boxes": boxes,
        "classes": bench_inputs.CLASSES,
        "dtype": short(dtype),
    }
    rows = images * anchors.shape[0]
    moved = {BOTH: 2 * elements * item + rows * 4 * item + 8 * rows}
    return Problem(facts, contenders, elements, dtype, sets, moved)


def cases(batch: int) -> list[Case]:
    """Matching of 10, 20 and 50 boxes, one image and a batch; the stage."""
    found = []
    for images, boxes in dict.fromkeys(((batch, 10), (batch, 20), (batch, 50), (1, 10), (1, 50))):
        what = f"anchor matching, batch {images}, {boxes} boxes an image"
        build = partial(match, images=images, boxes=boxes)
        found.append(Case(f"matching/b{images}/g{boxes}", "matching", what, build, 5.0 + boxes / 5))
    for dtype in (torch.float32, torch.bfloat16):
        what = f"matching, losses and gradients, batch {batch}, 20 boxes an image, {short(dtype)}"
        build = partial(stage, images=batch, boxes=20, dtype=dtype)
        found.append(Case(f"stage/b{batch}/nchw/{short(dtype)}", "stage", what, build, 30.0))
    return found
