"""Every CUDA kernel over many shapes in one order of the threads, each element against the float64 oracle.

    python sweep.py LIBRARY SEED [--reduced] [--probe read|write]

A program, so that it runs under sanitizers, coverage and with mutants; every tensor ends with its allocation. It prints
the number of problems of each family as JSON. --probe: instead, one access out of bounds, which a sanitizer must find.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import cases
import edges
import emulation
import matching_cases
import torch

import ioubal_kernels as ik
from ioubal_kernels import testing

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
Problem = tuple[str, Callable[[], object]]  # family, and what runs one problem


def turns(*choices: object) -> Iterator[object]:
    """Each choice in turn, for ever: to vary one thing along with another without multiplying them."""
    return itertools.cycle(choices)


# ---------------------------------------------------------------------------------------------- rows of logits


def focal_rows(seed, rows, classes, dtype, offset=0, **options):
    inputs = testing.classification_inputs(seed=seed, rows=rows, classes=classes, dtype=dtype)
    if options.pop("scopes", False):
        options |= {"scope_ids": cases.placed(inputs.scope_ids), "num_scopes": 3, "weight": cases.placed(inputs.weight)}
    inputs.labels, inputs.iou = cases.placed(inputs.labels), cases.placed(inputs.iou)
    cases.check_focal(cases.placed(inputs.logits, offset), inputs, **options)


def rows_problems() -> Iterator[Problem]:
    gammas, scopes, seeds = turns(2.0, 1.0, 0.0, 1.5, 2.0), turns(False, False, True), itertools.count()
    sizes = ((1, 8), (3, 16), (31, 8), (33, 24), (129, 80), (257, 16), (600, 32), (5, 1208), (70, 80), (33, 8))
    for size, dtype in itertools.product((*sizes, *((n, 40) for n in range(30, 230, 20))), DTYPES):
        yield "rows", partial(focal_rows, next(seeds), *size, dtype, gamma=next(gammas), scopes=next(scopes))
    for rows, classes, offset in itertools.product((1, 40, 700), (1, 3, 7, 21, 91), (0, 1, 3, 6)):
        seed, rows = next(seeds), min(rows, 20_000 // classes)
        yield "spanning rows", partial(focal_rows, seed, rows, classes, DTYPES[seed % 3], offset, inplace=offset > 0)
    # Whole vectors, but not aligned. A factor of 0.5 rounds nothing again.
    for classes, offset, factor in itertools.product((8, 16, 5), (1, 2, 3), (1.0, 0.5)):
        options = {"inplace": True, "grad_output": torch.tensor(factor)}
        yield "spanning rows", partial(focal_rows, next(seeds), 300, classes, DTYPES[offset % 3], offset, **options)
    for rows, classes, offset in itertools.product((1, 33, 260), (1, 4, 8, 21), (1, 2, 5)):
        for options in ({}, {"reduction": "none"}):
            seed = next(seeds)
            dtype = F32 if options else DTYPES[seed // 2 % 3]
            yield "single rows", partial(focal_rows, seed, rows, classes, dtype, offset, gamma=next(gammas), **options)


def cross_entropy_rows(seed, rows, classes, dtype, **options):
    inputs = testing.classification_inputs(seed=seed, rows=rows, classes=classes, dtype=dtype, softmax=True)
    if options.pop("scopes", False):
        options |= {"scope_ids": cases.placed(inputs.scope_ids), "num_scopes": 3, "weight": cases.placed(inputs.weight)}
    if options.get("reduction") == "none":
        options["grad_output"] = torch.linspace(0.5, 2.0, rows)
    inputs.labels, inputs.iou = cases.placed(inputs.labels), cases.placed(inputs.iou)
    cases.check_cross_entropy(cases.placed(inputs.logits), inputs, **options)


def cross_entropy_problems() -> Iterator[Problem]:
    scopes, reductions, seeds = turns(False, True, False), turns("mean", "sum", "none", "mean"), itertools.count()
    cached = itertools.product((1, 31, 33, 257, 300), (2, 5, 32, 33, 81, 96, 127, 128))
    uncached = itertools.product((1, 5, 33), (129, 130, 160, 161, 200, 256, 333, 365, 1204))
    wide = ((257, 129), (300, 140), (513, 150))
    for family, sizes in (("softmax", cached), ("wide softmax", (*uncached, *wide))):
        for (rows, classes), dtype in itertools.product(sizes, (F32, F16) if family == "softmax" else DTYPES):
            options = {"scopes": next(scopes), "reduction": next(reductions), "background_index": next(seeds) % 2}
            yield family, partial(cross_entropy_rows, next(seeds), rows, classes, dtype, **options)


def smooth_l1_rows(seed, rows, dtype, columns, given_iou, **options):
    pred, target = (cases.placed(t) for t in testing.delta_inputs(seed=seed, rows=rows, dtype=dtype))
    g = torch.Generator().manual_seed(seed)
    iou = cases.placed(torch.rand(rows, generator=g)) if given_iou else None
    if columns:
        options["weight"] = torch.rand((rows, 4) if columns == 2 else (rows,), generator=g)
    if seed % 2:
        options |= {"scope_ids": torch.randint(0, 3, (rows,), generator=g), "num_scopes": 3}
    if options.get("reduction") == "none":
        options["grad_output"] = torch.linspace(0.5, 2.0, rows)
    cases.check_flat(ik.iou_balanced_smooth_l1_loss, pred, target, iou, **options)


def smooth_l1_problems() -> Iterator[Problem]:
    reductions, betas, lambdas = turns("mean", "none", "sum"), turns(0.11, 0.0, 1.0), turns(1.5, 0.0, 2.0, 0.5)
    sizes = (1, 2, 31, 33, 255, 256, 257, 511, 600, 1025)
    for seed, (rows, dtype, normalize) in enumerate(itertools.product(sizes, DTYPES, (True, False))):
        options = {"reduction": next(reductions), "beta": next(betas), "lambda_": next(lambdas), "w_loc": 1.7}
        given = (seed, rows, dtype, seed % 3, seed % 4 < 2)
        yield "smooth L1", partial(smooth_l1_rows, *given, normalize=normalize, **options)


# ---------------------------------------------------------------------------------------------- detection


def detection(seed, layout, dtype, lie=None, factors=(1.0, 2.0), padded=False, cut=False, **options):
    shape = {
        k: options.pop(k) for k in ("images", "classes", "per_location", "levels", "shared_anchors") if k in options
    }
    inputs = testing.detection_inputs(
        seed=seed, layout=layout, dtype=dtype, positive_share=0.3, box_coder=options.get("box_coder", "delta"), **shape
    )
    if cut:
        options["anchors_per_level"] = inputs.level_sizes
    inputs = cases.ends_exactly(inputs.padded() if padded else inputs)
    if lie is not None:
        inputs = cases.map_heads(inputs, None, lie)
    cases.check_detection(inputs, factors, **options)


def detection_problems() -> Iterator[Problem]:
    """Each is the positives', the coefficients' and the dense pass's kernel, and the deltas'."""
    scopes, coders = turns("batch", "level", "image"), turns("delta", "delta", "fovea")
    factors, gammas = turns((1.0, 2.0), (2.0, 1.0), (1.0, 1.0)), turns(2.0, 2.0, 1.5, 0.0, 1.0)
    exponents = turns((1.5, 1.5), (1.5, 0.5), (0.0, 0.0))
    heads = (
        *((3, 2, ((5, 3), (1, 1))), (1, 1, ((1, 1),)), (16, 1, ((4, 6), (2, 2))), (17, 3, ((6, 6),))),
        *((80, 2, ((3, 8), (3, 5), (1, 2))), (91, 1, ((7, 9),)), (8, 9, ((12, 12), (3, 3))), (5, 4, ((2, 65),))),
        *((2, 3, ((33, 11), (9, 4))), (1, 35, ((5, 9), (2, 2))), (21, 1, ((10, 10), (5, 5), (3, 3), (2, 2), (1, 1)))),
    )
    seeds = itertools.count()
    for (classes, per_location, levels), layout, dtype in itertools.product(heads, testing.LAYOUTS, DTYPES):
        seed, scope, (eta, lambda_) = next(seeds), next(scopes), next(exponents)
        options = {"normalizer_scope": scope, "box_coder": next(coders), "gamma": next(gammas), "eta": eta}
        options |= {
            "lambda_": lambda_,
            "normalize_loc": seed % 2 == 0,
            "factors": next(factors),
            "padded": seed % 4 == 1,
        }
        options |= {"eps": 0.3 if seed % 3 == 1 else 0.0, "w_loc": 1.5, "cls_weight": 0.7}
        if seed % 5 == 3:
            options["avg_factor"] = (torch.tensor(3.0), torch.arange(2.0, 3 + seed % 3))
        options |= {"cut": layout == "flat" and scope == "level", "shared_anchors": seed % 5 != 2}
        options |= {"images": 1 + seed % 3, "classes": classes, "per_location": per_location, "levels": levels}
        family = "planes" if layout == "nchw" else "detection rows"
        yield family, partial(detection, seed, layout, dtype, **options)
    for width, per_location, classes in itertools.product((1, 2, 3, 4, 6, 8, 12, 16), (1, 3), (1, 4, 17)):
        seed, options = next(seeds), {"levels": ((3, width), (2, 7)), "per_location": per_location, "classes": classes}
        yield "planes", partial(detection, seed, "nchw", DTYPES[seed % 3], **options)
    lies = (cases.spread_out, partial(cases.placed, offset=1), partial(cases.placed, offset=4))
    for levels, layout, lie in itertools.product((((4, 5), (1, 3)), ((20, 19),), ((1, 1),)), testing.LAYOUTS, lies):
        for dtype, factor in zip(DTYPES, ((1.0, 2.0), (1.0, 1.0), (0.0, 3.0)), strict=True):
            options = {"levels": levels, "per_location": 3, "classes": 2, "factors": factor}
            yield "deltas", partial(detection, next(seeds), layout, dtype, lie, **options)


# ---------------------------------------------------------------------------------------------- boxes


def boxes(seed, rows, dtype, coder):
    """Box coordinates are differences of numbers up to 300: an error of 2^-24 of that size is what float32 leaves."""
    g = torch.Generator().manual_seed(seed)
    anchors = torch.rand(rows, 4, generator=g) * 100
    anchors[:, 2:] += anchors[:, :2] + 8
    deltas = torch.randn(rows, 4, generator=g) * 0.4
    deltas[::7, 3] = 6.0  # beyond the clamp
    grad = torch.randn(rows, 4, generator=g)
    anchors, deltas = cases.placed(anchors.to(dtype)), cases.placed(deltas.to(dtype))
    weights = (10.0, 10.0, 5.0, 5.0) if seed % 2 else (1.0, 1.0, 1.0, 1.0)
    results = []
    for backend, wide in (("reference", True), ("cpu", False)):
        a, d = (anchors.double(), deltas.double()) if wide else (anchors, deltas)
        leaf = d.detach().requires_grad_()
        with ik.use_backend(backend):
            decoded = ik.decode_boxes(leaf, a, weights=weights, box_coder=coder)
            decoded.backward(grad.to(decoded.dtype))
            moved = results[0][0].to(decoded.dtype) if results else decoded.detach()  # the same boxes for both
            encoded = ik.encode_boxes(moved, a, weights=weights, box_coder=coder)
            iou = ik.paired_box_iou(moved, a)
            shared = ik.delta_iou(d, d.flip(0), weights=weights, box_coder=coder)
        results.append((decoded.detach(), leaf.grad, encoded, iou, shared))
    size = results[0][0].abs().amax() if rows else 1.0
    # What each cancels down from: corners, the gradient's two terms, corners over the anchor's size, areas.
    side = float((anchors[:, 2:] - anchors[:, :2]).min()) if rows else 1.0
    edge = float(size) / side
    floors = (size, grad.abs().max() * results[0][0].abs().max(), 4 * edge * max(weights), 1.0 + edge, 1.0)
    for got, want, floor, what in zip(
        results[1], results[0], floors, ("decode", "its gradient", "encode", "iou", "delta iou"), strict=True
    ):
        testing.assert_close_budget(got, want, got.dtype, floor=float(floor), what=f"{what}, {coder}, {dtype}, {rows}")


def boxes_problems() -> Iterator[Problem]:
    sizes = (1, 2, 31, 32, 33, 63, 64, 65, 255, 256, 257, 600)
    for seed, (rows, dtype, coder) in enumerate(itertools.product(sizes, DTYPES, ("delta", "fovea"))):
        yield "boxes", partial(boxes, seed, rows, dtype, coder)


# ---------------------------------------------------------------------------------------------- the program


def problems(reduced: bool = False) -> Iterator[Problem]:
    """All of them; reduced: every seventh of each family, and the edges."""
    seen: dict[str, int] = collections.Counter()
    for make in (
        rows_problems,
        cross_entropy_problems,
        smooth_l1_problems,
        detection_problems,
        boxes_problems,
        matching_cases.problems,
        edges.problems,
    ):
        for family, problem in make():
            seen[family] += 1
            if not reduced or seen[family] % 7 == 1 or make is edges.problems:
                yield family, problem


def spread(everything: list[Problem], most: int) -> Iterator[Problem]:
    """Of each family `most` problems, or all, at equal distances."""
    total = collections.Counter(family for family, _ in everything)
    seen: dict[str, int] = collections.Counter()
    for family, problem in everything:
        number, seen[family] = seen[family], seen[family] + 1
        if number * most // total[family] != (number - 1) * most // total[family] or total[family] <= most:
            yield family, problem


def run_all(reduced: bool = False, most: int | None = None, first: str = "") -> dict[str, int]:
    """Runs them, of each family at most `most`, those with `first` in their name before the others; the number of
    problems of each family. AssertionError for the first that is wrong."""
    counts: dict[str, int] = collections.Counter()
    chosen = list(problems(reduced)) if most is None else spread(list(problems(reduced)), most)
    for family, problem in sorted(chosen, key=lambda problem: first not in problem[0]):
        try:
            problem()
        except AssertionError as error:
            raise AssertionError(f"{family}, problem {counts[family]}: {error}") from None
        counts[family] += 1
    return dict(counts)


def probe(kind: str) -> None:
    """One element past the end of the second boxes, or of the output."""
    rows = torch.rand(5, 4)
    short = torch.rand(4, 4) if kind == "read" else rows
    torch.ops.ioubal.paired_box_iou.simt(rows, short, torch.empty(5 if kind == "read" else 4))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("library", type=Path)
    parser.add_argument("seed", type=int)
    parser.add_argument("--reduced", action="store_true")
    parser.add_argument("--most", type=int, help="problems of a family")
    parser.add_argument("--probe", choices=("read", "write"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["IOUBAL_CHECK"] = "0"  # labels are not looked at before the kernels see them
    with emulation.emulated(given.library, given.seed):
        if given.probe:
            probe(given.probe)
            print("not found")
        else:
            print(json.dumps(run_all(given.reduced, given.most)))


if __name__ == "__main__":
    main()
