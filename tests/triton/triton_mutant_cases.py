"""A few problems that between them use every part of the kernels: `triton_mutant_cases.py` reads lines `FOLDER FIRST`,
runs the kernels in FOLDER until one fails, and prints "alive" or "dead"; FIRST is the problem that comes first."""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import sys
from pathlib import Path

import guarded
import interpreter
import torch
from checks import check_detection, check_flat

import ioubal_kernels as ik
from ioubal_kernels import testing, testing_matching
from ioubal_kernels.ops import autograd, with_triton, workspace

TIMEOUT = 600  # seconds for one line


def detection() -> None:
    levels = ((3, 4), (2, 1))
    for layout, scope, options in (
        ("flat", "level", {"gamma": 1.5, "box_coder": "fovea"}),
        ("nchw", "image", {"eps": 0.3, "normalize_loc": True, "avg_factor": torch.tensor([3.0, 4.0])}),
        ("channels_last", "batch", {"eta": 2.0, "lambda_": 0.0, "beta": 0.5}),
    ):
        inputs = testing.detection_inputs(
            seed=7, images=2, classes=5, per_location=2, levels=levels, layout=layout, positive_share=0.4,
            ignored_share=0.2, box_coder=options.get("box_coder", "delta"), gt="padded" if scope == "image" else "list",
        )  # fmt: skip
        if scope == "batch":
            inputs.gt_boxes[0][0, 2] = inputs.gt_boxes[0][0, 0]
            inputs.anchors[3, 3] = inputs.anchors[3, 1]
        check_detection(inputs, normalizer_scope=scope, w_loc=3.049, anchors_per_level=inputs.level_sizes, **options)
    many = testing.detection_inputs(images=1, classes=1, per_location=1, levels=((30, 40),), layout="nchw")
    check_detection(many)
    full = testing.detection_inputs(images=1, positive_share=0.8, ignored_share=0.1)  # no room for a list
    check_detection(full, (2.0, 1.0))
    empty = testing.detection_inputs(images=1, positive_share=0.0, ignored_share=0.5)
    check_detection(empty)
    wide = testing.detection_inputs(images=1, classes=16, per_location=2, levels=((4, 8), (3, 5)), layout="nchw")
    check_detection(wide, inplace=True, grad_scale=0.5)


def dense() -> None:
    """Tiles that are full and plain, marks at their ends, vectors that reach from one plane into the next."""
    for layout, dtype, classes, groups, vectors, factors in (
        ("flat", torch.float32, 7, 3, 2, (1.0, 2.0)),
        ("nchw", torch.float32, 8, 3, 1, (1.0, 2.0)),
        ("nchw", torch.float32, 8, 1, 1, (2.0, 1.0)),
        ("flat", torch.bfloat16, 16, 3, 2, (1.0, 2.0)),
        ("nchw", torch.float16, 16, 1, 2, (1.0, 1.0)),
        ("nchw", torch.float16, 7, 3, 1, (1.0, 1.0)),
    ):
        with_triton.choose_plan(groups=groups, vectors=vectors)
        inputs = testing.detection_inputs(
            seed=5, images=1, classes=classes, per_location=1, levels=((23, 25),), positive_share=0.0,
            ignored_share=0.0, dtype=dtype,
        )  # fmt: skip
        ignored, positive = (0, 101) if layout == "nchw" else (475, 478)
        inputs.matched_idxs[0, [ignored, positive]] = torch.tensor([-2, 0])
        inputs.gt_labels[0][0] = 6
        if dtype == torch.bfloat16:
            inputs.cls_logits -= 8  # all below 0, but for these
        inputs.cls_logits[0, positive, 6] = 3.0
        inputs.cls_logits[0, 200, 4] = 2.5
        check_detection(inputs.in_layout(layout), factors)
    with_triton.choose_plan()


def focal() -> None:
    for gamma, options in (
        (2.0, {"reduction": "none"}),
        (1.0, {"scopes": True, "eta": 0.0}),
        (0.0, {"grad_scale": 2.0}),
    ):
        rows = testing.classification_inputs(seed=2, rows=40, classes=11, positive_share=0.4)
        rows.iou[::3], rows.iou[1::3] = 1.0, 0.0
        options = dict(options)
        if options.pop("scopes", False):
            options |= {"weight": rows.weight, "scope_ids": rows.scope_ids, "num_scopes": rows.num_scopes}
        check_flat(ik.iou_balanced_sigmoid_focal_loss, rows.logits, rows.labels, rows.iou, gamma=gamma, **options)
    rows = testing.classification_inputs(rows=33, classes=7)
    store = torch.zeros(rows.logits.numel() + 1)[1:].view(33, 7).copy_(rows.logits)
    check_flat(ik.iou_balanced_sigmoid_focal_loss, store, rows.labels, rows.iou, inplace=True, grad_scale=0.5)


def softmax() -> None:
    rows = testing.classification_inputs(seed=33, rows=33, classes=3, softmax=True)
    one = torch.nn.functional.one_hot(rows.labels.clamp(min=0), 3).double()
    sorted_ids = torch.arange(33) // 12
    for options in ({}, {"scope_ids": sorted_ids, "num_scopes": 4}):
        check_flat(
            ik.iou_balanced_cross_entropy, rows.logits, rows.labels, rows.iou, floor=one, reduction="sum", **options
        )


def smooth_l1() -> None:
    pred, target = testing.delta_inputs(seed=2, rows=57)
    iou = torch.linspace(0, 1, 57)
    for reduction in ("mean", "none"):
        check_flat(ik.iou_balanced_smooth_l1_loss, pred, target, iou, w_loc=3.0, beta=0.2, reduction=reduction)
    check_flat(ik.iou_balanced_smooth_l1_loss, pred, target, None, normalize=True, beta=0.0)


def boxes() -> None:
    corner = torch.rand(30, 2, generator=torch.Generator().manual_seed(4)) * 100
    anchors = torch.cat([corner, corner + 20 + corner.flip(0) / 3], 1)
    deltas = testing.delta_inputs(rows=30)[0]
    for coder in ("delta", "fovea"):
        results = []
        for leaf, others, backend in ((deltas.double(), anchors.double(), "reference"), (deltas, anchors, "triton")):
            leaf = guarded.guarded(leaf).requires_grad_()
            out = ik.decode_boxes(leaf, guarded.guarded(others), box_coder=coder, backend=backend)
            (grad,) = torch.autograd.grad((out * torch.tensor([1.0, 2, 3, 4])).sum(), leaf)
            results.append((out.detach(), grad))
        testing.assert_close_budget(results[1][0], results[0][0], torch.float32, floor=10.0)
        testing.assert_close_budget(results[1][1], results[0][1], torch.float32)
    moved = anchors + torch.tensor([3.0, -2.0, 5.0, 1.0])
    want = ik.paired_box_iou(anchors.double(), moved.double(), backend="reference")
    got = ik.paired_box_iou(guarded.guarded(anchors), guarded.guarded(moved), backend="triton")
    testing.assert_close_budget(got, want, torch.float32, floor=1.0)


def anchors_and_boxes() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(8)
    corner = torch.arange(140).unsqueeze(1) * torch.tensor([3.0, 0.5])
    anchors = torch.cat([corner, corner + 24 + torch.rand(140, 2, generator=g)], 1)
    boxes = torch.cat([anchors[100:130] + 1.5, anchors[10:14], anchors[10:12]])
    boxes[20:] += torch.rand(16, 4, generator=g) * 6
    boxes[31] = anchors[137]
    boxes[7] = torch.tensor([20.0, 3, 10, 30])
    return anchors, boxes


def matching() -> None:
    anchors, boxes = anchors_and_boxes()
    few, far = anchors[[5, 5, 90]] + 2, anchors[[0]] - 900
    odd = torch.tensor([[0.0, 0, math.inf, 40], [30, 20, 30, 50], [40, 15, 61, 41]])
    kinked = anchors.clone()
    kinked[3] = torch.tensor([9.0, 9, 9, 9])
    kinked[135, 3] = math.nan  # no regular box touches its block
    nowhere = torch.tensor([[math.inf, 0, math.inf, 40], [5, 5, 5, 5]])  # no area: NaN, and 0 with anchors
    halves, box = torch.tensor([[0.0, 0, 4, 8], [0, 0, 2, 8], [9, 9, 10, 10]]), torch.tensor([[0.0, 0, 8, 8]])
    for given, images, high, low in (  # the shortest first
        (anchors[:9], [nowhere, nowhere[1:], boxes[:2]], 0.0, 0.0),
        (anchors[:9], [boxes[:0], torch.cat([few, nowhere[:1]])], 0.5, 0.0),
        (halves, [box], 0.5, 0.25),  # met exactly, as the next one by its last bit
        (
            torch.tensor([[5.341002464294434, 29.557313919067383, 82.42971801757812, 85.37681579589844]]),
            [torch.tensor([[20.3, 17.7, 71.9, 80.1]])],
            0.5306329131126404,
            0.1,
        ),
        (torch.stack([kinked, kinked]), [odd, few], 0.3, 0.2),
        (anchors, [few, boxes[:0], far], 0.5, 0.4),
        (anchors, [boxes, boxes[:1]], 0.5, 0.4),
    ):
        labels = [torch.arange(len(b)) % 6 - 1 for b in images]
        padded = testing_matching.padded_boxes(images, 4)
        padded[:, 4] = math.nan
        places = (torch.arange(padded.shape[1]) % 6 - 1).repeat(len(images), 1)
        for rule in ((True, False), (False, True), (True, True), (False, False)):
            options = {"high": high, "low": low, "allow_low_quality": rule[0], "force_best": rule[1]}
            pairs = [(images, None)] if rule[0] else [(images, labels)]
            pairs += [(padded, places if rule[1] else None)]
            for gt, gt_labels in pairs:
                want = ik.match_anchors(given, gt, gt_labels=gt_labels, backend="reference", **options)
                got = ik.match_anchors(given, gt, gt_labels=gt_labels, backend="triton", **options)
                assert torch.equal(got, want), (options, got, want)


def fovea() -> None:
    boxes = anchors_and_boxes()[1] * torch.tensor([0.25, 1.2, 0.25, 1.2])
    boxes[33], boxes[34], boxes[35] = boxes[32], torch.tensor([-9.0, -9, 30, 30]), torch.tensor([4.0, 69, 24, 89])
    levels = [(12, 14), (6, 7)], (8, 16), ((1, 20), (16, 64))
    for gt, gt_labels in (([boxes, boxes[5:9]], None), (boxes[None], torch.arange(36)[None] % 7 - 1)):
        options = {"gt_labels": gt_labels, "strides": levels[1], "scale_ranges": levels[2]}
        want = ik.match_fovea(gt, levels[0], backend="reference", **options)
        assert torch.equal(ik.match_fovea(gt, levels[0], backend="triton", **options), want), want


ALL = (focal, smooth_l1, boxes, softmax, detection, dense, matching, fovea)


def main(folder: str, first: str) -> None:
    spec = importlib.util.spec_from_file_location(
        "ioubal_kernels.triton_kernels", Path(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    interpreter.install()
    torch.empty_like = autograd._empty_in_phase = guarded.empty_like
    workspace._tensor = guarded.workspace
    for problem in sorted(ALL, key=lambda problem: problem.__name__ != first):
        problem()


def serve() -> None:
    """Each line in a fork: it need not import torch and Triton again, and a crash is a fault that was noticed."""
    for line in sys.stdin:
        folder, _, first = line.rstrip("\n").partition("\t")
        if first not in ("", *(problem.__name__ for problem in ALL)):
            raise LookupError(f"no problem {first!r}")  # here: in the child it would look like a fault noticed
        child = os.fork()
        if child == 0:
            signal.alarm(TIMEOUT)
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            try:
                main(folder, first)
            except BaseException:
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print("dead" if status else "alive", flush=True)


if __name__ == "__main__":
    serve()
