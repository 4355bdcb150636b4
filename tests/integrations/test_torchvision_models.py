"""What convert must leave alone: state, evaluation, copies, subclasses; and the mistakes it refuses."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from small_models import CLASSES, FAMILIES, Backbone, assert_same, batch, make, step
from torch import nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead

import ioubal_kernels as ik

convert, revert = ik.integrations.torchvision.convert, ik.integrations.torchvision.revert


@pytest.mark.parametrize("family", FAMILIES)
def test_state_evaluation_and_revert(family):
    model, inputs = make(family), batch(family, empty=False)
    classes = {name: type(module) for name, module in model.named_modules()}
    attributes = set(model.__dict__)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    want = model(inputs[0])
    stock = step(copy.deepcopy(model), *inputs)
    assert convert(model) is model and isinstance(model, classes[""])
    assert list(model.state_dict()) == list(state)
    model.eval()
    for got, expected in zip(model(inputs[0]), want, strict=True):
        assert got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in expected)
    step(model, *inputs)
    model.load_state_dict(state)
    assert revert(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert set(model.__dict__) == attributes
    assert_same(step(model, *inputs), stock, rtol=1e-7)
    assert revert(model) is model


@pytest.mark.parametrize("family", ["retinanet", "ssd", "faster_rcnn"])
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_copies_compute_the_same(family, how):
    model, inputs = convert(make(family), **({"rpn": True} if family == "faster_rcnn" else {})), batch(family)
    want = step(model, *inputs)
    if how == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    elif how == "deepcopy":
        copied = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    assert type(copied) is type(model) and copied is not model
    state = {name: value.clone() for name, value in make(family).state_dict().items()}
    copied.load_state_dict(state)
    model.load_state_dict(state)
    assert_same(step(copied, *inputs), step(model, *inputs), rtol=1e-7)
    revert(copied)
    for own, other in zip(copied.modules(), make(family).modules(), strict=True):
        assert type(own) is type(other)
    assert any("IoUBalanced" in type(module).__name__ for module in model.modules())
    assert want[0].keys() == step(copied, *inputs)[0].keys()


class Louder(RetinaNet):
    """A user's subclass with something of its own."""

    def compute_loss(self, targets, head_outputs, anchors):
        raise AssertionError("the balanced loss stands in front of this one")

    def loudness(self) -> int:
        return 11


class CustomHead(RetinaNetHead):
    """A user's head, whose outputs must stay flat: its forward may do anything with them."""

    def forward(self, x):
        out = super().forward(x)
        assert all(isinstance(value, torch.Tensor) for value in out.values())
        return out


def test_subclasses_and_custom_heads():
    stock, inputs = make("retinanet"), batch("retinanet")
    want = step(convert(stock), *inputs)
    model = make("retinanet")
    model.__class__ = Louder
    model.head.__class__ = CustomHead
    with pytest.warns(UserWarning, match="Louder.compute_loss is not called any more"):
        convert(model)
    assert isinstance(model, Louder) and model.loudness() == 11
    assert_same(step(model, *inputs), want)
    assert pickle.loads(pickle.dumps(model)).loudness() == 11
    with pytest.raises(
        ValueError, match="normalizer_scope 'level' needs torchvision's own RetinaNetHead, got CustomHead"
    ):
        convert(model, normalizer_scope="level")
    assert type(revert(model)) is Louder


def test_a_custom_matcher_is_called():
    model, inputs = make("retinanet"), batch("retinanet")
    calls = []

    class Matcher(type(model.proposal_matcher)):
        def __call__(self, matrix):
            calls.append(tuple(matrix.shape))
            return super().__call__(matrix)

    want = step(convert(model), *inputs)
    model.proposal_matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
    assert_same(step(model, *inputs), want)
    assert [shape[0] for shape in calls] == [2, 3]


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("family", "options", "error", "message"),
    [
        ("retinanet", {"eta": -1.0}, ValueError, "convert: eta must"),
        ("retinanet", {"lambda_": "1"}, TypeError, "convert: lambda_ must"),
        ("retinanet", {"w_loc": float("nan")}, ValueError, "convert: w_loc must"),
        ("retinanet", {"beta": -0.1}, ValueError, "convert: beta must"),
        ("retinanet", {"divisor": "mean"}, ValueError, "convert: divisor must be one of 'torchvision', 'paper'"),
        ("retinanet", {"normalizer_scope": "images"}, ValueError, "convert: normalizer_scope must be one of"),
        ("retinanet", {"classification": 1}, TypeError, "convert: classification must"),
        ("retinanet", {"backend": "cudnn"}, ValueError, "convert: backend must be one of"),
        ("retinanet", {"rpn": True}, ValueError, "convert: rpn must be False for a model without proposals"),
        ("ssd", {"normalizer_scope": "level"}, ValueError, "must be 'batch' or 'image' for SSD"),
        ("faster_rcnn", {"normalizer_scope": "level"}, ValueError, "must be 'batch' or 'image' for R-CNN"),
        ("faster_rcnn", {"rpn_w_loc": -1.0}, ValueError, "convert: rpn_w_loc must"),
    ],
)
def test_bad_arguments_change_nothing(family, options, error, message):
    model = make(family)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        convert(model, **options)
    assert [type(module) for module in model.modules()] == kinds


def test_other_models_are_refused():
    fcos = FCOS(Backbone(32), CLASSES)
    with pytest.raises(
        TypeError, match="convert: model must be torchvision's RetinaNet, SSD, FasterRCNN.*got a .*FCOS"
    ):
        convert(fcos)
    with pytest.raises(TypeError, match="convert the model inside the wrapper: model.module"):
        convert(nn.DataParallel(make("retinanet")))
    with pytest.raises(TypeError, match="revert: model must be"):
        revert(nn.Linear(1, 1))


def test_a_label_out_of_range_is_an_error():
    """torchvision trains the last class with label -1 and dies of an IndexError beyond the classes."""
    model, (images, targets) = convert(make("retinanet")), batch("retinanet")
    targets[0]["labels"][0] = CLASSES
    with pytest.raises(ValueError, match="gt_labels"):
        model.train()(images, targets)


def test_a_negative_label_is_no_ignored_positive():
    model, (images, targets) = convert(make("ssd")), batch("ssd", empty=False)
    targets[1]["labels"][0] = -1
    with pytest.raises(ValueError, match=r"convert: targets\[1\]\['labels'\] must be classes, got -1"):
        model.train()(images, targets)


def test_no_proposals_at_all():
    """Of images without boxes, whose proposals all score too little: torchvision's losses are NaN."""
    model, (images, _) = convert(make("faster_rcnn")), batch("faster_rcnn")
    model.rpn.score_thresh = 1.1
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = model.train()(images, [none] * len(images))
    assert losses["loss_classifier"] == 0 and losses["loss_box_reg"] == 0


@pytest.mark.parametrize("family", ("retinanet", "ssd", "faster_rcnn"))
def test_a_loss_of_ones_own_does_not_vanish_silently(family):
    model, inputs = make(family), batch(family)
    owner = model.rpn if family == "faster_rcnn" else model
    stock = type(owner)
    owner.__class__ = type("Mine", (stock,), {"compute_loss": lambda self, *a: stock.compute_loss(self, *a)})
    with pytest.warns(UserWarning, match=f"Mine.compute_loss is not called any more.*adds to {stock.__name__}'s"):
        convert(model, rpn=family == "faster_rcnn")
    step(model, *inputs)
    if family == "faster_rcnn":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            convert(model)  # its proposals' losses are its own again


@pytest.mark.parametrize("frozen", ("head", "head.classification_head", "head.regression_head"))
@pytest.mark.parametrize("scope", ("batch", "level"))
def test_a_part_of_the_head_in_another_mode(frozen, scope):
    model, (images, targets) = make("retinanet"), batch("retinanet")
    convert(model, normalizer_scope=scope).train()
    want = {name: value.detach() for name, value in model(images, targets).items()}
    model = convert(make("retinanet"), normalizer_scope=scope).train()
    model.get_submodule(frozen).eval()
    got = model(images, targets)
    assert all(torch.equal(got[name], value) for name, value in want.items())
    plain = make("retinanet").eval()(images)
    model = convert(make("retinanet")).eval()
    model.get_submodule(frozen).train()
    for got, expected in zip(model(images), plain, strict=True):
        assert all(torch.equal(got[k], expected[k]) for k in expected)
    assert not [name for module in model.modules() for name in module.__dict__ if "raw" in name]


def test_anchors_that_differ_between_images():
    class Growing(AnchorGenerator):
        def forward(self, images, features):
            return [anchors * (1 + 0.3 * n) for n, anchors in enumerate(super().forward(images, features))]

    model, inputs = make("retinanet"), batch("retinanet")
    model.anchor_generator.__class__ = Growing
    want = step(model, *inputs)
    assert_same(step(convert(model, eta=0.0, lambda_=0.0), *inputs), want)
    # w_loc is calibrated on each image's own.
    got = ik.integrations.torchvision.collect_deltas(model, [inputs])[0][1]
    with torch.no_grad():
        images, targets = model.transform(*inputs)
        anchors = model.anchor_generator(images, list(model.backbone(images.tensors).values()))
    encoded = []
    for own, boxes in zip(anchors, (target["boxes"] for target in targets), strict=True):
        matched = ik.match_anchors(own, [boxes])[0]
        rows = (matched >= 0).nonzero()[:, 0]
        encoded.append(ik.encode_boxes(boxes[matched[rows]], own[rows]))
    torch.testing.assert_close(got, torch.cat(encoded))


@pytest.mark.parametrize("family", ("retinanet", "ssd"))
def test_targets_of_mixed_dtypes(family):
    """float64 boxes beside an empty float32 tensor, labels of several kinds: torchvision takes them."""
    model, (images, targets) = make(family), batch(family)
    want = step(convert(model), images, targets)
    mixed = [{**t, "boxes": t["boxes"].double() if n < 2 else t["boxes"]} for n, t in enumerate(targets)]
    for n, kind in enumerate((torch.int32, torch.uint8)):
        mixed[n]["labels"] = mixed[n]["labels"].to(kind)
    assert_same(step(model, images, mixed), want, rtol=1e-5)
