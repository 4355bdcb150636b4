"""Values that no training step should hold, over the emulated CUDA kernels: they poison what they must, and no more."""

import cases
import pytest
import torch

import ioubal_kernels as ik
from ioubal_kernels import testing

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = float("inf"), float("nan")


def name_of(value):
    return str(value).replace("torch.", "") if isinstance(value, torch.dtype) else None


@pytest.fixture
def unchecked(monkeypatch):
    monkeypatch.setenv("IOUBAL_CHECK", "0")


@pytest.mark.parametrize("bad", (5, 99, -3, 2**31 - 1, -(2**31), 2**40, -(2**63)))
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_unchecked_matches(unchecked, layout, bad):
    """A matched index that is no box: both losses NaN, and the gradients of the others as if it were background."""
    inputs = testing.detection_inputs(seed=1, classes=4, max_boxes=4, layout=layout)
    at = int((inputs.matched_idxs[1] == -1).nonzero()[3])
    good = inputs.requiring_grad()
    out = ik.iou_balanced_detection_loss(*good.arguments(), backend="cpu")
    (out.classification + out.localization).backward()
    inputs.matched_idxs[1, at] = bad
    used = inputs.requiring_grad()
    out = ik.iou_balanced_detection_loss(*used.arguments(), backend="cpu")
    assert out.classification.isnan() and out.localization.isnan()
    (out.classification + out.localization).backward()
    for a, b in zip(used.heads(), good.heads(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("label", (-1, -2, 4, 2**31 - 1))
@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_unchecked_classes_of_boxes(unchecked, layout, padded, label):
    """A matched box whose class is none."""
    inputs = testing.detection_inputs(seed=2, classes=4, layout=layout, positive_share=0.5)
    image = 1
    box = int(inputs.matched_idxs[image].max())
    inputs.gt_labels[image][box] = label
    used = (inputs.padded() if padded else inputs).requiring_grad()
    out = ik.iou_balanced_detection_loss(*used.arguments(), backend="cpu")
    assert out.classification.isnan() and out.localization.isnan()
    (out.classification + out.localization).backward()
    assert all(bool(t.grad.isfinite().all()) for t in used.heads())


@pytest.mark.parametrize("bad", (7, 99, -3, 2**31 - 1, -(2**31), 2**40))
def test_unchecked_labels_and_scopes(unchecked, bad):
    """A label or scope that is none: the loss NaN; one by one, only that row."""
    inputs = testing.classification_inputs(seed=3, rows=600, classes=7, softmax=True)
    labels, scopes = inputs.labels.clone(), inputs.scope_ids.clone()
    labels[300] = bad
    scopes[300] = bad
    fine = {"scope_ids": inputs.scope_ids, "num_scopes": 3}
    for loss in (ik.iou_balanced_sigmoid_focal_loss, ik.iou_balanced_cross_entropy):
        given = (inputs.logits, inputs.labels.clamp(min=0), inputs.iou)
        assert loss(*given, scope_ids=scopes, num_scopes=3, backend="cpu").isnan()
        if loss is ik.iou_balanced_sigmoid_focal_loss or bad >= 0:  # softmax: every negative label is ignored
            assert loss(given[0], labels, given[2], **fine, backend="cpu").isnan()
            each = loss(given[0], labels, given[2], **fine, reduction="none", backend="cpu")
            rows = each.isnan().reshape(600, -1).any(1)
            assert bool(rows[300]) and int(rows.sum()) == 1
    pred, target = testing.delta_inputs(seed=3, rows=600)
    loss = ik.iou_balanced_smooth_l1_loss(pred, target, scope_ids=scopes, num_scopes=3, backend="cpu")
    assert loss.isnan()
    pred.requires_grad_()
    each = ik.iou_balanced_smooth_l1_loss(
        pred, target, scope_ids=scopes, num_scopes=3, reduction="none", normalize=True, backend="cpu"
    )
    assert each[300].isnan() and int(each.isnan().sum()) == 1


@pytest.mark.parametrize("value", (INF, -INF, NAN))
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_ignored_anchors_are_never_felt(dtype, layout, value):
    """Ignored anchors may hold anything, in the middle of vectors of others; so may the deltas of all but positives."""
    flat = testing.detection_inputs(
        seed=4, classes=5, per_location=3, levels=((8, 6), (3, 5)), dtype=dtype, ignored_share=0.4
    )
    flat.cls_logits[flat.matched_idxs == testing.IGNORE] = value
    flat.bbox_deltas[flat.matched_idxs < 0] = value
    cases.check_detection(flat.in_layout(layout))
    rows = testing.classification_inputs(seed=4, rows=90, classes=5, dtype=dtype, ignored_share=0.4)
    rows.logits[rows.labels == testing.IGNORE] = value
    cases.check_focal(rows.logits, rows)


@pytest.mark.parametrize("gamma", (0.0, 1.0, 2.0, 1.5))
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_extreme_logits(dtype, gamma):
    """Every logit at which a careless formula overflows or cancels, as positive and as negative, in every layout."""
    values = testing.extreme_logits(dtype)
    # Sums above 1e35 are not finite in float32: either all logits are far below, or infinite ones are among them.
    for keep in (values.abs() < 1e30, torch.ones_like(values, dtype=torch.bool)):
        x = values[keep]
        for label in (0, -1):
            inputs = testing.classification_inputs(rows=len(x), classes=1)
            inputs.labels, inputs.iou = torch.full((len(x),), label), torch.linspace(0, 1, len(x))
            for offset in (0, 1):
                cases.check_focal(cases.placed(x.reshape(-1, 1), offset), inputs, gamma=gamma)
        for layout in testing.LAYOUTS:
            flat = testing.detection_inputs(seed=6, images=1, classes=4, levels=((len(x) // 4, 4),), dtype=dtype)
            flat.cls_logits.copy_(
                x.repeat(flat.cls_logits.numel() // len(x) + 1)[: flat.cls_logits.numel()].view_as(flat.cls_logits)
            )
            cases.check_detection(flat.in_layout(layout), gamma=gamma)


@pytest.mark.parametrize("coder", ("delta", "fovea"))
@pytest.mark.parametrize("value", (INF, -INF))
def test_infinite_deltas(value, coder):
    """A centre infinitely far away has no overlap with its box; an infinite size is clamped."""
    for place in range(4):
        pred, target = testing.delta_inputs(3, rows=40)
        pred[3, place] = value
        want = ik.delta_iou(pred.double(), target.double(), box_coder=coder, backend="reference")
        testing.assert_close_budget(
            ik.delta_iou(pred, target, box_coder=coder, backend="cpu"), want, torch.float32, floor=1.0
        )


@pytest.mark.parametrize("classes", (5, 130))
def test_softmax_rows_with_infinite_logits(classes):
    """One +inf takes all, several share, -inf alone has no limit, NaN stays; rows in registers and rows read again."""
    inputs = testing.classification_inputs(seed=7, rows=12, classes=classes, softmax=True, ignored_share=0.0)
    x = inputs.logits
    inputs.labels[:8] = torch.tensor([1, 1, 2, 2, 3, 3, 0, 0])
    x[0, 1] = INF
    x[1, 2] = INF
    x[3, 0] = x[3, 4] = INF
    x[4] = -INF
    x[5, 1] = NAN
    x[6, 1:] = -INF
    x[7, 0] = -INF
    cases.check_cross_entropy(x, inputs, reduction="none", eta=0.0)
    x[2, 2] = x[2, 3] = INF  # the target among several: no limit, a NaN row
    leaf = x.clone().requires_grad_()
    loss = ik.iou_balanced_cross_entropy(leaf, inputs.labels, inputs.iou, reduction="none", backend="cpu")
    loss.sum().backward()
    assert bool(loss[2].isnan() & leaf.grad[2].isnan().all())
    cases.check_cross_entropy(x[[0, 6, 8, 9]], _some(inputs, [0, 6, 8, 9]))


def _some(inputs, rows):
    for name in ("labels", "iou", "weight", "scope_ids"):
        setattr(inputs, name, getattr(inputs, name)[rows])
    return inputs


def test_saturated_positives_beside_one_without_iou():
    """S / D would overflow float32: it is bounded."""
    for name, leaf, rest, options in testing.saturated_positives(60.0, 1e-18):
        leaf.requires_grad_()
        loss = getattr(ik, name)(leaf, *rest, **options, backend="cpu")
        loss.backward()
        assert loss.isfinite() and bool(leaf.grad.isfinite().all())


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_empty_inputs(layout):
    """No image, no box anywhere, no anchor in a level or in any: losses of 0, gradients of the right shape."""
    none = testing.detection_inputs(images=2, classes=3, layout=layout, positive_share=0.0)
    none.gt_boxes, none.gt_labels = [torch.empty(0, 4)] * 2, [torch.empty(0, dtype=torch.int64)] * 2
    for inputs in (none, none.padded(0)):
        out = cases.check_detection(inputs)
        assert out.localization == 0 and out.num_positives == 0 and out.mean_iou == 0
    for images, levels in ((0, ((2, 3),)), (2, ((0, 3), (2, 2))), (2, ((0, 0),))):
        flat = testing.detection_inputs(images=max(images, 1), classes=3, levels=[(max(h, 1), w) for h, w in levels])
        rows = sum(h * w for h, w in levels) * 2
        flat.levels = levels
        flat.cls_logits, flat.bbox_deltas = flat.cls_logits[:images, :rows], flat.bbox_deltas[:images, :rows]
        flat.anchors, flat.matched_idxs = flat.anchors[:rows], flat.matched_idxs[:images, :rows]
        flat.gt_boxes, flat.gt_labels = flat.gt_boxes[:images], flat.gt_labels[:images]
        shaped = flat.in_layout(layout) if layout != "flat" else flat
        for scope in ("batch", "image"):
            out = cases.check_detection(shaped, normalizer_scope=scope)
            assert out.classification.isfinite()


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_empty_rows(reduction):
    """Losses over no rows."""
    inputs = testing.classification_inputs(rows=0, classes=5, softmax=True)
    pred, target = testing.delta_inputs(rows=0)
    cases.check_focal(inputs.logits, inputs, reduction=reduction)
    cases.check_cross_entropy(inputs.logits, inputs, reduction=reduction)
    cases.check_flat(ik.iou_balanced_smooth_l1_loss, pred, target, reduction=reduction)
    with ik.use_backend("cpu"):
        assert ik.decode_boxes(pred, target).shape == ik.encode_boxes(pred, target).shape == (0, 4)
        assert ik.paired_box_iou(pred, target).shape == ik.delta_iou(pred, target).shape == (0,)
