"""convert and revert: stock losses at eta = lambda = 0, the balanced ones by an independent computation, and everything
that must not change.
"""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import CLASSES, FAMILIES, LOSSES, assert_same, batch, make, step
from torchvision.models.detection import RetinaNet
from torchvision.ops import box_iou

import ioubal_kernels as ik
from ioubal_kernels.integrations.torchvision.observing import flatten_maps

OFF = {"eta": 0.0, "lambda_": 0.0}
HEADS = {
    "retinanet": ("head.classification_head.cls_logits.weight", "head.regression_head.bbox_reg.weight"),
    "ssd": ("head.classification_head.module_list.1.weight", "head.regression_head.module_list.1.weight"),
    **dict.fromkeys(
        FAMILIES[2:],
        (
            "roi_heads.box_predictor.cls_score.weight",
            "roi_heads.box_predictor.bbox_pred.weight",
            "rpn.head.bbox_pred.weight",
        ),
    ),
}
convert, revert = ik.integrations.torchvision.convert, ik.integrations.torchvision.revert


@pytest.mark.parametrize("empty", [False, True], ids=["boxes", "one-image-without"])
@pytest.mark.parametrize("family", FAMILIES)
def test_off_equals_stock(family, empty):
    if empty and family == "keypoint_rcnn":
        pytest.skip("torchvision's keypoint loss itself fails on an image without boxes")
    model, inputs = make(family), batch(family, empty=empty)
    want = step(model, *inputs)
    assert all(float(want[1][name].abs().max()) > 0 for name in HEADS[family])
    options = {"rpn": True} if "rcnn" in family else {}
    got = step(convert(model, **OFF, **options), *inputs)
    assert_same(got, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_balanced_differs_where_it_should_and_only_there(family):
    """Of Eq. 4 not the value tells but the gradient: the sum is renormalised, by the same divisor unchanged."""
    model, inputs = make(family), batch(family, empty=False)
    stock = step(convert(model, **OFF, divisor="paper"), *inputs)
    got = step(convert(model, divisor="paper"), *inputs)
    cls, loc = LOSSES[family]
    torch.testing.assert_close(got[0][cls], stock[0][cls], rtol=1e-5, atol=0.0)
    assert got[0][loc] < 0.97 * stock[0][loc]
    for name in set(stock[0]) - {cls, loc}:
        assert torch.equal(got[0][name], stock[0][name]), name
    changed = [
        n for n, g in stock[1].items() if not torch.allclose(got[1][n], g, rtol=1e-3, atol=1e-3 * float(g.abs().max()))
    ]
    assert any("cls" in name or "classification" in name for name in changed)


# ---------------------------------------------------------------------------------------------- by hand


def retinanet_by_hand(model, images, targets, eta, lambda_, w_loc, beta, divisor):
    """Eq. 3 to 6 in float64 from the model's own flat outputs and torchvision's matching.

    Returns the losses and the gradients of the flat logits (N, R, K) and deltas (N, R, 4).
    """
    model.eval()  # flat outputs; BatchNorm is switched back, so that they are those of the training forward
    model.backbone.train()
    transformed, moved = model.transform(images, targets)
    features = list(model.backbone(transformed.tensors).values())
    outputs = model.head(features)
    anchors = model.anchor_generator(transformed, features)[0]
    logits, deltas = (outputs[k].detach().double().requires_grad_() for k in ("cls_logits", "bbox_regression"))
    positives, ious, boxes, negatives, counts = [], [], [], [], []
    for n, target in enumerate(moved):
        matched = torch.full((len(anchors),), -1)
        if len(target["boxes"]):
            matched = model.proposal_matcher(box_iou(target["boxes"], anchors))
        positive = matched >= 0
        gt, label = target["boxes"][matched[positive]].double(), target["labels"][matched[positive]]
        own = anchors[positive].double()
        p, one_hot = logits[n].sigmoid(), torch.zeros_like(logits[n])
        one_hot[positive, label] = 1.0
        focal = -(0.25 * one_hot * (1 - p) ** 2 * p.log() + 0.75 * (1 - one_hot) * p**2 * (1 - p).log())
        positives.append(focal[positive, label])
        negatives.append(focal[matched != -2].sum() - focal[positive, label].sum())
        ious.append(box_iou(model.box_coder.decode_single(deltas[n][positive], own), gt).diagonal().detach())
        off = (deltas[n][positive] - model.box_coder.encode_single(gt, own)).abs()
        boxes.append(torch.where(off < beta, off**2 / (2 * beta), off - beta / 2).sum(1))
        counts.append(int(positive.sum()))
    weighted = torch.cat([iou**eta * value for iou, value in zip(ious, positives, strict=True)])
    scale = (torch.cat(positives).sum() / weighted.sum()).detach()
    cls, loc = 0.0, 0.0
    for n, count in enumerate(counts):
        divide = max(sum(counts), 1) if divisor == "paper" else max(count, 1) * len(counts)
        cls = cls + ((scale * ious[n] ** eta * positives[n]).sum() + negatives[n]) / divide
        loc = loc + (w_loc * ious[n] ** lambda_ * boxes[n]).sum() / divide
    (cls + loc).backward()
    return {"classification": cls.detach(), "bbox_regression": loc.detach()}, logits.grad, deltas.grad


@pytest.mark.parametrize("divisor", ["torchvision", "paper"])
def test_retinanet_by_hand(divisor):
    """Losses and the gradients of every output."""
    options = {"eta": 1.5, "lambda_": 1.2, "w_loc": 2.0, "beta": 0.11}
    model, (images, targets) = make("retinanet"), batch("retinanet")
    want, logits_grad, deltas_grad = retinanet_by_hand(model, images, targets, divisor=divisor, **options)
    convert(model, divisor=divisor, **options)
    outputs: dict[str, list[torch.Tensor]] = {}

    def keep(name):
        def hook(module, inputs, output):
            outputs[name] = output
            for level in output:
                level.retain_grad()

        return hook

    model.head.classification_head.register_forward_hook(keep("cls"))
    model.head.regression_head.register_forward_hook(keep("box"))
    losses, _ = step(model, images, targets)
    for name, value in want.items():
        assert float(losses[name]) == pytest.approx(float(value), rel=1e-5), name
    # Raw maps (N, A*K, H, W): the heads' outputs were neither permuted nor joined.
    assert [tuple(level.shape) for level in outputs["cls"]] == [(3, 6 * CLASSES, s, s) for s in (8, 4, 2)]
    for name, grad, channels in (("cls", logits_grad, CLASSES), ("box", deltas_grad, 4)):
        flat = torch.cat([o.grad.permute(0, 2, 3, 1).reshape(3, -1, channels) for o in outputs[name]], dim=1)
        torch.testing.assert_close(flat.double(), grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max()))


def test_rcnn_box_losses_by_hand(monkeypatch):
    """Softmax cross entropy of the sampled RoIs with Eq. 4's weights, in float64, divided by their number."""
    model, inputs = make("faster_rcnn"), batch("faster_rcnn", empty=False)
    seen = {}
    original = type(model.roi_heads).select_training_samples

    def sample(self, *arguments):
        found = original(self, *arguments)
        seen.update(labels=torch.cat(found[2]), targets=torch.cat(found[3]).double())
        return found

    monkeypatch.setattr(type(model.roi_heads), "select_training_samples", sample)
    convert(model, eta=1.3, lambda_=1.5, w_loc=2.4, beta=1.0)
    model.roi_heads.box_predictor.register_forward_hook(lambda m, i, o: seen.update(outputs=o))
    losses, _ = step(model, *inputs)
    logits, deltas = (o.detach().double() for o in seen["outputs"])
    logits.requires_grad_()
    labels, rows = seen["labels"], (seen["labels"] > 0).nonzero()[:, 0]
    assert len(rows) > 3
    own, goal = deltas.reshape(len(labels), -1, 4)[rows, labels[rows]], seen["targets"][rows]
    unit = torch.tensor([[0.0, 0, 1, 1]]).double().expand(len(rows), 4)
    coder = model.roi_heads.box_coder
    iou = box_iou(coder.decode_single(own, unit), coder.decode_single(goal, unit)).diagonal()
    ce = -logits.log_softmax(1)[torch.arange(len(labels)), labels]
    scale = ce[rows].sum() / (iou**1.3 * ce[rows]).sum()
    weights = torch.ones(len(labels), dtype=torch.float64)
    weights[rows] = (scale * iou**1.3).detach()
    cls = (weights * ce).sum() / len(labels)
    difference = (own - goal).abs()
    smooth = torch.where(difference < 1, difference**2 / 2, difference - 0.5).sum(1)
    loc = (2.4 * iou**1.5 * smooth).sum() / len(labels)
    assert float(losses["loss_classifier"]) == pytest.approx(cls.item(), rel=1e-5)
    assert float(losses["loss_box_reg"]) == pytest.approx(float(loc), rel=1e-5)


def test_ssd_weights_per_image_and_mining_by_hand():
    """Scope "image": the positives' losses of each image keep their sum; three negatives each, the hardest by the plain
    loss."""
    model, inputs = make("ssd"), batch("ssd")
    convert(model, normalizer_scope="image")
    seen: dict[str, torch.Tensor] = {}

    def keep(module, arguments, output):
        seen.update(output)
        for value in output.values():
            value.retain_grad()

    model.head.register_forward_hook(keep)
    step(model, *inputs, weights={"bbox_regression": 0.0})
    logits = seen["cls_logits"]
    grad, detached = logits.grad.double(), logits.detach().double()
    p = detached.softmax(-1)
    background = -detached.log_softmax(-1)[..., 0]
    transformed, moved = model.transform(*inputs)
    anchors = model.anchor_generator(transformed, list(model.backbone(transformed.tensors).values()))
    matches = [
        model.proposal_matcher(box_iou(t["boxes"], own)) if len(t["boxes"]) else torch.full((len(own),), -1)
        for t, own in zip(moved, anchors, strict=True)
    ]
    positives = sum(int((m >= 0).sum()) for m in matches)
    assert not grad[2].any()  # no boxes, no positives, hence no mined negatives
    for n, target in enumerate(moved):
        if not len(target["boxes"]):
            continue
        matched, positive = matches[n], matches[n] >= 0
        negative = (grad[n].abs().sum(1) > 0) & ~positive
        assert int(negative.sum()) == 3 * int(positive.sum())
        chosen, left = background[n][negative], background[n][~negative & ~positive]
        assert chosen.min() >= left.max() - 1e-6
        # gradient of a weighted CE row is weight * (p - one_hot) / divisor: read the weights back
        label = target["labels"][matched[positive]]
        rows = positive.nonzero()[:, 0]
        weight = grad[n][rows, label] / (p[n][rows, label] - 1) * positives
        ce = -detached[n].log_softmax(-1)[rows, label]
        assert float((weight * ce).sum()) == pytest.approx(float(ce.sum()), rel=1e-4)
        assert weight.std() > 0.05
        torch.testing.assert_close(grad[n][negative][:, 0] * positives, p[n][negative][:, 0] - 1, rtol=1e-4, atol=1e-7)


def test_flattened_maps_are_in_the_anchors_order():
    """Channel a*K + k of cell (h, w) is row (h*W + w)*A + a, column k."""
    level = torch.arange(2 * 6 * 2 * 3, dtype=torch.float32).reshape(2, 6, 2, 3)
    flat = flatten_maps([level], 2)
    for n in range(2):
        for h in range(2):
            for w in range(3):
                for a in range(3):
                    for k in range(2):
                        assert flat[n, (h * 3 + w) * 3 + a, k] == level[n, a * 2 + k, h, w]


def test_mining_never_takes_a_positive():
    logits = torch.zeros(1, 4, 3)
    positive = torch.tensor([[True, True, False, False]])
    from ioubal_kernels.integrations.torchvision.ssd import hard_negatives

    assert hard_negatives(logits, positive, 3.0).tolist() == [[False, False, True, True]]
    assert not hard_negatives(logits, torch.zeros_like(positive), 3.0).any()
    logits[0, :, 0] = torch.tensor([0.0, -1.0, -2.0, 3.0])
    one = torch.tensor([[True, False, False, False]])
    assert hard_negatives(logits, one, 1.0).tolist() == [[False, False, True, False]]


def test_mining_ranks_in_float32():
    """Under autocast thousands of losses would be equal, and which of them are mined chance."""
    from ioubal_kernels.integrations.torchvision.ssd import hard_negatives

    logits = torch.randn(1, 2000, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    positive = torch.arange(2000)[None] < 100
    assert torch.equal(hard_negatives(logits, positive, 3.0), hard_negatives(logits.float(), positive, 3.0))


# ---------------------------------------------------------------------------------------------- one loss alone


@pytest.mark.parametrize("family", ["retinanet", "ssd", "faster_rcnn"])
def test_one_loss_alone_keeps_the_other_stock(family):
    model, inputs = make(family), batch(family, empty=False)
    cls, loc = LOSSES[family]
    stock = step(model, *inputs)[0]
    convert(model, classification=False)
    assert step(model, *inputs, weights={loc: 0.0})[1].keys()
    only_loc = step(model, *inputs)[0]
    convert(model, localization=False, normalize_loc=True, eps=1.0, w_loc=3.0)  # what else the loss would use
    only_cls = step(model, *inputs)
    torch.testing.assert_close(only_loc[cls], stock[cls], rtol=1e-5, atol=0.0)
    torch.testing.assert_close(only_cls[0][loc], stock[loc], rtol=1e-5, atol=0.0)
    assert only_loc[loc] < 0.9 * stock[loc]


def test_classification_false_has_the_plain_gradient():
    model, inputs = make("retinanet"), batch("retinanet")
    want = step(model, *inputs, weights={"bbox_regression": 0.0})[1]
    got = step(convert(model, classification=False), *inputs, weights={"bbox_regression": 0.0})[1]
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max() + 1e-12))


@pytest.mark.parametrize("loss_type", ["giou", "smooth_l1"])
def test_other_box_losses_of_torchvision(loss_type):
    model, inputs = make("retinanet"), batch("retinanet")
    model.head.regression_head._loss_type = loss_type
    want = step(model, *inputs)
    if loss_type == "giou":
        with pytest.raises(ValueError, match="beta must be a number for a model whose box loss is 'giou'"):
            convert(model)
        assert type(model) is RetinaNet
        assert_same(step(convert(model, eta=0.0, localization=False), *inputs), want)
        convert(model, beta=0.11)
    else:
        assert_same(step(convert(model, **OFF), *inputs), want)


@pytest.mark.parametrize("scope", ["level", "image"])
def test_scopes_of_retinanet_reach_the_loss(scope):
    model, inputs = make("retinanet"), batch("retinanet", empty=False)
    whole = step(convert(model), *inputs)
    got = step(convert(model, normalizer_scope=scope, divisor="paper"), *inputs)
    torch.testing.assert_close(got[0]["classification"].isfinite(), torch.tensor(True))
    name = "head.classification_head.cls_logits.weight"
    assert not torch.allclose(got[1][name], whole[1][name], rtol=1e-3)


@pytest.mark.parametrize("family", ["retinanet", "ssd", "faster_rcnn"])
def test_factor_and_eps_reach_the_losses(family):
    model, inputs, (cls, loc) = make(family), batch(family), LOSSES[family]
    plain, more, damped = (
        step(convert(model, normalize_loc=True, **options), *inputs)[0]
        for options in ({}, {"cls_weight": 2.5}, {"eps": 1e9})
    )
    assert [float(more[cls]), float(more[loc])] == pytest.approx([2.5 * float(plain[cls]), float(plain[loc])])
    # So large an eps leaves the positives no weight; the negatives have one of their own.
    assert damped[cls] < 0.999 * plain[cls] and damped[loc] < 1e-3 * plain[loc]


def test_the_backend_reaches_the_matching(monkeypatch):
    seen, real = [], ik.match_anchors

    def match(*arguments, **options):
        seen.append(options["backend"])
        return real(*arguments, **options)

    monkeypatch.setattr(ik, "match_anchors", match)
    step(convert(make("retinanet"), backend="reference"), *batch("retinanet"))
    assert seen == ["reference"]


def test_converting_again_replaces_the_settings():
    model, inputs = make("ssd"), batch("ssd")
    once = step(convert(model, w_loc=1.0), *inputs)[0]["bbox_regression"]
    twice = step(convert(model, w_loc=3.0), *inputs)[0]["bbox_regression"]
    assert float(twice) == pytest.approx(3 * float(once), rel=1e-6)
    rcnn = make("faster_rcnn")
    convert(rcnn, rpn=True)
    assert type(rcnn.rpn).__name__ == "IoUBalancedRegionProposalNetwork"
    convert(rcnn)
    assert type(rcnn.rpn).__name__ == "RegionProposalNetwork"


def test_rpn_switch_changes_its_gradients_only():
    model, inputs = make("faster_rcnn"), batch("faster_rcnn", empty=False)
    weights = {"loss_classifier": 0.0, "loss_box_reg": 0.0}
    plain = step(convert(model), *inputs, weights=weights)
    got = step(convert(model, rpn=True, rpn_w_loc=2.0), *inputs, weights=weights)
    assert float(got[0]["loss_objectness"]) == pytest.approx(float(plain[0]["loss_objectness"]), rel=1e-5)
    assert got[0]["loss_rpn_box_reg"] != plain[0]["loss_rpn_box_reg"]
    name = "rpn.head.cls_logits.weight"
    assert not torch.allclose(got[1][name], plain[1][name], rtol=1e-3)
    convert(model, rpn=True, rpn_w_loc=4.0)
    assert float(step(model, *inputs)[0]["loss_rpn_box_reg"]) == pytest.approx(
        2 * float(got[0]["loss_rpn_box_reg"]), rel=1e-5
    )


def test_beta_is_the_boxes_not_the_proposals():
    model, inputs = make("faster_rcnn"), batch("faster_rcnn")
    want, got = (step(convert(model, rpn=True, **options), *inputs)[0] for options in ({}, {"beta": 2.0}))
    assert float(got["loss_rpn_box_reg"]) == pytest.approx(float(want["loss_rpn_box_reg"]))
    assert got["loss_box_reg"] < 0.9 * want["loss_box_reg"]


@pytest.mark.parametrize("family", ["retinanet", "ssd", "faster_rcnn"])
def test_bfloat16_autocast(family):
    model, inputs = convert(make(family)), batch(family)
    want, _ = step(model, *inputs)
    model.train().zero_grad()
    torch.manual_seed(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(*inputs)
    sum(losses.values()).backward()
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert float(value.detach()) == pytest.approx(float(want[name]), rel=0.1, abs=0.02)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


# ---------------------------------------------------------------------------------------------- statistics, calibration


@pytest.mark.parametrize("family", ["retinanet", "ssd", "faster_rcnn"])
def test_statistics(family):
    model, inputs = make(family), batch(family, empty=False)
    with pytest.raises(RuntimeError, match="no training forward"):
        ik.integrations.torchvision.statistics(convert(model))
    step(model, *inputs)
    found = ik.integrations.torchvision.statistics(model)
    assert found["num_positives"].dtype == torch.int64 and int(found["num_positives"]) > 0
    assert 0.0 < float(found["mean_iou"]) < 1.0
    with pytest.raises(RuntimeError, match="no training forward"):
        ik.integrations.torchvision.statistics(copy.deepcopy(model))


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("family", ["retinanet", "ssd", "faster_rcnn"])
def test_calibration_keeps_the_localisation_loss(family, converted):
    model, inputs = make(family), batch(family)
    if converted:
        convert(model, w_loc=9.0)
    kind = type(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    w_loc = ik.integrations.torchvision.calibrate_w_loc(model, [inputs], lambda_=1.5)
    assert torch.equal(torch.get_rng_state(), state) and not model.training and type(model) is kind
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    name = LOSSES[family][1]
    divisor = "paper"  # torchvision's means over images weigh them differently; the ratio of sums is what is calibrated
    plain = step(convert(model, **OFF, divisor=divisor), *inputs)[0][name]
    model.load_state_dict(before)
    balanced = step(convert(model, lambda_=1.5, w_loc=w_loc, divisor=divisor), *inputs)[0][name]
    assert float(balanced) == pytest.approx(float(plain), rel=1e-4)


def test_calibration_of_the_proposals():
    model, inputs = make("faster_rcnn"), batch("faster_rcnn")
    calibrate = ik.integrations.torchvision.calibrate_w_loc
    torch.manual_seed(7)
    w_loc = calibrate(model, [inputs], rpn=True)
    assert type(model.rpn).__name__ == "RegionProposalNetwork"
    plain = step(convert(model), *inputs)[0]["loss_rpn_box_reg"]
    model.load_state_dict(make("faster_rcnn").state_dict())
    got = step(convert(model, rpn=True, rpn_w_loc=w_loc), *inputs)[0]["loss_rpn_box_reg"]
    assert float(got) == pytest.approx(float(plain), rel=1e-4)
    with pytest.raises(ValueError, match="rpn must be False"):
        calibrate(make("ssd"), [batch("ssd")], rpn=True)


def test_batches_that_are_none():
    model, (images, targets) = make("ssd"), batch("ssd")
    first = r"batches\[0\] must be"
    for batches, text in (
        ((images, targets), f"{first} a pair|the targets of {first} a list of dicts"),
        ([images[0]], f"{first} a pair"),
        ([(images, targets[:1])], f"the targets of {first} {len(images)}, one for each image"),
        ([([x.numpy() for x in images], targets)], f"the images of {first} a list of tensors"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"calibrate_w_loc: ({text})"):
            ik.integrations.torchvision.calibrate_w_loc(model, batches)


@pytest.mark.parametrize("scope", ["batch", "image"])
@pytest.mark.parametrize("family", ["retinanet", "ssd", "faster_rcnn"])
def test_a_batch_without_any_box(family, scope):
    """Nothing to balance: torchvision's losses, every parameter has a gradient (DDP waits for each of them)."""
    model, (images, targets) = make(family), batch(family)
    targets = [{name: value[:0] for name, value in target.items()} for target in targets]
    want = step(model, images, targets)
    options = {"rpn": True} if family == "faster_rcnn" else {}
    assert_same(step(convert(model, normalizer_scope=scope, normalize_loc=True, **options), images, targets), want)
    found = ik.integrations.torchvision.statistics(model)
    assert (int(found["num_positives"]), float(found["mean_iou"])) == (0, 0.0)
