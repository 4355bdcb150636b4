"""Problems of matching for the emulated kernels: each decision against the reference, which is torchvision's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import cases
import torch
from torch import Tensor

import ioubal_kernels as ik
from ioubal_kernels import testing_matching

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
RULES = [{"allow_low_quality": q, "force_best": f} for q in (True, False) for f in (False, True)]
# How the boxes are given: a list, padded by NaN, the same with labels that take some boxes away.
FORMS = ("list", "padded", "labelled list", "labelled")


def grid_anchors(levels: tuple[tuple[int, int], ...], per_location: int = 3) -> Tensor:
    """Anchors (R, 4) in the order level, h, w, a: neighbours overlap other boxes than those far away."""
    anchors = []
    for level, (height, width) in enumerate(levels):
        stride = 8 << level
        y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
        half = stride * (1.5 + torch.arange(per_location)[:, None] / 2) * torch.tensor([[1.0, 0.7]])
        corners = torch.stack((x, y, x, y), -1).reshape(-1, 1, 4) + torch.cat((-half, half), 1)
        anchors.append(corners.reshape(-1, 4))
    return torch.cat(anchors)


def given(boxes: list[Tensor], form: str, index: torch.dtype, generator: torch.Generator) -> dict[str, object]:
    """gt_boxes and gt_labels of a form, every tensor in an allocation of its own that ends with it."""
    labels = [torch.randint(-2, 4, (len(b),), generator=generator).to(index) for b in boxes]  # -1: no box
    if form in ("padded", "labelled"):
        padded = testing_matching.padded_boxes(boxes)
        rest = torch.full(padded.shape[:2], 2, dtype=index)
        for image, each in enumerate(labels):
            rest[image, : len(each)] = each
        arguments = {"gt_boxes": cases.placed(padded), "gt_labels": cases.placed(rest)}
    else:
        arguments = {"gt_boxes": [cases.placed(b) for b in boxes], "gt_labels": [cases.placed(t) for t in labels]}
    if form in ("list", "padded"):
        del arguments["gt_labels"]
    return arguments


def assert_same(got: Tensor, want: Tensor, what: str) -> None:
    if torch.equal(got, want):
        return
    image, row = (got != want).nonzero()[0].tolist()
    count = int((got != want).sum())
    raise AssertionError(
        f"{what}: {count} differ, the first at {image}, {row}: {got[image, row]} not {want[image, row]}"
    )


def check_anchors(anchors: Tensor, arguments: dict[str, object], what: str, **options: object) -> Tensor:
    got = ik.match_anchors(anchors, **arguments, **options, backend="cpu")
    assert_same(got, ik.match_anchors(anchors, **arguments, **options, backend="reference"), f"{what}, {options}")
    return got


def check_cells(arguments: dict[str, object], what: str, **options: object) -> Tensor:
    got = ik.match_fovea(**arguments, **options, backend="cpu")
    assert_same(got, ik.match_fovea(**arguments, **options, backend="reference"), f"{what}, {options}")
    return got


def drawn(seed: int, dtype: torch.dtype, form: str, index: torch.dtype, offset: int) -> None:
    """Every kind of box, every number of anchors and boxes, every rule."""
    case = testing_matching.matching_case(seed, dtype)
    arguments = given(case.gt_boxes, form, index, torch.Generator().manual_seed(seed))
    anchors = cases.placed(case.anchors, offset)
    check_anchors(anchors, arguments, f"{case.what}, {form}, {dtype}, off by {offset}", dtype=index, **case.options)


def nan_bits(seed: int) -> None:
    """NaN IoUs of several bits: as numbers the later ones are larger, and yet the first is a box's best."""
    anchors = grid_anchors(((6, 5),))
    bits = anchors.view(torch.int32)
    bits[7 + seed, seed % 4], bits[80, 1], bits[-1, 2] = 0x7FC00000, 0x7FC00100, 0x7FFFFFFF
    for rule in RULES:
        check_anchors(anchors, {"gt_boxes": [anchors[[3, 60]] + 1, anchors[100:101]]}, f"NaN bits {seed}", **rule)


def culled(seed: int, images: int, boxes: int, form: str, own: bool, rule: dict[str, bool]) -> None:
    """Anchors on a grid, boxes here and there: most pairs are never computed. Some seeds have a box without overlap."""
    g = torch.Generator().manual_seed(seed)
    anchors = grid_anchors(((9, 11), (4, 5), (2, 2)))
    listed = []
    for image in range(images):
        corner = torch.rand(boxes * (image != 1), 2, generator=g) * 70
        listed.append(torch.cat((corner, corner + 3 + torch.rand(corner.shape, generator=g) ** 2 * 40), 1))
    if seed % 3 == 0 and boxes:
        listed[-1][0] = torch.tensor([900.0, 900, 950, 960])
    if seed % 3 == 1 and boxes:
        listed[0][-1] = anchors[40]  # IoU of 1
    if own:
        anchors = torch.stack([anchors.roll(37 * image, 0) for image in range(images)])
    arguments = given(listed, form, torch.int32, g)
    check_anchors(cases.placed(anchors), arguments, f"culled {seed}, {images} x {boxes}, {form}, own {own}", **rule)


def fovea(seed: int, kind: str, boxes: int, form: str, dtype: torch.dtype, index: torch.dtype) -> None:
    """Boxes of every kind on maps of several tiles, of one cell and of none; ties, scales that share boxes."""
    g = torch.Generator().manual_seed(seed)
    scale = 8.0 if kind == "random" else 4.0
    listed = [(scale * testing_matching.draw_boxes(g, kind, n)).to(dtype) for n in (boxes, boxes // 2, 0)]
    levels = (((40, 33), (20, 17), (3, 0), (1, 1)), ((33, 17), (16, 16), (5, 5), (2, 1)))[seed % 2]
    options = {
        "strides": (8, 16, 32, 64),
        "scale_ranges": ((1, 64), (32, 128), (0, 1000), (128, 1e6)) if seed % 3 else ((0, 1e6),) * 4,
        "sigma": (0.4, 1.0, 0.05)[seed % 3],
        "dtype": index,
    }
    arguments = given(listed, form, index, g)
    check_cells(arguments, f"fovea {seed}, {boxes} {kind} boxes, {form}, {dtype}", level_shapes=levels, **options)


def problems() -> Iterator[tuple[str, Callable[[], object]]]:
    """(family, what runs one problem); as in sweep.py."""
    indices = itertools.cycle((torch.int64, torch.int32))
    for seed in range(120):
        form, offset = FORMS[seed % 4], (0, 0, 1, 3)[seed // 4 % 4]
        yield "matching", partial(drawn, seed, DTYPES[seed % 3], form, next(indices), offset)
    for seed in range(4):
        yield "matching", partial(nan_bits, seed)
    sizes = itertools.product((1, 4, 6), (0, 3, 31, 33, 70), (False, True))
    for seed, (images, boxes, own) in enumerate(sizes):
        yield "matching", partial(culled, seed, images, boxes, FORMS[seed // 2 % 4], own, RULES[seed % 4])
    kinds = (*testing_matching.BOX_KINDS, "random", "random")
    for seed, kind in enumerate(kinds * 6):
        boxes = (1, 7, 40, 300)[seed % 4]
        yield "fovea", partial(fovea, seed, kind, boxes, FORMS[seed // 3 % 4], DTYPES[seed // 2 % 3], next(indices))
