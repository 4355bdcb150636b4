"""The fused detection loss in the interpreter: dtypes, layouts, scopes, coders; sizes that leave tails everywhere."""

import itertools

import pytest
import torch
from checks import DTYPES, check_detection, ids

import ioubal_kernels as ik
from ioubal_kernels import testing
from ioubal_kernels.ops import with_triton, workspace
from ioubal_kernels.triton_kernels import _launch, focal_pass, positives

LEVELS = ((3, 4), (1, 1))
GAMMAS = (2.0, 1.5, 0.0, 1.0)


@pytest.mark.parametrize("box_coder", ("delta", "fovea"))
@pytest.mark.parametrize("scope", ("batch", "level", "image"))
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_parity(dtype, layout, scope, box_coder):
    """The other parameters take their turns, so that each meets each layout and scope."""
    turn = (DTYPES.index(dtype), testing.LAYOUTS.index(layout), ("batch", "level", "image").index(scope))
    gamma = GAMMAS[(sum(turn) + (box_coder == "fovea")) % 4]
    normalize_loc, padded = (turn[1] + turn[2]) % 2 == 0, (turn[0] + turn[2] + (box_coder == "fovea")) % 2 == 0
    inputs = testing.detection_inputs(
        seed=7, images=2, classes=5, per_location=2, levels=LEVELS, box_coder=box_coder, dtype=dtype,
        positive_share=0.3, gt="padded" if padded else "list", index_dtype=torch.int32 if turn[0] else torch.int64,
    )  # fmt: skip
    check_detection(
        inputs.in_layout(layout),
        gamma=gamma,
        normalizer_scope=scope,
        box_coder=box_coder,
        normalize_loc=normalize_loc,
        anchors_per_level=inputs.level_sizes,
        w_loc=3.049,
        eps=0.0 if normalize_loc else 1e-6,
    )


SHAPES = ((1, 1), (1, 9), (3, 1), (7, 2), (80, 1), (91, 3))


@pytest.mark.parametrize("classes, per_location", SHAPES)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_shapes(layout, classes, per_location):
    """Class counts and anchors per location; from no exceptional anchor to many."""
    number = SHAPES.index((classes, per_location))
    share, ignored = (0.0, 0.01, 0.6)[number % 3], (0.4, 0.0, 0.02)[(number + len(layout)) % 3]
    inputs = testing.detection_inputs(
        seed=3, images=1 if classes > 80 else 2, classes=classes, per_location=per_location, levels=((5, 13), (1, 1)),
        positive_share=share, ignored_share=ignored,
    )  # fmt: skip
    check_detection(inputs.in_layout(layout))


OPTIONS = {
    "number": {"avg_factor": 5.5},
    "tensor": {"avg_factor": torch.tensor(7.0)},
    "per image": {"avg_factor": torch.tensor([3.0, 4.0])},
    "pair": {"avg_factor": (torch.tensor([3.0, 4.0]), 2.0)},
    "grad_scale": {"grad_scale": 1024.0, "factors": (1.0, 1.0)},
    "grad_scale, met": {"grad_scale": torch.tensor(0.5), "factors": (0.5, 0.5)},
    "weights": {"cls_weight": 0.3, "w_loc": 0.0},
    "no exponents": {"alpha": None, "eta": 0.0, "lambda_": 0.0},
    "L1": {"beta": 0.0, "box_weights": (10.0, 10.0, 5.0, 5.0)},
    "two exponents": {"eta": 4.0, "lambda_": 0.5, "alpha": 1.0},
    "in place": {"inplace": True},
    "in place, rescaled": {"inplace": True, "grad_scale": 0.5},
}


@pytest.mark.parametrize("layout", ("flat", "nchw"))
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, layout):
    dtype = DTYPES[list(OPTIONS).index(name) % 3]
    options = dict(OPTIONS[name])
    inputs = testing.detection_inputs(seed=11, images=2, classes=4, dtype=dtype, layout=layout)
    check_detection(inputs, options.pop("factors", (1.0, 2.0)), **options)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_many_locations(layout):
    """Several programs of every kernel, 16-byte accesses, and levels of other widths."""
    inputs = testing.detection_inputs(
        seed=1, images=1, classes=16, per_location=2, levels=((24, 48), (3, 5)), positive_share=0.02, ignored_share=0.02
    )
    check_detection(inputs.in_layout(layout))


@pytest.mark.parametrize("groups, vectors", ((1, 4), (3, 2), (8, 4)))
@pytest.mark.parametrize("layout", ("flat", "nchw"))
def test_launch_choices(monkeypatch, layout, groups, vectors):
    """Groups of a program, and vectors that reach from one plane into the next: a map of 2,047 locations."""
    monkeypatch.setattr(focal_pass, "choice", focal_pass.choice)
    monkeypatch.setattr(workspace, "triton_group", workspace.triton_group)
    with_triton.choose_plan(groups=groups, vectors=vectors)
    inputs = testing.detection_inputs(
        seed=groups, images=2, classes=8, per_location=1, levels=((23, 89), (3, 5)), positive_share=0.002,
        ignored_share=0.002, dtype=torch.bfloat16 if groups == 3 else torch.float32,
    )  # fmt: skip
    check_detection(inputs.in_layout(layout))


@pytest.mark.parametrize("layout, share, factors", (("flat", 0.5, (1.0, 2.0)), ("nchw", 0.9, (2.0, 1.0))))
def test_tiles_of_positives(monkeypatch, layout, share, factors):
    """Lists that are gone through in several steps, of the last tile, and tiles with no room for one (0.9)."""
    monkeypatch.setattr(positives, "TILE", 1024)
    monkeypatch.setattr(workspace, "_TRITON_ANCHORS", 1024)
    inputs = testing.detection_inputs(
        images=1,
        classes=2,
        per_location=2,
        levels=((20, 30), (3, 5)),
        layout=layout,
        positive_share=share,
        ignored_share=0.08,
    )
    assert inputs.level_sizes[0] > positives.TILE > inputs.level_sizes[1]
    check_detection(inputs, factors)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_rows_of_too_many_logits_are_cut(monkeypatch, layout):
    """They are counted in 32 bits: of 2^30 and more a level becomes several."""
    monkeypatch.setattr(focal_pass, "RUN", 2048)
    cuts = []
    parts = focal_pass.DenseLevel.parts
    monkeypatch.setattr(
        focal_pass.DenseLevel,
        "parts",
        lambda level, classes: cuts.append([part.rows for part in parts(level, classes)]) or parts(level, classes),
    )
    inputs = testing.detection_inputs(
        seed=8, images=2, classes=3, per_location=1, levels=((25, 46), (2, 3)), positive_share=0.02, ignored_share=0.02
    )
    check_detection(inputs.in_layout(layout))
    uncut = {"flat": [[1024, 132]], "channels_last": [[1024, 126], [6]], "nchw": [[1150], [6]]}[layout]
    assert uncut == cuts[: len(uncut)]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("classes", (1, 2, 3, 20, 37, 61, 80, 81, 601, 1203))
def test_programs_of_a_pass(dtype, classes):
    """Periods are whole vectors, and there is room for the loss of every program, whatever the sizes of the maps."""
    sizes = [(h, w) for h in (320, 416, 512, 600, 640, 800) for w in (333, 512, 640, 1000, 1216, 1333)]
    x = torch.empty(1, dtype=dtype)
    for i, ((height, width), anchors) in enumerate(itertools.product(sizes, (1, 3, 9))):
        strides, images = ((8, 16, 32, 64, 128), (4, 8), (16,))[i % 3], (1, 2, 16, 32)[i % 4]
        levels, first = [], 0
        for stride in strides:
            locations = -(-height // stride) * -(-width // stride)
            rows, step = locations * anchors, locations * anchors * classes
            levels.append(focal_pass.DenseLevel(x, None, 0, step, rows, first, i % 5 != 0, locations, anchors))
            first += rows
        dense = focal_pass.DensePass(None, None, levels, images, classes, first, 2.0)
        tiles = 0
        for vector, together in dense.groups():
            plan = dense.plan(vector, together)
            tiles += plan["tiles"]
            for level in together if plan["consts"]["PLANES"] else ():
                group = plan["consts"]["THREADS"] * plan["consts"]["UNROLL"]
                period = focal_pass.period_of(level.locations, classes, vector, group, plan["loop"])
                vectors = period * level.locations / vector
                assert classes % period == 0 and vectors == int(vectors)
        logits = images * first * classes
        room = workspace.triton_tiles(logits, images * (2 * len(levels) + len(levels) * anchors * (classes + 1)))
        assert tiles <= room <= logits // 128 + 4 * images * len(levels) * anchors * (classes + 1)


def test_periods_are_whole_vectors_that_fill_their_groups():
    """Classes of a period for the maps of an 800 x 1333 image, for vectors of 4 and 8 logits."""
    for locations, vector, loop in itertools.product((16700, 4200, 1050, 273, 77, 8), (4, 8), (1, 16)):
        classes = focal_pass.period_of(locations, 80, vector, 64, loop)
        vectors = classes * locations / vector
        assert 80 % classes == 0 and vectors == int(vectors)
        # All 80 planes of 8 locations are but one to three groups.
        assert vectors > (0.75 if locations > 8 else 0.6) * 64 * -(-vectors // 64)
    assert focal_pass.period_of(16700, 80, 4, 64, 16) == 1 and focal_pass.period_of(16700, 80, 8, 64, 16) == 2
    # 525 vectors fill 82 % of their groups; all planes of a prime number of classes would be a program of one group.
    assert focal_pass.period_of(1050, 61, 2, 128, 16) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("layout", ("nchw", "channels_last"))
def test_a_single_class(layout, dtype):
    """Planes of one class are rows of one logit, of any alignment."""
    inputs = testing.detection_inputs(
        seed=11, images=2, classes=1, per_location=3, levels=((9, 7), (3, 5)), dtype=dtype, ignored_share=0.2
    )
    check_detection(inputs.in_layout(layout))


def test_images_without_boxes_compile_nothing_anew():
    """Integers of 32 and of 64 bits are variants of a kernel: an empty tensor's address, 0, must not look like one."""
    boxes, labels = [torch.zeros(0, 4), torch.zeros(2, 4)], [torch.zeros(0).long(), torch.zeros(2).long()]
    truth, _ = _launch.ground_truth(boxes, labels)
    # As GPU memory's addresses are; those of the others are the CPU's here, which may lie below.
    assert min(truth.boxes[0], truth.labels[0]) > 2**32


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_anchors_per_image_and_mixed_dtypes(layout):
    inputs = testing.detection_inputs(seed=4, images=2, classes=3, shared_anchors=False, layout=layout)
    logits = inputs.cls_logits
    inputs.cls_logits = logits.bfloat16() if layout == "flat" else [t.bfloat16() for t in logits]
    check_detection(inputs)


def test_mixed_layouts_of_levels():
    inputs = testing.detection_inputs(seed=5, images=2, classes=4, levels=((3, 4), (2, 3)), layout="nchw")
    other = testing.detection_inputs(seed=5, images=2, classes=4, levels=((3, 4), (2, 3)), layout="channels_last")
    inputs.cls_logits[1], inputs.bbox_deltas[0] = other.cls_logits[1], other.bbox_deltas[0]
    check_detection(inputs)


@pytest.mark.parametrize("layout, offset", list(itertools.product(("flat", "nchw"), (1, 2, 4))))
def test_addresses(layout, offset):
    """Off the multiples of 16 bytes: narrower accesses."""
    inputs = testing.detection_inputs(seed=5, images=2, classes=16, levels=((4, 8),), layout=layout)
    check_detection(inputs._map_heads(lambda t: testing.placed(t, offset)))


@pytest.mark.parametrize("layout", ("flat", "nchw"))
def test_a_gradient_lies_as_its_logits_do(monkeypatch, layout):
    monkeypatch.undo()  # without guards, whose memory lies alike already
    inputs = testing.detection_inputs(seed=5, images=2, classes=16, levels=((4, 8),), layout=layout)
    inputs = inputs._map_heads(lambda t: testing.placed(t, 1).requires_grad_())
    oracle = inputs.double().requiring_grad()
    sum(_triton(*inputs.arguments())[:2]).backward()
    sum(ik.iou_balanced_detection_loss(*oracle.arguments(), backend="reference")[:2]).backward()
    for i, (x, want) in enumerate(zip(inputs.heads(), oracle.heads(), strict=True)):
        testing.assert_close_budget(x.grad, want.grad, torch.float32)
        assert x.grad.data_ptr() % 16 == (4 if i < len(inputs.heads()) // 2 else 0)


@pytest.mark.parametrize("layout", ("flat", "channels_last"))
def test_what_is_saved_may_be_kept_elsewhere(layout):
    inputs = testing.detection_inputs(
        seed=3, images=1, classes=3, per_location=2, levels=((3, 2),), positive_share=0.3, layout=layout
    )
    inputs = inputs._map_heads(lambda t: testing.placed(t, 1).requires_grad_())
    testing.check_saved_elsewhere(lambda: sum(_triton(*inputs.arguments())[:2]), inputs.heads())


def test_degenerate_boxes_count_without_localisation():
    inputs = testing.detection_inputs(seed=2, images=2, positive_share=0.5)
    inputs.gt_boxes[0][0, 2] = inputs.gt_boxes[0][0, 0]
    inputs.anchors[3, 3] = inputs.anchors[3, 1] - 1
    check_detection(inputs)


@pytest.mark.parametrize("shape", ("no images", "no anchors", "no boxes"))
def test_nothing_there(shape):
    images = 0 if shape == "no images" else 2
    levels = ((0, 4), (0, 1)) if shape == "no anchors" else ((2, 3),)
    inputs = testing.detection_inputs(images=images, levels=levels, positive_share=0.0)
    if shape == "no boxes":
        inputs.gt_boxes = [torch.zeros(0, 4) for _ in range(images)]
        inputs.gt_labels = [torch.zeros(0, dtype=torch.int64) for _ in range(images)]
    check_detection(inputs)


def test_a_level_without_locations():
    inputs = testing.detection_inputs(images=2, levels=((2, 3), (0, 2), (1, 2)), layout="nchw")
    check_detection(inputs, normalizer_scope="level")


@pytest.mark.parametrize("layout", ("flat", "nchw"))
def test_bitwise_repeatable(layout):
    inputs = testing.detection_inputs(seed=9, images=2, classes=5, layout=layout, positive_share=0.4)
    (a, b) = (testing.loss_and_gradient(_triton, inputs) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip([*a[0], *a[1]], [*b[0], *b[1]]))


def _triton(*args, **options):
    import ioubal_kernels as ik

    return ik.iou_balanced_detection_loss(*args, backend="triton", **options)
