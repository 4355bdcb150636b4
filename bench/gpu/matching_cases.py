"""Parity cases of matching: decisions, so equal or wrong. The oracle is the reference in the same dtype: float32
decides otherwise than float64 where two IoUs are near."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import ioubal_kernels as ik
from ioubal_kernels import testing_matching

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("list", "padded", "labelled list", "labelled")  # how the boxes are given
DRAWN, CELLS = 120, 60
FOVEA_LEVELS = ((100, 130), (50, 65), (25, 33), (13, 17), (7, 9))

Decide = Callable[[str, str], Tensor]  # backend, device


def retinanet_anchors(device: str, levels: tuple[tuple[int, int], ...] = FOVEA_LEVELS) -> Tensor:
    """RetinaNet's anchors (R, 4), 9 per location, of a picture of 800 x 1040 pixels; stride 8 first."""
    anchors = []
    for level, (height, width) in enumerate(levels):
        stride = 8 << level
        y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
        sides = [
            4 * stride * 2 ** (octave / 3) * torch.tensor([ratio**-0.5, ratio**0.5])
            for octave in range(3)
            for ratio in (0.5, 1.0, 2.0)
        ]
        half = torch.stack(sides) / 2
        anchors.append((torch.stack((x, y, x, y), -1).reshape(-1, 1, 4) + torch.cat((-half, half), 1)).reshape(-1, 4))
    return torch.cat(anchors).round().to(device)


def picture_boxes(seed: int, images: int, boxes: int, device: str) -> list[Tensor]:
    """Boxes of a few pixels up to half the picture; each second image has fewer, the last but one none."""
    g = torch.Generator().manual_seed(seed)
    listed = []
    for image in range(images):
        count = 0 if image == images - 2 else boxes - image % 2 * (boxes // 3)
        corner = torch.rand(count, 2, generator=g) * torch.tensor([1000.0, 760.0])
        listed.append(torch.cat((corner, corner + 4 + torch.rand(count, 2, generator=g) ** 3 * 400), 1).to(device))
    return listed


def given(boxes: list[Tensor], form: str, index: torch.dtype) -> dict[str, Any]:
    """gt_boxes and gt_labels of a form; labels of -1 take every fifth box away."""
    if form in ("list", "padded"):
        return {"gt_boxes": testing_matching.padded_boxes(boxes) if form == "padded" else boxes}
    labels = [torch.where(torch.arange(len(b), device=b.device) % 5 == 4, -1, 2).to(index) for b in boxes]
    if form == "labelled list":
        return {"gt_boxes": boxes, "gt_labels": labels}
    padded = testing_matching.padded_boxes(boxes)
    rest = torch.full(padded.shape[:2], 2, dtype=index, device=padded.device)
    for image, each in enumerate(labels):
        rest[image, : len(each)] = each
    return {"gt_boxes": padded, "gt_labels": rest}


def drawn(seed: int, dtype: torch.dtype, form: str, index: torch.dtype) -> Decide:
    def decide(backend: str, device: str) -> Tensor:
        case = testing_matching.matching_case(seed, dtype, device)
        arguments = given(case.gt_boxes, form, index)
        return ik.match_anchors(case.anchors, **arguments, **case.options, dtype=index, backend=backend)

    return decide


def picture(seed: int, dtype: torch.dtype, form: str, index: torch.dtype, own: bool, rule: dict[str, Any]) -> Decide:
    def decide(backend: str, device: str) -> Tensor:
        anchors = retinanet_anchors(device).to(dtype)
        boxes = [b.to(dtype) for b in picture_boxes(seed, 5, (20, 1, 70)[seed % 3], device)]
        if own:
            anchors = torch.stack([anchors.roll(777 * image, 0) for image in range(5)])
        return ik.match_anchors(anchors, **given(boxes, form, index), **rule, dtype=index, backend=backend)

    return decide


def cells(seed: int, kind: str, dtype: torch.dtype, form: str, index: torch.dtype) -> Decide:
    def decide(backend: str, device: str) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        counts = (seed % 5 * 20, 3, 0, 300 * (seed % 2))
        boxes = [(8 * testing_matching.draw_boxes(g, kind, n)).to(device, dtype) for n in counts]
        options = {"level_shapes": FOVEA_LEVELS, "sigma": (0.4, 1.0, 0.1)[seed % 3], "dtype": index}
        return ik.match_fovea(**given(boxes, form, index), **options, backend=backend)

    return decide


def decisions() -> Iterator[tuple[str, str, Decide]]:
    """(op, name, what decides) of every case."""
    indices = (torch.int64, torch.int32)
    for seed in range(DRAWN):
        dtype, form, index = DTYPES[seed % 3], FORMS[seed // 3 % 4], indices[seed % 2]
        yield "match_anchors", f"matching {seed} {dtype} {form}", drawn(seed, dtype, form, index)
    rules = [{"allow_low_quality": q, "force_best": f} for q in (True, False) for f in (False, True)]
    for seed in range(24):
        dtype, form, index, own = DTYPES[seed // 4 % 3], FORMS[seed // 2 % 4], indices[seed % 2], seed % 5 == 4
        name = f"RetinaNet matching {seed} {dtype} {form}{' own anchors' if own else ''}"
        yield "match_anchors", name, picture(seed, dtype, form, index, own, rules[seed % 4])
    for seed in range(CELLS):
        kind = testing_matching.BOX_KINDS[seed % len(testing_matching.BOX_KINDS)]
        dtype, form, index = DTYPES[seed % 3], FORMS[seed // 3 % 4], indices[seed % 2]
        yield "match_fovea", f"fovea {seed} {kind} {dtype} {form}", cells(seed, kind, dtype, form, index)
