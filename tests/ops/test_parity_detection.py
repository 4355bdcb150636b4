"""The fused detection loss against the float64 oracle, every element of both gradients: the cpu backend, and the CUDA
kernels over emulated threads."""

import pytest
import torch

import ioubal_kernels as ik
from ioubal_kernels import testing
from ioubal_kernels.ops import library

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ODD_LEVELS = ((9, 13), (4, 7), (3, 3), (1, 2), (1, 1))


def ids(value):
    return str(value).replace("torch.", "") if isinstance(value, torch.dtype) else None


def run(inputs, backend, *, loc_factor=2.0, **options):
    inputs = inputs.requiring_grad()
    out = ik.iou_balanced_detection_loss(*inputs.arguments(), backend=backend, **options)
    (out.classification + loc_factor * out.localization).backward()
    return out, inputs


def as_flat(inputs, tensors):
    return tensors[0] if len(tensors) == 1 else testing.from_levels(tensors, inputs.per_location)


def grads(inputs):
    heads = inputs.heads()
    half = len(heads) // 2
    for head in heads:
        assert head.grad.dtype == head.dtype and head.grad.stride() == head.stride()
    return as_flat(inputs, [t.grad for t in heads[:half]]), as_flat(inputs, [t.grad for t in heads[half:]])


def compare(flat, layout, *, padded=False, grad_scale=1.0, **options):
    """flat: inputs in flat layout; the oracle sees them in float64, the kernels in the wanted layout."""
    want, wide = run(flat.double(), "reference", **options)
    want_grads = grads(wide)
    dtype = flat.cls_logits.dtype
    budget = torch.float64 if dtype == torch.float64 else torch.float32
    tested = flat.padded() if padded else flat
    if layout != "flat":
        options.pop("anchors_per_level", None)
    for variant in library.cpu_variants(dtype):
        got, used = run(tested.in_layout(layout), "cpu", grad_scale=grad_scale, **options)
        for name in ("classification", "localization", "mean_iou"):
            kind_budget = torch.float32 if name == "mean_iou" else budget
            what = f"{layout}, {variant}: {name}"
            testing.assert_close_budget(getattr(got, name), getattr(want, name), kind_budget, "loss", what=what)
        assert got.num_positives.dtype == torch.int64 and got.num_positives == want.num_positives
        assert got.classification.dtype == budget and got.mean_iou.dtype == torch.float32
        for name, value, expected in zip(("logits", "deltas"), grads(used), want_grads, strict=True):
            floor = testing.FLOOR
            what = f"{layout}, {variant}: {name}"
            testing.assert_close_budget(value, expected, dtype, "gradient", floor, what=what)


@pytest.mark.parametrize("normalize_loc", (False, True), ids=("eq6", "eq7"))
@pytest.mark.parametrize("padded", (False, True), ids=("listed", "padded"))
@pytest.mark.parametrize("box_coder", ("delta", "fovea"))
@pytest.mark.parametrize("scope", ("batch", "level", "image"))
@pytest.mark.parametrize("gamma", (2.0, 1.5, 0.0))
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_detection(dtype, layout, gamma, scope, box_coder, padded, normalize_loc):
    flat = testing.detection_inputs(
        seed=7, images=2, classes=5, per_location=3, levels=ODD_LEVELS, box_coder=box_coder, dtype=dtype
    )
    compare(
        flat,
        layout,
        padded=padded,
        gamma=gamma,
        normalizer_scope=scope,
        box_coder=box_coder,
        normalize_loc=normalize_loc,
        anchors_per_level=flat.level_sizes,
        w_loc=3.049,
        eps=0.0 if normalize_loc else 1e-6,
    )


@pytest.mark.parametrize("share", (0.0, 0.01, 0.6))
@pytest.mark.parametrize("ignored", (0.0, 0.02, 0.4))
@pytest.mark.parametrize("classes, per_location", ((1, 1), (1, 9), (3, 1), (7, 2), (80, 9), (91, 3)))
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=ids)
def test_shapes_and_densities(dtype, layout, classes, per_location, ignored, share):
    """Class counts and anchors per location that leave vector tails everywhere, from no exceptional anchor to all."""
    flat = testing.detection_inputs(
        seed=3,
        images=3,
        classes=classes,
        per_location=per_location,
        levels=((13, 17), (5, 3), (1, 1)),
        positive_share=share,
        ignored_share=ignored,
        dtype=dtype,
    )
    compare(flat, layout, padded=True)


@pytest.mark.parametrize(
    "options",
    (
        {"avg_factor": 5.5},
        {"avg_factor": torch.tensor(7.0)},
        {"avg_factor": torch.tensor([3.0, 4.0, 5.0])},
        {"avg_factor": torch.tensor([3, 4, 5])},
        {"avg_factor": torch.tensor([3.0, 9, 4, 9, 5, 9])[::2]},
        {"avg_factor": (torch.tensor(3.0).expand(3), torch.tensor(6, dtype=torch.int32))},
        {"avg_factor": (torch.tensor([3.0, 4.0, 5.0]), 2.0)},
        {"grad_scale": 1024.0},
        {"grad_scale": torch.tensor(0.5)},
        {"cls_weight": 0.3, "w_loc": 0.0},
        {"alpha": None, "eta": 0.0, "lambda_": 0.0},
        {"beta": 0.0, "box_weights": (10.0, 10.0, 5.0, 5.0)},
        {"eta": 4.0, "lambda_": 0.5, "alpha": 1.0},
    ),
    ids=lambda o: ", ".join(o),
)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_parameters(dtype, layout, options):
    flat = testing.detection_inputs(seed=11, images=3, classes=4, dtype=dtype)
    compare(flat, layout, **options)


def test_retinanet_size():
    """More than one block per run: 9 anchors of 80 classes over 50 x 84 and 13 x 21 locations."""
    flat = testing.detection_inputs(
        seed=1,
        images=1,
        classes=80,
        per_location=9,
        levels=((50, 84), (13, 21)),
        positive_share=0.002,
        ignored_share=0.006,
    )
    for layout in testing.LAYOUTS:
        compare(flat, layout)


def test_layouts_agree_to_one_ulp():
    flat = testing.detection_inputs(seed=2, images=2, classes=80, per_location=9, levels=((20, 30), (7, 5)))
    _, used = run(flat, "cpu")
    base = grads(used)[0]
    for layout in ("nchw", "channels_last"):
        _, used = run(flat.in_layout(layout), "cpu")
        other = grads(used)[0]
        step = torch.nextafter(base.abs(), torch.tensor(torch.inf)) - base.abs()
        assert bool(((other - base).abs() <= step).all())


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_anchors_per_image_and_mixed_dtypes(layout):
    flat = testing.detection_inputs(seed=4, images=2, classes=3, shared_anchors=False)
    compare(flat, layout)
    half = flat.in_layout(layout)
    heads = half.cls_logits
    half.cls_logits = heads.bfloat16() if layout == "flat" else [t.bfloat16() for t in heads]
    out, used = run(half, "cpu")
    want, wide = run(half.double(), "reference")
    testing.assert_close_budget(out.classification, want.classification, torch.float32, "loss")
    for value, expected, dtype in zip(grads(used), grads(wide), (torch.bfloat16, torch.float32), strict=True):
        testing.assert_close_budget(value, expected, dtype, what=f"{layout}, bfloat16 logits with float32 deltas")
