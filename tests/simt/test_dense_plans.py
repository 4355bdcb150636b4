"""The dense pass's launch plans: layouts, widths of access, tiles, levels; each against the float64 oracle."""

import cases
import emulation
import pytest
import torch

import ioubal_kernels as ik
from ioubal_kernels import testing
from ioubal_kernels.ops import autograd, detection

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EMPTY_IN_PHASE = autograd._empty_in_phase
CLASSES = (1, 2, 3, 7, 8, 16, 17, 80, 91)  # rows shorter than a vector, of whole vectors, across vectors


def name_of(value):
    return str(value).replace("torch.", "") if isinstance(value, torch.dtype) else None


def rows_for(classes, tiles):
    """Rows that need so many tiles of the flat pass, the last one short, whatever the dtype (16 bit: 8,192 entries)."""
    return (tiles - 1) * 8192 // classes + 5


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_rows_of_any_length_over_several_tiles(dtype, classes):
    """Aligned rows, rows across vectors (K % 4 != 0), rows shorter than a vector: three tiles, the last one short."""
    inputs = testing.classification_inputs(seed=classes, rows=rows_for(classes, 3), classes=classes, dtype=dtype)
    cases.check_focal(cases.placed(inputs.logits), inputs)


@pytest.mark.parametrize("offset", (1, 2, 3, 4, 5, 7, 8))
@pytest.mark.parametrize("classes", (3, 8, 80))
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_logits_and_gradient_of_different_alignment(dtype, classes, offset):
    """A compiled call's gradient is aligned; logits in the middle of a storage may not be: entries come one by one."""
    inputs = testing.classification_inputs(seed=offset, rows=4500 // classes, classes=classes, dtype=dtype)
    for gamma in (2.0, 1.5):
        cases.check_focal(cases.placed(inputs.logits, offset), inputs, gamma=gamma)


@pytest.mark.parametrize("offset", (0, 1, 3))
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_gradient_lies_as_its_logits_do(monkeypatch, dtype, layout, offset):
    """Vectors of both begin at multiples of 16 bytes then; the first backward's and a later one's."""
    monkeypatch.setattr(autograd, "_empty_in_phase", EMPTY_IN_PHASE)
    inputs = testing.detection_inputs(seed=offset, images=2, classes=5, levels=((9, 7), (2, 3)), layout=layout)
    inputs = cases.map_heads(inputs, lambda t: cases.placed(t.to(dtype), offset))
    cases.check_detection(inputs)
    rows = testing.classification_inputs(seed=offset, rows=300, classes=5, dtype=dtype)
    cases.check_focal(cases.placed(rows.logits, offset), rows)
    inputs = cases.map_heads(inputs, lambda t: t.detach().requires_grad_())
    logits = cases.tensors(inputs.cls_logits)
    loss = ik.iou_balanced_detection_loss(*inputs.arguments(), backend="cpu").classification
    for _ in range(2):
        grads = torch.autograd.grad(loss, logits, retain_graph=True)
        for x, grad in zip(logits, grads, strict=True):
            assert grad.stride() == x.stride() and grad.data_ptr() % 16 == x.data_ptr() % 16


@pytest.mark.parametrize("rows", (1, 2, 3000))
@pytest.mark.parametrize("offset", (1, 3, 7))
@pytest.mark.parametrize("classes", (1, 3, 8, 91))
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_in_place_at_any_address(dtype, classes, offset, rows):
    """Logits and gradient share an address that is not a multiple of 16: a head of single entries, then vectors."""
    inputs = testing.classification_inputs(seed=offset, rows=rows, classes=classes, dtype=dtype)
    cases.check_focal(cases.placed(inputs.logits, offset), inputs, inplace=True)


@pytest.mark.parametrize("gamma", (0.0, 1.0, 2.0, 0.7))
@pytest.mark.parametrize("classes", (8, 5))
def test_the_losses_one_by_one(classes, gamma):
    """reduction="none" at every layout of rows: aligned, spanning, and single entries."""
    for offset in (0, 3):
        inputs = testing.classification_inputs(seed=offset, rows=1100, classes=classes)
        options = {"reduction": "none", "gamma": gamma, "weight": inputs.weight}
        cases.check_focal(cases.placed(inputs.logits, offset), inputs, **options)


# H x W whose planes start at multiples of 8, 4, 2 and 1 elements; from one location to more than 256 vectors.
PLANES = {"8": (4, 6), "4": (2, 10), "2": (3, 2), "1": (3, 5), "one": (1, 1), "many": (24, 96)}


@pytest.mark.parametrize("size", PLANES)
@pytest.mark.parametrize("classes", (1, 3, 16, 17, 80))
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_planes_of_every_width(dtype, classes, size):
    """NCHW maps: vectors across planes, and planes shorter than a vector."""
    height, width = PLANES[size] if classes < 80 or size != "many" else (12, 48)
    inputs = testing.detection_inputs(
        seed=classes,
        classes=classes,
        per_location=2,
        levels=((height, width),),
        layout="nchw",
        dtype=dtype,
        positive_share=0.3,
    )
    cases.check_detection(cases.ends_exactly(inputs))


@pytest.mark.parametrize("offset", (1, 2, 4))
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_planes_at_any_address(dtype, offset):
    """A storage offset: the gradient of this level lies otherwise, and in place the first vector is partial."""
    inputs = testing.detection_inputs(seed=offset, classes=5, levels=((4, 8), (4, 4)), layout="nchw", dtype=dtype)
    logits = [cases.placed(inputs.cls_logits[0], offset), cases.placed(inputs.cls_logits[1])]
    inputs.cls_logits = logits
    cases.check_detection(inputs)
    cases.check_detection(inputs, inplace=True)


@pytest.mark.parametrize("classes", (1, 16, 17, 80, 91))
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_detection_over_several_tiles(layout, classes):
    """More than 16,384 entries per image and level: several tiles."""
    height = 16_500 // (classes * 3 * 16) + 1
    inputs = testing.detection_inputs(
        seed=classes, images=2, classes=classes, per_location=3, levels=((height, 16), (3, 5)), layout=layout
    )
    cases.check_detection(cases.ends_exactly(inputs), (2.0, 1.0))


MIXES = {
    "planes and rows": "pr",
    "rows and planes": "rp",
    "two and two": "prpr",
    "one location": "1",
    "one location and planes": "1p",
    "one location and rows": "r1",
    "one location and both": "p1r",
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("scope", ("batch", "level", "image"))
def test_heads_of_several_layouts(mix, scope):
    """Some levels NCHW, some channels_last, some of one location: one launch and one loss."""
    levels = [(1, 1) if kind == "1" else (3 + i, 4) for i, kind in enumerate(mix)]
    flat = testing.detection_inputs(seed=len(mix), images=3, classes=6, per_location=2, levels=levels)
    maps = {"r": flat.in_layout("channels_last"), "p": flat.in_layout("nchw"), "1": flat.in_layout("nchw")}
    for deltas in ("pr", "rp"):  # the deltas' layout is a matter of its own
        mixed = maps["p"]
        mixed.cls_logits = [cases.placed(maps[kind].cls_logits[i]) for i, kind in enumerate(mix)]
        mixed.bbox_deltas = [maps[deltas[i % 2]].bbox_deltas[i] for i in range(len(mix))]
        cases.check_detection(mixed, normalizer_scope=scope, normalize_loc=True)
        cases.check_detection(mixed, (3.0, 1.0), normalizer_scope=scope, inplace=True)
        maps["p"] = flat.in_layout("nchw")


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_sixteen_levels(layout):
    """As many levels as a launch takes; flat ones are cut where the scopes are."""
    levels = [(1 + i % 3, 1 + i % 5) for i in range(16)]
    inputs = testing.detection_inputs(seed=3, images=2, classes=5, per_location=1, levels=levels, layout=layout)
    options = {"anchors_per_level": inputs.level_sizes} if layout == "flat" else {}
    cases.check_detection(inputs, normalizer_scope="level", **options)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_an_empty_level_keeps_its_row_of_the_sums(monkeypatch, layout):
    """Processes add their sums up row by row, and a level may be empty in one of them."""
    inputs = testing.detection_inputs(seed=4, classes=3, per_location=1, levels=((2, 2), (0, 3), (2, 1)), layout=layout)
    inputs.matched_idxs.fill_(0)
    found = []

    def kept(scopes, device):
        found.append(torch.full((1 + scopes, 4), float("nan"), dtype=torch.float64))
        return found[-1]

    monkeypatch.setattr(detection, "sums_buffer", kept)
    options = {"anchors_per_level": inputs.level_sizes} if layout == "flat" else {}
    ik.iou_balanced_detection_loss(*inputs.arguments(), normalizer_scope="level", backend="cpu", **options)
    assert (found[0][1:, :2] > 0).all(1).tolist() == [True, False, True]
    assert (found[0][2] == 0).all()
    monkeypatch.undo()
    cases.check_detection(inputs, normalizer_scope="level", **options)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_more_levels_than_a_launch_takes(layout):
    """Seventeen levels are refused, not cut."""
    levels = [(1, 2)] * 17
    inputs = testing.detection_inputs(classes=2, per_location=1, levels=levels, layout=layout)
    options = {"anchors_per_level": inputs.level_sizes} if layout == "flat" else {}
    with pytest.raises((RuntimeError, ValueError), match="at most 16"):
        ik.iou_balanced_detection_loss(*inputs.arguments(), normalizer_scope="level", backend="cpu", **options)


@pytest.mark.parametrize("sizes", ((5, 0, 7), (1, 11), (12,), (4, 4, 4)))
def test_flat_heads_cut_into_levels(sizes):
    """The parts of a flat head start at any address; empty levels have a scope but no anchor."""
    inputs = testing.detection_inputs(seed=1, images=3, classes=5, per_location=1, levels=((1, sum(sizes)),))
    for dtype in DTYPES:
        narrow = cases.map_heads(inputs, lambda t, d=dtype: t.to(d))
        cases.check_detection(narrow, normalizer_scope="level", anchors_per_level=list(sizes), normalize_loc=True)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_deltas_of_any_strides(dtype, layout):
    """The deltas are read and their gradient written wherever they lie."""
    inputs = testing.detection_inputs(seed=5, images=2, classes=3, layout=layout, dtype=dtype, positive_share=0.4)
    for lie in (cases.spread_out, lambda t: cases.placed(t, 1), lambda t: t.transpose(-1, -2).contiguous().mT):
        cases.check_detection(cases.map_heads(inputs, None, lie), box_weights=(10.0, 10.0, 5.0, 5.0))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_deltas_over_several_tiles(layout):
    """More than 1,024 anchors of a level, a last tile that is short, and logits that need no tile of their own."""
    inputs = testing.detection_inputs(
        seed=6, images=2, classes=1, per_location=3, levels=((20, 37), (9, 3)), layout=layout
    )
    cases.check_detection(cases.ends_exactly(inputs), (2.0, 1.0))


@pytest.mark.parametrize("iterations", (1, 2, 3, 8))
@pytest.mark.parametrize("classes, layout", ((80, "flat"), (7, "flat"), (33, "nchw"), (16, "channels_last")))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
def test_tiles_of_several_groups(dtype, classes, layout, iterations):
    """Some 30 groups an image, 15 of 16 bits: as many tiles, or fewer, the last one short."""
    height = 60_000 // (classes * 3 * 20)
    inputs = testing.detection_inputs(
        seed=classes,
        images=2,
        classes=classes,
        per_location=3,
        levels=((height, 20), (2, 3)),
        layout=layout,
        dtype=dtype,
    )
    with emulation.plan(iterations):
        cases.check_detection(inputs)


def test_plans_that_there_are_not():
    for wrong in (0, 9):
        with pytest.raises(RuntimeError, match="no such plan"), emulation.plan(wrong):
            pass


@pytest.mark.parametrize("rows, classes", ((9000, 1), (600_000, 2)))
def test_positives_everywhere(rows, classes):
    """Every strip has positives: a tile for each of few groups, and tiles of two groups where there are many."""
    generator = torch.Generator().manual_seed(rows)
    inputs = testing.classification_inputs(seed=rows, rows=rows, classes=classes)
    inputs.labels = torch.randint(-1, classes, (rows,), generator=generator)
    cases.check_focal(inputs.logits, inputs)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_one_location_among_maps(layout):
    """Rows and planes coincide there."""
    inputs = testing.detection_inputs(
        seed=2, images=2, classes=5, per_location=3, levels=((4, 6), (1, 1), (3, 3)), layout=layout, positive_share=0.3
    )
    cases.check_detection(inputs, (2.0, 1.0))
