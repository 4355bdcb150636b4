"""What the launchers of the CUDA kernels promise beyond values: backward passes, launches, order, process groups."""

import cases
import pytest
import torch

import ioubal_kernels as ik
from ioubal_kernels import distributed, functional, functional_detection, testing
from ioubal_kernels.ops import detection, workspace

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = float("inf"), float("nan")


def name_of(value):
    return str(value).replace("torch.", "") if isinstance(value, torch.dtype) else None


def detection_loss(inputs, **options):
    return ik.iou_balanced_detection_loss(*inputs.arguments(), backend="cpu", **options)


@pytest.fixture
def group(monkeypatch):
    """A group whose sums are three times this rank's, of two ranks."""
    for module in (functional, functional_detection):
        monkeypatch.setattr(module, "resolve_process_group", lambda op, group: group)
    monkeypatch.setattr(distributed, "world_size", lambda group: 1 if group is None else 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: tensor.mul_(3))
    return object()


# ---------------------------------------------------------------------------------------------- backward


@pytest.mark.parametrize(
    "factors", ((1.0, 1.0), (0.5, 1.0), (1.0, 0.0), (-2.0, 3.0), (0.0, 0.0), (1e-25, 1e20)), ids=str
)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_any_grad_output(dtype, layout, factors):
    """Gradients of the forward that are right stay; others are computed anew, by a small grid that loops over tiles."""
    inputs = testing.detection_inputs(
        seed=2, classes=20, per_location=9, levels=((9, 11), (4, 4)), layout=layout, dtype=dtype
    )
    cases.check_detection(inputs, factors)
    cases.check_detection(inputs, factors, grad_scale=torch.tensor(0.5))


@pytest.mark.parametrize("value", (INF, -INF, NAN))
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_a_grad_output_that_is_not_finite(layout, value):
    """inf and NaN reach every entry that counts; an ignored anchor keeps its 0."""
    inputs = testing.detection_inputs(seed=4, classes=5, layout=layout)
    used = inputs.requiring_grad()
    out = detection_loss(used)
    (out.classification * value + out.localization * value).backward()
    heads = [t.grad for t in used.heads()]
    half = len(heads) // 2
    logits, deltas = (testing.from_levels(t, 2) if layout != "flat" else t[0] for t in (heads[:half], heads[half:]))
    counts = inputs.matched_idxs != testing.IGNORE
    assert bool((logits[counts].isnan() if value != value else ~logits[counts].isfinite()).all())
    assert bool((logits[~counts] == 0).all())
    assert bool((deltas[inputs.matched_idxs < 0] == 0).all())
    assert not deltas[inputs.matched_idxs >= 0].isfinite().all()


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_several_backwards(layout):
    """retain_graph: the first backward takes the forward's buffers, later ones compute into fresh memory."""
    used = testing.detection_inputs(seed=8, classes=17, layout=layout).requiring_grad()
    out = detection_loss(used)
    total = out.classification + out.localization
    once = torch.autograd.grad(total, used.heads(), retain_graph=True)
    for factor in (1.0, 2.0, 1.0):
        again = torch.autograd.grad(total * factor, used.heads(), retain_graph=True)
        for a, b in zip(again, once, strict=True):
            torch.testing.assert_close(a, factor * b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_one_loss_alone(layout):
    """One of two losses used, in either order: each gradient is as with both."""
    inputs = testing.detection_inputs(seed=9, classes=5, layout=layout)
    both = inputs.requiring_grad()
    out = detection_loss(both)
    (out.classification + 3 * out.localization).backward()
    for first in ("classification", "localization"):
        used = inputs.requiring_grad()
        out = detection_loss(used)
        half = len(used.heads()) // 2
        for name in (first, "localization" if first == "classification" else "classification"):
            (getattr(out, name) * (3 if name == "localization" else 1)).backward(retain_graph=True)
            mine = used.heads()[:half] if name == "classification" else used.heads()[half:]
            assert all(t.grad is not None for t in mine)
        for a, b in zip(used.heads(), both.heads(), strict=True):
            assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_one_head_without_gradient(layout):
    """Logits or deltas that need no gradient: the loss stays, and the other's gradient."""
    inputs = testing.detection_inputs(seed=10, classes=5, layout=layout)
    both = inputs.requiring_grad()
    want = detection_loss(both)
    (want.classification + want.localization).backward()
    half = len(both.heads()) // 2
    for wants in ((True, False), (False, True)):
        used = inputs.requiring_grad()
        for i, head in enumerate(used.heads()):
            head.requires_grad_(wants[i >= half])
        out = detection_loss(used)
        assert torch.equal(out.classification, want.classification) and torch.equal(out.localization, want.localization)
        (out.classification + out.localization).backward()
        for i, (a, b) in enumerate(zip(used.heads(), both.heads(), strict=True)):
            assert torch.equal(a.grad, b.grad) if wants[i >= half] else a.grad is None


@pytest.mark.parametrize("rows", (9, 700))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_flat_losses_again(rows, reduction):
    """The same for the losses over rows, over one tile and over more than the small grid has blocks."""
    c = testing.classification_inputs(seed=1, rows=rows, classes=6, softmax=True)
    pred, target = testing.delta_inputs(seed=1, rows=rows)
    for function, x, rest, _ in (
        (ik.iou_balanced_sigmoid_focal_loss, c.logits, (c.labels, c.iou), 4),
        (ik.iou_balanced_cross_entropy, c.logits, (c.labels, c.iou), 3),
        (ik.iou_balanced_smooth_l1_loss, pred, (target,), 3),
    ):
        x = x.clone().requires_grad_()
        loss = function(x, *rest, reduction=reduction, backend="cpu")
        g = torch.linspace(0.5, 2, loss.numel()).reshape(loss.shape)
        once = torch.autograd.grad(loss, x, g, retain_graph=True)[0]
        for factor in (1.0, 0.25, 2.0):
            again = torch.autograd.grad(loss, x, g * factor, retain_graph=True)[0]
            torch.testing.assert_close(again, factor * once, rtol=1e-6, atol=0)
        oracle = x.detach().double().requires_grad_()
        want = function(oracle, *rest, reduction=reduction, backend="reference")
        want = torch.autograd.grad(want, oracle, g.double())[0]
        testing.assert_close_budget(once, want, torch.float32, what=function.__name__)


@pytest.mark.parametrize("offset", (0, 1, 3))
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_what_is_saved_may_be_kept_elsewhere(layout, offset):
    """The backward's strips and words of bits are those of the forward, whose logits may lie otherwise."""
    inputs = testing.detection_inputs(
        seed=3, classes=5, per_location=3, levels=((6, 10),), positive_share=0.2, layout=layout
    )
    inputs = inputs._map_heads(lambda t: cases.placed(t, offset).requires_grad_())
    testing.check_saved_elsewhere(lambda: sum(detection_loss(inputs)[:2]), inputs.heads())


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("offset", (1, 3))
def test_what_is_saved_of_rows_may_be_kept_elsewhere(offset, reduction):
    """As many logits as fill groups of strips, a positive at the end of each 128: moved, they lie in other strips."""
    rows, classes = 1024, 8
    labels = torch.full((rows,), -1)
    own = torch.arange(127, rows * classes, 128)
    labels[own // classes] = own % classes
    x = cases.placed(torch.randn(rows, classes, generator=torch.Generator().manual_seed(1)), offset)
    x.requires_grad_()
    iou = torch.linspace(0.1, 1, rows)
    testing.check_saved_elsewhere(
        lambda: ik.iou_balanced_sigmoid_focal_loss(x, labels, iou, reduction=reduction, backend="cpu"), [x]
    )


# ---------------------------------------------------------------------------------------------- launches and order


def test_launches(kernels):
    """Forward: positives, coefficients, one pass, the sum of its losses. Backward: one launch, whatever grad_output."""

    def count(function):
        before = kernels.launches
        result = function()
        return kernels.launches - before, result

    for layout in testing.LAYOUTS:
        used = testing.detection_inputs(classes=5, layout=layout).requiring_grad()
        for factor in (1.0, 2.0):
            forward, out = count(lambda used=used: detection_loss(used))
            total = (out.classification + out.localization) * factor
            backward, _ = count(total.backward)
            assert (forward, backward) == (4, 1)
    mixed = testing.detection_inputs(classes=5, layout="nchw").requiring_grad()
    mixed.cls_logits[0] = mixed.cls_logits[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    forward, out = count(lambda: detection_loss(mixed))
    backward, _ = count((out.classification + 2 * out.localization).backward)
    assert (forward, backward) == (4, 1)
    c = testing.classification_inputs(classes=5, softmax=True)
    pred, target = testing.delta_inputs()
    for function, x, rest, launches in (
        (ik.iou_balanced_sigmoid_focal_loss, c.logits, (c.labels, c.iou), 4),
        (ik.iou_balanced_cross_entropy, c.logits, (c.labels, c.iou), 3),
        (ik.iou_balanced_smooth_l1_loss, pred, (target,), 3),
    ):
        x = x.clone().requires_grad_()
        forward, loss = count(lambda f=function, x=x, rest=rest: f(x, *rest, backend="cpu"))
        backward, _ = count((loss * 2).backward)
        assert (forward, backward) == (launches, 1)


def everything():
    """Losses and gradients of every op, several tiles each, as one list."""
    results = []
    for layout in testing.LAYOUTS:
        inputs = testing.detection_inputs(
            seed=5, classes=20, per_location=3, levels=((13, 11), (5, 4)), layout=layout
        ).requiring_grad()
        out = detection_loss(inputs, normalize_loc=True, eta=1.5, lambda_=0.5)
        (2 * out.classification + out.localization).backward()
        results += [*(t.detach() for t in out), *(t.grad for t in inputs.heads())]
    c = testing.classification_inputs(seed=6, rows=1500, classes=9, softmax=True)
    for loss in (ik.iou_balanced_sigmoid_focal_loss, ik.iou_balanced_cross_entropy):
        x = c.logits.clone().requires_grad_()
        value = loss(x, c.labels, c.iou, weight=c.weight, scope_ids=c.scope_ids, num_scopes=3, backend="cpu")
        value.backward()
        results += [value.detach(), x.grad]
    pred, target = testing.delta_inputs(seed=7, rows=700)
    pred.requires_grad_()
    value = ik.iou_balanced_smooth_l1_loss(pred, target, normalize=True, backend="cpu")
    value.backward()
    return [*results, value.detach(), pred.grad]


def test_bitwise_the_same_in_any_order_of_threads(kernels):
    """Sums have a fixed order: twice the same seed, then other orders of blocks, warps and lanes, give equal bits."""
    kernels.seed(0)
    want = everything()
    for seed in (0, 1, 2, 3, 4):
        kernels.seed(seed)
        assert all(torch.equal(a, b) for a, b in zip(everything(), want, strict=True)), f"seed {seed}"


# ---------------------------------------------------------------------------------------------- sums and weights

EXPONENTS = ((0.0, 0.0), (0.0, 1.5), (1.5, 0.0), (2.0, 2.0), (1.0, 2.5))


@pytest.mark.parametrize("exponents", EXPONENTS, ids=str)
@pytest.mark.parametrize("normalize_loc", (False, True))
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_exponents_with_degenerate_boxes(layout, normalize_loc, exponents):
    """eta and lambda equal, different and 0; a positive without area has IoU 0 and no localisation loss, 0^0 or not."""
    inputs = testing.detection_inputs(seed=12, images=3, classes=4, layout=layout, positive_share=0.5)
    positives = [int(i) for i in (inputs.matched_idxs[0] >= 0).nonzero()[:4]]
    inputs.anchors[positives[0], 2] = inputs.anchors[positives[0], 0]
    inputs.anchors[positives[1], 3] = inputs.anchors[positives[1], 1] - 5
    inputs.gt_boxes[1][0, 2:] = inputs.gt_boxes[1][0, :2]
    eta, lambda_ = exponents
    cases.check_detection(inputs, eta=eta, lambda_=lambda_, normalize_loc=normalize_loc, normalizer_scope="image")


@pytest.mark.parametrize("scope", ("batch", "level", "image"))
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_sums_of_a_process_group(group, layout, scope):
    """The sums' kernel, then the pass with the group's sums instead of its own."""
    inputs = testing.detection_inputs(seed=13, images=3, classes=4, layout=layout)
    options = {"anchors_per_level": inputs.level_sizes} if layout == "flat" else {}
    cases.check_detection(
        inputs, process_group=group, normalizer_scope=scope, eps=0.5, normalize_loc=True, w_loc=2.0, **options
    )


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_flat_sums_of_a_process_group(group, reduction):
    """Likewise for the losses over rows."""
    c = testing.classification_inputs(seed=14, rows=300, classes=7, softmax=True)
    pred, target = testing.delta_inputs(seed=14, rows=300)
    options = {"process_group": group, "reduction": reduction, "eps": 0.5}
    scopes = {"scope_ids": c.scope_ids, "num_scopes": 3}
    cases.check_focal(c.logits, c, **options, **scopes)
    cases.check_cross_entropy(c.logits, c, **options, **scopes)
    cases.check_flat(ik.iou_balanced_smooth_l1_loss, pred, target, **options, normalize=True)


@pytest.mark.parametrize("images", (64, 65, 130))
def test_many_images_with_listed_boxes(images):
    """A launch takes the boxes of 64 images by pointer; more are padded."""
    inputs = testing.detection_inputs(seed=15, images=images, classes=3, per_location=1, levels=((3, 3),), max_boxes=3)
    inputs.gt_boxes[images - 1], inputs.gt_labels[images - 1] = torch.empty(0, 4), torch.empty(0, dtype=torch.int64)
    inputs.matched_idxs[images - 1].clamp_(max=-1)
    cases.check_detection(inputs, normalizer_scope="image")


def test_ground_truth_of_several_dtypes():
    """Boxes, labels, anchors and indices may each have a dtype of their own."""
    inputs = testing.detection_inputs(seed=16, images=3, classes=3, shared_anchors=False)
    for wide, narrow in ((torch.float64, torch.int32), (torch.float32, torch.int64)):
        inputs.gt_boxes = [b.to(wide) for b in inputs.gt_boxes]
        inputs.gt_labels = [t.to(narrow) for t in inputs.gt_labels]
        inputs.matched_idxs = inputs.matched_idxs.to(torch.int32 if narrow is torch.int64 else torch.int64)
        cases.check_detection(inputs)
        cases.check_detection(inputs.padded())
    inputs.anchors = inputs.anchors.half()
    cases.check_detection(inputs)


def test_lists_of_several_dtypes_become_one():
    """What the kernels take in their parameters has one dtype and at most 64 entries."""
    boxes = [torch.ones(i % 3, 4, dtype=torch.float32 if i % 2 else torch.float16) for i in range(5)]
    labels = [torch.zeros(i % 3, dtype=torch.int32 if i % 2 else torch.int64) for i in range(5)]
    same, classes = detection._few_tensors(boxes, labels)
    assert {b.dtype for b in same} == {torch.float64} and {t.dtype for t in classes} == {torch.int64}
    (padded,), (classes,) = detection._few_tensors(boxes * 13, labels * 13)
    assert padded.shape == (65, 2, 4) and classes.shape == (65, 2) and int((classes == -1).sum()) == 65 * 2 - 13 * 4


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_anchors_of_each_image(layout):
    """Anchors (N, R, 4) of three images over two levels."""
    inputs = testing.detection_inputs(seed=17, images=3, classes=3, shared_anchors=False, layout=layout)
    cases.check_detection(inputs, normalize_loc=True)


def test_a_workspace_that_is_too_small_is_refused(monkeypatch):
    """The launchers check every piece that they take."""
    inputs = testing.detection_inputs()
    whole = workspace._tensor
    monkeypatch.setattr(workspace, "_tensor", lambda *size: [whole(*size)[0][:20].clone()])
    with pytest.raises(RuntimeError, match="workspace is too small"):
        detection_loss(inputs)
    monkeypatch.setattr(workspace, "_tensor", lambda *size: [])
    with pytest.raises(RuntimeError, match="need a workspace"):
        detection_loss(inputs)
