"""Problems for the emulated kernels at the edges: what poisons, what must not be felt, what must not be touched."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import cases
import torch

import ioubal_kernels as ik
from ioubal_kernels import testing
from ioubal_kernels.ops import detection, flat

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def poisoned(seed, layout):
    """An index, a class or a scope that is none: NaN as loss, no access out of bounds. Ignored anchors: never felt."""
    inputs = testing.detection_inputs(seed=seed, images=2, classes=4, per_location=2, levels=((5, 4),), layout=layout)
    inputs.matched_idxs[1, int((inputs.matched_idxs[1] == -1).nonzero()[0])] = len(inputs.gt_boxes[1])
    rows = testing.classification_inputs(seed=seed, rows=300, classes=4, softmax=True)
    rows.labels[200], rows.scope_ids[100] = 4, 3
    wrong = rows.labels.clone(), {"scope_ids": rows.scope_ids, "num_scopes": 3}
    for change in ("index", "class"):
        if change == "class":
            inputs.matched_idxs.clamp_(max=0)
            inputs.gt_labels[1][0] = 4
            inputs.matched_idxs[1, 0] = 0
        used = cases.ends_exactly(inputs).requiring_grad()
        if change == "index":  # what lies behind the labels is a class
            used.gt_labels = [torch.cat((t, torch.zeros(1, dtype=t.dtype)))[:-1] for t in used.gt_labels]
        out = ik.iou_balanced_detection_loss(*used.arguments(), backend="cpu")
        (2 * out.classification + out.localization).backward()
        assert out.classification.isnan() and out.localization.isnan(), f"{change}, {layout}"
        assert all(bool(t.grad.isfinite().all()) for t in used.heads()), f"{change}, {layout}"
    for labels, scopes in ((wrong[0], {}), (rows.labels.clamp(0, 3), wrong[1])):
        for loss in (ik.iou_balanced_sigmoid_focal_loss, ik.iou_balanced_cross_entropy):
            logits = cases.placed(rows.logits).requires_grad_()
            value = loss(logits, labels, rows.iou, **scopes, backend="cpu")
            value.backward()
            assert value.isnan() and bool(logits.grad.isfinite().all()), f"{loss.__name__}, {layout}"
    background = rows.labels.clamp(0, 3)
    background[100] = ik.BACKGROUND
    assert ik.iou_balanced_sigmoid_focal_loss(rows.logits, background, rows.iou, **wrong[1], backend="cpu").isnan()
    pred, target = testing.delta_inputs(seed=seed, rows=300)
    assert ik.iou_balanced_smooth_l1_loss(pred, target, **wrong[1], backend="cpu").isnan()
    each = ik.iou_balanced_smooth_l1_loss(pred, target, **wrong[1], reduction="none", normalize=True, backend="cpu")
    assert each[100].isnan() and int(each.isnan().sum()) == 1


def ignored(seed, layout, dtype):
    flat = testing.detection_inputs(
        seed=seed, classes=5, per_location=3, levels=((8, 6), (3, 5)), ignored_share=0.4, dtype=dtype
    )
    flat.cls_logits[flat.matched_idxs == testing.IGNORE] = float("nan")
    flat.bbox_deltas[flat.matched_idxs < 0] = float("inf")
    flat.anchors[3, 2:] = flat.anchors[3, :2]  # without area
    flat.matched_idxs[0, 3], flat.gt_boxes[1][0, 2:] = 0, flat.gt_boxes[1][0, :2]
    for exponents in ((1.5, 1.5), (0.0, 0.0)):
        cases.check_detection(
            flat.in_layout(layout), eta=exponents[0], lambda_=exponents[1], avg_factor=torch.tensor([3.0, 5.0])
        )


def extreme(layout, dtype, gamma):
    """Infinite logits, in place with another grad_output, and a scale of 0."""
    x = testing.extreme_logits(dtype)
    flat = testing.detection_inputs(seed=6, images=1, classes=4, levels=((len(x) // 4, 4),), dtype=dtype)
    count = flat.cls_logits.numel()
    flat.cls_logits.copy_(x.repeat(count // len(x) + 1)[:count].view_as(flat.cls_logits))
    cases.check_detection(flat.in_layout(layout), gamma=gamma)
    for factors in ((0.0, 0.0), (2.0, 1.0)):
        inputs = testing.detection_inputs(
            seed=7, images=2, classes=7, per_location=1, levels=((2, 5), (1, 1)), dtype=dtype
        )
        cases.check_detection(inputs.in_layout(layout), factors, gamma=gamma, inplace=factors[0] > 0)


def mixed(seed):
    """Heads of both layouts: one launch, one loss."""
    inputs = testing.detection_inputs(seed=seed, images=3, classes=6, levels=((4, 5), (3, 4), (1, 1)), layout="nchw")
    inputs.cls_logits[seed % 2] = inputs.cls_logits[seed % 2].contiguous(memory_format=torch.channels_last)
    cases.check_detection(inputs, normalizer_scope="image")


def misaligned_planes(offset, dtype):
    inputs = testing.detection_inputs(seed=offset, classes=5, levels=((4, 8), (2, 8)), layout="nchw", dtype=dtype)
    cases.check_detection(cases.map_heads(inputs, partial(cases.placed, offset=offset)))


def many_tiles():
    """More tiles of the positives than the warps that add them up take at a time."""
    inputs = testing.classification_inputs(seed=1, rows=98_000, classes=1)
    cases.check_focal(inputs.logits, inputs)


def scopes_over_tiles(dtype):
    """Several scopes and several tiles of the positives."""
    inputs = testing.classification_inputs(seed=1, rows=2500, classes=8, dtype=dtype)
    scopes = {"scope_ids": inputs.scope_ids, "num_scopes": 3, "eps": 0.3}
    cases.check_focal(inputs.logits, inputs, **scopes)
    cases.check_focal(inputs.logits, inputs, alpha=1.0)  # negatives count nothing: a scale of 0 in the forward


def many_scopes(softmax):
    """Most of them without a row in a tile, some without any."""
    inputs = testing.classification_inputs(seed=2, rows=600, classes=4, num_scopes=900, softmax=softmax)
    check = cases.check_cross_entropy if softmax else cases.check_focal
    check(inputs.logits, inputs, scope_ids=inputs.scope_ids, num_scopes=900)


def one_short_of_a_tile(rows, classes):
    """Entries that end one before a vector does; what lies behind them would change the loss."""
    inputs = testing.classification_inputs(seed=2, rows=rows, classes=classes)
    store = torch.full((rows + 1, classes), 5.0)
    store[:rows] = inputs.logits
    cases.check_focal(store[:rows], inputs)


def many_segments(seed):
    """More sums than a warp has lanes: five levels of nine images."""
    levels = ((2, 3), (2, 2), (1, 2), (1, 1), (3, 2))
    inputs = testing.detection_inputs(seed=seed, images=9, classes=3, per_location=1, levels=levels, positive_share=0.5)
    options = {"anchors_per_level": inputs.level_sizes, "normalizer_scope": "level"}
    cases.check_detection(inputs, normalize_loc=True, **options)


def extreme_rows(gamma, offset):
    x = testing.extreme_logits(F32).reshape(-1, 1)
    for label in (0, -1):
        inputs = testing.classification_inputs(rows=len(x), classes=1)
        inputs.labels, inputs.iou = torch.full((len(x),), label), torch.linspace(0, 1, len(x))
        cases.check_focal(cases.placed(x, offset), inputs, gamma=gamma)


def stream_rows(what):
    """What the loop over whole vectors meets: 2,048 float32 logits or more a problem."""
    inputs = testing.classification_inputs(seed=8, rows=300, classes=8)
    options = {}
    if what == "signs":  # of most vectors all are below 0 but the second; of some warps all
        inputs.labels[16:] = ik.BACKGROUND  # strips with a positive are not the loop's
        inputs.logits = -inputs.logits.abs() - 1
        inputs.logits[40:, 1::4] *= -1
    elif "infinite" in what:
        if "16 bits" in what:  # in the second group of a tile, and beside an ignored row
            inputs = testing.classification_inputs(seed=8, rows=1100, classes=8, dtype=BF16)
        inputs.labels[:] = ik.BACKGROUND
        inputs.labels[900:1100:90] = ik.IGNORE
        inputs.logits[20::50, 5], inputs.logits[7::30, 2] = float("inf"), float("-inf")
        if "each" in what:
            options |= {"gamma": 0.0, "reduction": "none"}
    elif what == "a whole group, misaligned":
        inputs = testing.classification_inputs(seed=8, rows=256, classes=8)
    elif "weights across" in what:
        inputs = testing.classification_inputs(seed=8, rows=1500, classes=5 if "two" in what else 2)
        inputs.labels[100:] = ik.BACKGROUND
        if "unbounded" in what:
            inputs.logits[700::90, 1] = float("inf")
        options["weight"] = inputs.weight
    elif "weights of rows" in what:  # few of which the loop leaves to others
        inputs = testing.classification_inputs(seed=8, rows=1100, classes=16, dtype=BF16 if "16 bits" in what else F32)
        inputs.labels[100:] = ik.BACKGROUND
        inputs.labels[300:1000:90] = ik.IGNORE
        inputs.weight[500:540:3] = 0.0
        options["weight"] = inputs.weight
    elif what == "scopes over tiles":  # of 4,096 rows
        inputs = testing.classification_inputs(seed=8, rows=9000, classes=1)
        options |= {"scope_ids": inputs.scope_ids, "num_scopes": 3}
    offset = 1 if "misaligned" in what else 0
    cases.check_focal(cases.placed(inputs.logits, offset), inputs, inplace=offset > 0, **options)


def small_factor():
    """A factor beside which the losses' sum must keep its small terms, in the loop over whole vectors of 16 bits."""
    inputs = testing.classification_inputs(seed=8, rows=300, classes=8, dtype=BF16)
    inputs.labels[:] = ik.BACKGROUND
    inputs.logits.fill_(-20.0)
    cases.check_focal(inputs.logits, inputs, grad_scale=1e-25, grad_output=torch.tensor(1e-25))


def long_planes(dtype):
    """Four vectors of a thread in one plane, ignored locations in any of them."""
    inputs = testing.detection_inputs(
        seed=9, classes=2, per_location=2, levels=((31, 43),), layout="nchw", dtype=dtype, ignored_share=0.2
    )
    cases.check_detection(inputs, (2.0, 1.0))


def many_anchors_a_location():
    """More than a tile of the positives has units."""
    inputs = testing.detection_inputs(
        seed=9, classes=1, per_location=131, levels=((2, 3), (1, 1)), layout="nchw", positive_share=0.5
    )
    cases.check_detection(inputs, (2.0, 1.0))


def backward_again(layout):
    """The second backward of a graph finds no filled buffer: zeros and positives anew, for whatever factor."""
    inputs = testing.detection_inputs(
        seed=9, images=2, classes=3, per_location=3, levels=((20, 21), (2, 3)), layout=layout, positive_share=0.3
    )
    results = []
    for backend, used in (("reference", inputs.double()), ("cpu", inputs)):
        used = used.requiring_grad()
        heads = used.heads()
        out = ik.iou_balanced_detection_loss(*used.arguments(), backend=backend)
        total = out.classification + out.localization
        total.backward(retain_graph=True)
        for head in heads:
            head.grad = None
        (3 * total).backward()
        results.append([head.grad for head in heads])
    for want, got in zip(*results, strict=True):
        testing.assert_close_budget(got, want, torch.float32, what=f"the second backward, {layout}")


def infinite_logits(classes):
    """Rows whose softmax is a limit, between others: one lane of each does them."""
    inputs = testing.classification_inputs(seed=classes, rows=70, classes=classes, softmax=True)
    for row in range(0, 70, 3):
        at = int(inputs.labels[row]) if row % 2 else (int(inputs.labels[row]) + 1) % classes
        inputs.logits[row, max(at, 0)] = float("inf")
    cases.check_cross_entropy(inputs.logits, inputs, reduction="none", grad_output=torch.linspace(0.5, 2.0, 70))


def untouched(layout):
    """Buffers that were filled for this grad_output are left as they are, whatever they hold; else written."""
    take = detection.take_buffers

    def sevens(ctx, inputs, name="buffers", in_phase=False):
        return [torch.full_like(x, 7.0) for x in inputs], True

    rows = testing.classification_inputs(seed=3, rows=90, classes=5, softmax=True)
    pred, target = testing.delta_inputs(seed=3, rows=90)
    try:
        detection.take_buffers = flat.take_buffers = sevens
        for factors in ((1.0, 1.0), (1.0, 2.0), (2.0, 1.0)):
            inputs = testing.detection_inputs(seed=4, classes=5, layout=layout).requiring_grad()
            out = ik.iou_balanced_detection_loss(*inputs.arguments(), backend="cpu")
            (factors[0] * out.classification + factors[1] * out.localization).backward()
            heads = inputs.heads()
            for i, head in enumerate(heads):
                kept = factors[i >= len(heads) // 2] == 1.0
                assert bool((head.grad == 7.0).all()) == kept, f"{layout}, factors {factors}, head {i}"
        for function, x, rest in (
            (ik.iou_balanced_sigmoid_focal_loss, rows.logits, (rows.labels, rows.iou)),
            (ik.iou_balanced_cross_entropy, rows.logits, (rows.labels, rows.iou)),
            (ik.iou_balanced_smooth_l1_loss, pred, (target,)),
        ):
            for factor in (1.0, 2.0):
                leaf = x.clone().requires_grad_()
                (factor * function(leaf, *rest, backend="cpu")).backward()
                assert bool((leaf.grad == 7.0).all()) == (factor == 1.0), function.__name__
    finally:
        detection.take_buffers = flat.take_buffers = take


def problems() -> Iterator[tuple[str, Callable[[], object]]]:
    """(family, what runs one problem); as in sweep.py."""
    for offset, dtype in itertools.product((1, 2), (F32, BF16)):
        yield "edges", partial(misaligned_planes, offset, dtype)
    for dtype in (F32, F16):
        yield "edges", partial(scopes_over_tiles, dtype)
    yield "edges", many_tiles
    for softmax in (False, True):
        yield "edges", partial(many_scopes, softmax)
    for classes in (21, 100, 130):
        yield "edges", partial(infinite_logits, classes)
    for size in ((195, 21), (1365, 3), (585, 7)):
        yield "edges", partial(one_short_of_a_tile, *size)
    for seed in range(3):
        yield "edges", partial(many_segments, seed)
    for gamma, offset in itertools.product((0.0, 2.0), (0, 1)):
        yield "edges", partial(extreme_rows, gamma, offset)
    for layout in testing.LAYOUTS:
        yield "edges", partial(untouched, layout)
        yield "edges", partial(backward_again, layout)
    for what in ("infinite, 16 bits", "infinite, each"):
        yield "edges", partial(stream_rows, what)
    for what in ("weights of rows", "weights of rows, 16 bits", "weights of rows, misaligned"):
        yield "edges", partial(stream_rows, what)
    for what in ("signs", "infinite", "a whole group, misaligned", "scopes over tiles"):
        yield "edges", partial(stream_rows, what)
    for what in ("two rows", "two rows, misaligned, unbounded", "three rows, misaligned"):
        yield "edges", partial(stream_rows, f"weights across {what}")
    yield "edges", small_factor
    for dtype in (F32, BF16):
        yield "edges", partial(long_planes, dtype)
    yield "edges", many_anchors_a_location

    for seed, layout in enumerate(testing.LAYOUTS):
        yield "poison", partial(poisoned, seed, layout)
    for seed, (layout, dtype) in enumerate(itertools.product(testing.LAYOUTS, (F32, BF16))):
        yield "ignored", partial(ignored, seed, layout, dtype)
        for gamma in (2.0, 1.5):
            yield "extreme", partial(extreme, layout, dtype, gamma)
    for seed in range(4):
        yield "mixed", partial(mixed, seed)
