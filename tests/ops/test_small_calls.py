"""What keeps a small call quick: one op forward, none backward, no views; and that it changes nothing but the time."""

import itertools
import os

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import ioubal_kernels as ik
from ioubal_kernels import testing, validation
from ioubal_kernels.ops import detection, flat


def focal_case(dtype=torch.float32):
    inputs = testing.classification_inputs(seed=3, rows=60, classes=7, dtype=dtype)
    return inputs, inputs.logits.clone().requires_grad_()


def ops_of(call):
    """Names of this package's ops that ran, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    return [event.name.removeprefix("ioubal::") for event in events if event.name.startswith("ioubal::")]


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_one_op_forward_and_none_backward(layout):
    inputs, x = focal_case()
    d = testing.detection_inputs(layout=layout).requiring_grad()

    def focal(factor):
        (factor * ik.iou_balanced_sigmoid_focal_loss(x, inputs.labels, inputs.iou)).backward()

    def fused(factors):
        out = ik.iou_balanced_detection_loss(*d.arguments())
        (factors[0] * out.classification + factors[1] * out.localization).backward()

    assert ops_of(lambda: focal(1)) == ["focal_checked_fill"]
    assert ops_of(lambda: focal(2)) == ["focal_checked_fill", "focal_backward"]
    assert ops_of(lambda: fused((1, 1))) == ["detection_checked_fill"]
    assert ops_of(lambda: fused((1, 2))) == ["detection_checked_fill", "detection_backward"]


def test_a_scale_in_a_tensor_is_compared_too():
    inputs, x = focal_case()

    def call(factor):
        scale = torch.tensor(8.0)
        (factor * ik.iou_balanced_sigmoid_focal_loss(x, inputs.labels, inputs.iou, grad_scale=scale)).backward()

    assert ops_of(lambda: call(8)) == ["focal_checked_fill"]
    assert ops_of(lambda: call(1)) == ["focal_checked_fill", "focal_backward"]


def test_contiguous_rows_are_their_own_view():
    inputs, x = focal_case()
    loss = ik.iou_balanced_sigmoid_focal_loss(x, inputs.labels, inputs.iou)
    assert [type(node).__name__ for node, _ in loss.grad_fn.next_functions if node] == ["AccumulateGrad"]
    loss = ik.iou_balanced_cross_entropy(x, inputs.labels, inputs.iou)
    assert [type(node).__name__ for node, _ in loss.grad_fn.next_functions if node] == ["AccumulateGrad"]


def both_ways(monkeypatch, call):
    """The tensors that a call returns by the one op and by separate ones."""
    packed = call()
    with monkeypatch.context() as patch:
        for module in (flat, detection):
            patch.setattr(module, "fills_checked", lambda *arguments: False)
        separate = call()
        names = ops_of(call)
    assert not any("checked" in name for name in names) and any(name.endswith("_fill") for name in names)
    return packed, separate


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_focal_is_the_same_by_one_op_and_by_separate_ones(dtype, monkeypatch):
    inputs, x = focal_case(dtype)
    tensor = torch.tensor
    for weight, scoped, avg, scale in itertools.product(
        (None, inputs.weight), (False, True), (None, 3.0, tensor(7)), (1.0, 4.0, tensor(2.0))
    ):
        scopes = {"scope_ids": inputs.scope_ids, "num_scopes": inputs.num_scopes} if scoped else {}
        options = {"weight": weight, "avg_factor": avg, "grad_scale": scale, "eta": 0.7, "alpha": 0.3, "eps": 0.1}

        def call(options=options, scopes=scopes):
            loss = ik.iou_balanced_sigmoid_focal_loss(x, inputs.labels, inputs.iou, gamma=1.3, **options, **scopes)
            return loss, *torch.autograd.grad(loss, x)

        packed, separate = both_ways(monkeypatch, call)
        assert all(torch.equal(a, b) for a, b in zip(packed, separate, strict=True)), (weight, scoped, avg, scale)


@pytest.mark.parametrize("gt", ("list", "padded"))
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_detection_is_the_same_by_one_op_and_by_separate_ones(layout, gt, monkeypatch):
    d = testing.detection_inputs(seed=5, images=3, layout=layout, gt=gt).requiring_grad()
    tensor = torch.tensor
    numbers = {"eta": 0.7, "lambda_": 1.1, "w_loc": 2.5, "alpha": None, "gamma": 1.3, "beta": 0.2, "eps": 0.1}
    numbers |= {"cls_weight": 0.5, "box_weights": (1.0, 2.0, 3.0, 4.0)}
    averages = (None, 3.0, (tensor([2.0, 5.0, 1.0]), 4.0), (None, tensor(6)))
    for scope, avg, scale in itertools.product(("batch", "level", "image"), averages, (1.0, tensor(2.0))):
        given = {"normalizer_scope": scope, "avg_factor": avg, "grad_scale": scale}
        options = {**given, **numbers, "anchors_per_level": d.level_sizes, "normalize_loc": True}

        def call(options=options):
            out = ik.iou_balanced_detection_loss(*d.arguments(), **options)
            return *out, *torch.autograd.grad(out.classification + out.localization, d.heads())

        packed, separate = both_ways(monkeypatch, call)
        assert all(torch.equal(a, b) for a, b in zip(packed, separate, strict=True)), given


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_cross_entropy_is_the_same_by_one_op_and_by_separate_ones(dtype, monkeypatch):
    inputs = testing.classification_inputs(seed=2, rows=40, classes=5, softmax=True, dtype=dtype)
    x = inputs.logits.requires_grad_()
    tensor = torch.tensor
    for weight, scoped, avg, scale in itertools.product(
        (None, inputs.weight), (False, True), (None, 3.0, tensor(7)), (1.0, 4.0, tensor(2.0))
    ):
        scopes = {"scope_ids": inputs.scope_ids, "num_scopes": inputs.num_scopes} if scoped else {}
        options = {"weight": weight, "avg_factor": avg, "grad_scale": scale, "eta": 0.7, "eps": 0.1}

        def call(options=options, scopes=scopes):
            loss = ik.iou_balanced_cross_entropy(x, inputs.labels, inputs.iou, background_index=2, **options, **scopes)
            return loss, *torch.autograd.grad(loss, x)

        packed, separate = both_ways(monkeypatch, call)
        assert all(torch.equal(a, b) for a, b in zip(packed, separate, strict=True)), (weight, scoped, avg, scale)


def test_a_column_out_of_range_is_named():
    inputs = testing.classification_inputs(rows=40, classes=5, softmax=True)
    x = inputs.logits.requires_grad_()
    assert ops_of(lambda: ik.iou_balanced_cross_entropy(x, inputs.labels, inputs.iou)) == ["cross_entropy_checked_fill"]
    bad = inputs.labels.clone()
    bad[7], bad[11] = -9, 5  # negative is ignored
    with pytest.raises(ValueError, match=r"iou_balanced_cross_entropy: labels must .* got 5 at labels\[11\]"):
        ik.iou_balanced_cross_entropy(x, bad, inputs.iou)
    scopes = torch.zeros_like(inputs.labels)
    scopes[5] = 2
    with pytest.raises(ValueError, match=r"iou_balanced_cross_entropy: scope_ids must .* got 2 at scope_ids\[5\]"):
        ik.iou_balanced_cross_entropy(x, inputs.labels, inputs.iou, scope_ids=scopes, num_scopes=2)


def test_a_value_out_of_range_is_found_before_the_logits_are_written():
    inputs, _ = focal_case()
    before = inputs.logits.clone()
    x = inputs.logits.clone().requires_grad_() * 1
    with pytest.raises(ValueError, match="labels"):
        ik.iou_balanced_sigmoid_focal_loss(x, torch.full_like(inputs.labels, -3), inputs.iou)
    bad = inputs.labels.clone()
    bad[11] = 7
    with pytest.raises(ValueError, match=r"iou_balanced_sigmoid_focal_loss: labels must .* got 7 at labels\[11\]"):
        ik.iou_balanced_sigmoid_focal_loss(x, bad, inputs.iou, inplace=True)
    scopes = inputs.scope_ids.clone()
    scopes[5] = -1
    with pytest.raises(
        ValueError, match=r"iou_balanced_sigmoid_focal_loss: scope_ids must .* got -1 at scope_ids\[5\]"
    ):
        ik.iou_balanced_sigmoid_focal_loss(
            x, inputs.labels, inputs.iou, inplace=True, scope_ids=scopes, num_scopes=inputs.num_scopes
        )
    assert torch.equal(x, before) and x._version == 0
    for layout, gt in itertools.product(testing.LAYOUTS, ("list", "padded")):
        d = testing.detection_inputs(layout=layout, gt=gt).requiring_grad()
        before = [h.detach().clone() for h in d.heads()]
        d.matched_idxs[1, 9] = 40
        with pytest.raises(ValueError, match=r"matched_idxs must .* got 40 at matched_idxs\[1, 9\]"):
            ik.iou_balanced_detection_loss(*d.arguments(), inplace=True)
        assert all(torch.equal(h, b) and h._version == 0 for h, b in zip(d.heads(), before, strict=True))


@pytest.mark.parametrize("mode", ("real", "fake", "symbolic"))
def test_a_trace_holds_the_ops_that_have_fakes(mode):
    inputs, x = focal_case()
    d = testing.detection_inputs().requiring_grad()

    def focal(x, labels, iou):
        return torch.autograd.grad(ik.iou_balanced_sigmoid_focal_loss(x, labels, iou), x)

    def fused(x, deltas, anchors, matched, *gt):
        half = len(gt) // 2
        out = ik.iou_balanced_detection_loss(x, deltas, anchors, matched, gt[:half], gt[half:])
        return torch.autograd.grad(out.classification + out.localization, (x, deltas))

    *rest, boxes, labels = d.arguments()
    for name, function, arguments in (
        ("focal", focal, (x, inputs.labels, inputs.iou)),
        ("detection", fused, (*rest, *boxes, *labels)),
    ):
        graph = make_fx(function, tracing_mode=mode)(*arguments)
        targets = [str(node.target) for node in graph.graph.nodes]
        assert f"ioubal.{name}_fill.cpp" in targets and f"ioubal.{name}_backward.cpp" in targets
        got, want = graph(*(t.detach() for t in arguments)), function(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_environment_is_read_at_every_call(monkeypatch):
    key = validation.environment_key("IOUBAL_CHECK")
    monkeypatch.delenv("IOUBAL_CHECK", raising=False)
    assert validation.environment("IOUBAL_CHECK", key) is None
    for value in ("0", "1"):
        monkeypatch.setenv("IOUBAL_CHECK", value)
        assert validation.environment("IOUBAL_CHECK", key) == value
    monkeypatch.setattr(os, "environ", {"IOUBAL_CHECK": "auto"})
    assert validation.environment("IOUBAL_CHECK", key) == "auto"
    monkeypatch.setattr(os, "environ", {})
    assert validation.environment("IOUBAL_CHECK", key) is None
