"""The modules: same results as the functions, keyword arguments kept through pickle, deepcopy and printing."""

import copy
import dataclasses
import io
import pickle

import numpy as np
import pytest
import torch

import ioubal_kernels as ik
from ioubal_kernels import testing

MODULES = [
    ik.IoUBalancedLoss,
    ik.IoUBalancedSigmoidFocalLoss,
    ik.IoUBalancedBinaryCrossEntropy,
    ik.IoUBalancedCrossEntropy,
    ik.IoUBalancedSmoothL1Loss,
    ik.RetinaNetLoss,
]


def retinanet_arguments(d: testing.DetectionInputs) -> tuple:
    return d.cls_logits, d.bbox_deltas, d.anchors, d.gt_boxes, d.gt_labels


def arguments(module: type) -> tuple:
    if module is ik.IoUBalancedLoss:
        return testing.detection_inputs(0).arguments()
    if module is ik.RetinaNetLoss:
        return retinanet_arguments(testing.detection_inputs(0))
    if module is ik.IoUBalancedSmoothL1Loss:
        return testing.delta_inputs(0)
    c = testing.classification_inputs(0, softmax=module is ik.IoUBalancedCrossEntropy)
    return c.logits, c.labels, c.iou


def losses(result: torch.Tensor | ik.DetectionLoss) -> list[float]:
    return [t.item() for t in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.parametrize("module", MODULES)
def test_equals_the_function_and_survives_copies(module: type, backend: str) -> None:
    keywords = {"eps": 1e-3, "backend": backend, "avg_factor": 7.0}
    loss = module(**keywords)
    want = losses(module._function(*arguments(module), **keywords))
    buffer = io.BytesIO()
    torch.save(loss, buffer)
    buffer.seek(0)
    for other in (
        loss,
        copy.deepcopy(loss),
        pickle.loads(pickle.dumps(loss)),
        torch.load(buffer, weights_only=False),
    ):
        assert losses(other(*arguments(module))) == want
        assert other.state_dict() == {}
        assert other.keywords == loss.keywords


@pytest.mark.parametrize("module", MODULES)
def test_call_overrides(module: type) -> None:
    loss = module(avg_factor=7.0, backend="reference")
    seven, one = losses(loss(*arguments(module)))[0], losses(loss(*arguments(module), avg_factor=1.0))[0]
    assert one == pytest.approx(7 * seven)


@pytest.mark.parametrize("module", MODULES)
def test_keywords_are_attributes(module: type) -> None:
    """A schedule writes them before a step."""
    loss = module(backend="reference")
    before = losses(loss(*arguments(module)))[0]
    loss.avg_factor = 1e9
    assert loss.keywords["avg_factor"] == loss.avg_factor == 1e9 and "avg_factor" not in vars(loss)
    assert losses(loss(*arguments(module)))[0] < before
    assert losses(copy.deepcopy(loss)(*arguments(module))) == losses(loss(*arguments(module)))
    with pytest.raises(AttributeError, match="etta"):
        loss.etta  # noqa: B018


def test_repr_of_arrays() -> None:
    assert "box_weights=array(" in repr(ik.IoUBalancedLoss(box_weights=np.ones(4)))
    assert "grad_scale=tensor(" in repr(ik.IoUBalancedLoss(grad_scale=torch.tensor([1.0, 2.0])))


def test_repr_shows_what_was_changed() -> None:
    assert repr(ik.IoUBalancedLoss()) == "IoUBalancedLoss()"
    text = repr(ik.IoUBalancedLoss(eta=1.0, process_group="world"))
    assert text == "IoUBalancedLoss(eta=1.0, process_group='world')"


def test_world_is_resolved_at_the_call() -> None:
    loss = pickle.loads(pickle.dumps(ik.IoUBalancedSigmoidFocalLoss(process_group="world")))
    assert loss.keywords["process_group"] == "world"
    with pytest.raises(ValueError, match="init_process_group"):
        loss(*arguments(ik.IoUBalancedSigmoidFocalLoss))


def test_weight_and_scopes_are_arguments_of_the_call() -> None:
    c = testing.classification_inputs(0)
    loss = ik.IoUBalancedSigmoidFocalLoss(num_scopes=3, backend="reference")
    got = loss(c.logits, c.labels, c.iou, weight=c.weight, scope_ids=c.scope_ids)
    want = ik.iou_balanced_sigmoid_focal_loss(
        c.logits, c.labels, c.iou, weight=c.weight, scope_ids=c.scope_ids, num_scopes=3, backend="reference"
    )
    assert got == want


def test_drop_in_for_torchs_smooth_l1(backend: str) -> None:
    pred, target = testing.delta_inputs(1)
    loss = ik.IoUBalancedSmoothL1Loss(lambda_=0.0, beta=1.0, reduction="sum", backend=backend)
    torch.testing.assert_close(loss(pred, target), torch.nn.SmoothL1Loss(reduction="sum")(pred, target))


@pytest.mark.parametrize("gt", ["list", "padded"])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_retinanet_loss_is_matching_and_the_fused_loss(layout: str, gt: str, backend: str) -> None:
    matching = {"high": 0.45, "low": 0.2, "allow_low_quality": False, "force_best": True}
    options = {"eta": 1.0, "normalizer_scope": "image", "backend": backend}
    d = testing.detection_inputs(3, layout=layout, gt=gt)
    loss = ik.RetinaNetLoss(**matching, **options)
    matched = ik.match_anchors(d.anchors, d.gt_boxes, gt_labels=d.gt_labels, **matching, backend=backend)
    assert 0 < int((matched >= 0).sum()) < matched.numel() and bool((matched == -2).any())
    want, want_grads = testing.loss_and_gradient(
        ik.iou_balanced_detection_loss, dataclasses.replace(d, matched_idxs=matched), **options
    )
    leaves = d.requiring_grad()
    got = loss(*retinanet_arguments(leaves), avg_factor=None)
    grads = torch.autograd.grad(got[0] + got[1], leaves.heads())
    assert losses(got) == losses(want)
    assert all(torch.equal(a, b) for a, b in zip(grads, want_grads, strict=True))


def test_retinanet_loss_knows_its_keywords() -> None:
    assert repr(ik.RetinaNetLoss()) == "RetinaNetLoss()"
    assert repr(ik.RetinaNetLoss(high=0.6, eta=1.0)) == "RetinaNetLoss(eta=1.0, high=0.6)"
    with pytest.raises(TypeError, match="unexpected keyword argument 'dtype'"):
        ik.RetinaNetLoss(dtype=torch.int64)
    with pytest.raises(ValueError, match="match_anchors: low must be at most high"):
        ik.RetinaNetLoss(low=0.7)(*arguments(ik.RetinaNetLoss))


def test_retinanet_loss_ignores_places_labelled_minus_one(backend: str) -> None:
    d = testing.detection_inputs(4, gt="padded")
    want = losses(ik.RetinaNetLoss(backend=backend)(*retinanet_arguments(d)))
    d.gt_boxes = torch.where(d.gt_boxes.isnan(), d.anchors[0], d.gt_boxes)
    assert losses(ik.RetinaNetLoss(backend=backend)(*retinanet_arguments(d))) == want


@pytest.mark.parametrize("gt", ("padded", "list"))
def test_retinanet_loss_of_too_many_images(gt: str) -> None:
    d = testing.detection_inputs(4, gt=gt)
    if gt == "list":
        d.gt_boxes, d.gt_labels = [*d.gt_boxes, d.gt_boxes[0]], [*d.gt_labels, d.gt_labels[0]]
    else:
        d.gt_boxes, d.gt_labels = d.gt_boxes.repeat(2, 1, 1), d.gt_labels.repeat(2, 1)
    with pytest.raises(ValueError, match=r"RetinaNetLoss: gt_boxes must hold the boxes of \d images.*, got \d"):
        ik.RetinaNetLoss()(*retinanet_arguments(d))


@pytest.mark.parametrize("bad", (None, 3.0))
def test_retinanet_loss_of_what_are_no_logits(bad: object) -> None:
    d = testing.detection_inputs(4)
    with pytest.raises(TypeError, match="iou_balanced_detection_loss: cls_logits must be a tensor"):
        ik.RetinaNetLoss()(bad, *retinanet_arguments(d)[1:])


def test_retinanet_loss_of_boxes_without_a_shape() -> None:
    d = testing.detection_inputs(4)
    d.gt_boxes = torch.tensor(1.0)
    with pytest.raises(ValueError, match="match_anchors: gt_boxes"):
        ik.RetinaNetLoss()(*retinanet_arguments(d))
