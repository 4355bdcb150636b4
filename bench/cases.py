"""Everything that `ioubal bench` measures, the most important first."""

from __future__ import annotations

from functools import partial

import torch

from ioubal_kernels import testing

from . import boxes, flat, matching, retinanet
from .flat import Softmax
from .retinanet import RetinaNet
from .work import Case, short

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
BATCHES = (1, 2, 4, 8, 16)
# Softmax heads: the tuning shape, SSD's default boxes x 32 images, Faster R-CNN's 512 sampled RoIs x 16 images, LVIS.
TUNING, SSD300, SSD512, RCNN, LVIS, VOC = (
    ("dense", 200_000, 81),
    ("ssd300", 32 * 8732, 81),
    ("ssd512", 32 * 24564, 81),
    ("faster-rcnn", 16 * 512, 81),
    ("lvis", 16 * 512, 1204),
    ("ssd300-voc", 32 * 8732, 21),
)


def heads(batch: int, layout: str, dtype: torch.dtype, *, peers: bool = False, variants: bool = False) -> Case:
    """The fused loss on RetinaNet's heads."""
    case = RetinaNet(batch, layout, dtype, peers=peers, variants=variants)
    what = f"fused loss, RetinaNet 800 x 1333, batch {batch}, {layout}, {short(dtype)}" + (
        ", and peers" if peers else ""
    )
    guess = 5.0 + 3.0 * batch + 25.0 * peers + 10.0 * variants
    return Case(case.name, f"retinanet {batch} {peers}", what, partial(retinanet.build, case=case), guess)


def other_classes(classes: int, dtype: torch.dtype) -> Case:
    case = RetinaNet(1, "flat", dtype, classes)
    what = f"fused loss, {classes} classes, batch 1, flat, {short(dtype)}"
    return Case(case.name, f"retinanet k{classes}", what, partial(retinanet.build, case=case), 5.0 + classes / 50)


def softmax(shape: tuple[str, int, int], dtype: torch.dtype, peers: bool = True) -> Case:
    case = Softmax(*shape, dtype, peers)
    what = f"softmax cross entropy, {shape[1]} x {shape[2]}, {short(dtype)}"
    return Case(case.name, f"softmax {shape[0]}", what, partial(flat.softmax, case=case), 30.0)


def box_functions(dtype: torch.dtype) -> list[Case]:
    rows, anchors = 1 << 20, 200_700
    name = short(dtype)
    smooth_l1 = Case(
        f"smooth-l1/{rows}/{name}",
        "small",
        f"smooth L1 of {rows} boxes, {name}",
        partial(boxes.smooth_l1, rows=rows, dtype=dtype),
        5.0,
    )
    return [smooth_l1] + [
        Case(
            f"{function}/{anchors}/{name}",
            "small",
            f"{function} of {anchors} boxes, {name}",
            partial(boxes.function, name=function, rows=anchors, dtype=dtype),
            3.0,
        )
        for function in boxes.FUNCTIONS
    ]


def small_calls() -> list[Case]:
    return [
        Case(
            f"small/{layout}",
            "small",
            f"99 anchors x 80 classes, {layout}: what a call costs",
            partial(flat.small_call, layout=layout),
            5.0,
        )
        for layout in ("flat", "nchw")
    ]


def all_cases(device: str) -> list[Case]:
    """Every case for a device. On a GPU large batches come first, which a small one cannot fill."""
    first = 16 if device == "cuda" else 1
    others = [batch for batch in (1, 4, 8, 2, 16) if batch != first]
    listed = [heads(first, "flat", F32, peers=True, variants=True)]
    listed += [heads(first, "nchw", F32, peers=True), heads(first, "channels_last", F32)]
    listed += [heads(first, layout, BF16, peers=layout == "flat") for layout in testing.LAYOUTS]
    listed += [softmax(TUNING, F32), *matching.cases(first), *small_calls()]
    listed += [softmax(SSD300, F32), softmax(RCNN, F32), softmax(TUNING, BF16)]
    listed += [heads(first, layout, F16, peers=device == "cuda" and layout == "flat") for layout in testing.LAYOUTS]
    listed += [heads(batch, "flat", F32, peers=True) for batch in others]
    listed += [other_classes(classes, F32) for classes in (20, 1203)]
    listed += box_functions(F32)
    listed += [heads(batch, layout, dtype) for batch in others for layout in testing.LAYOUTS for dtype in DTYPES]
    listed += [softmax(shape, F32, False) for shape in (SSD512, LVIS, VOC)]
    listed += [softmax(shape, dtype, False) for shape in (SSD300, RCNN, LVIS) for dtype in (BF16, F16)]
    listed += [softmax(TUNING, F16, False)]
    listed += [other_classes(classes, BF16) for classes in (20, 1203)]
    for dtype in (BF16, F16):
        listed += box_functions(dtype)
    unique = {case.name: case for case in reversed(listed)}  # the first of a name wins
    order = list(dict.fromkeys(case.name for case in listed))
    return [unique[name] for name in order if device in unique[name].devices]
