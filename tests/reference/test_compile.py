"""torch.compile(fullgraph=True) traces the public functions through validation, backend choice and the reference
(A50).
"""

import importlib
import types

import pytest
import torch
import torch._dynamo.testing

import ioubal_kernels as ik
from ioubal_kernels import backends, testing


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["flat", "nchw"])
@pytest.mark.parametrize("scope", ["batch", "level"])
def test_detection(layout: str, scope: str) -> None:
    d = testing.detection_inputs(0, layout=layout)
    options = {"normalizer_scope": scope, "anchors_per_level": d.level_sizes, "backend": "reference"}
    compiled = torch.compile(lambda *a: ik.iou_balanced_detection_loss(*a, **options), fullgraph=True, backend="eager")
    want, want_grads = testing.loss_and_gradient(ik.iou_balanced_detection_loss, d, **options)
    got, grads = testing.loss_and_gradient(compiled, d)
    assert isinstance(got, ik.DetectionLoss)
    for a, b in zip([*got, *grads], [*want, *want_grads], strict=True):
        torch.testing.assert_close(a, b)


def test_flat_losses_with_dynamic_rows() -> None:
    def losses(logits: torch.Tensor, labels: torch.Tensor, iou: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
        first = ik.iou_balanced_sigmoid_focal_loss(logits, labels, iou)
        second = ik.iou_balanced_cross_entropy(logits, labels, iou)
        return first + second + ik.iou_balanced_smooth_l1_loss(deltas, deltas + 0.1)

    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(losses, fullgraph=True, backend=counter, dynamic=True)
    with ik.use_backend("reference"):
        for rows in (7, 2, 19, 64):
            c = testing.classification_inputs(rows, rows)
            deltas, _ = testing.delta_inputs(rows, rows)
            arguments = (c.logits, c.labels, c.iou, deltas)
            torch.testing.assert_close(compiled(*arguments), losses(*arguments))
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_retinanet_loss_with_padded_boxes(backend: str) -> None:
    """Matching and loss are one graph; other boxes, other numbers of them in the same places, compile nothing again."""
    if backends.unavailable_reason(backend) is not None:
        pytest.skip(str(backends.unavailable_reason(backend)))
    loss = ik.RetinaNetLoss(high=0.4, low=0.2, backend=backend)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for seed in (1, 2, 3):
        d = testing.detection_inputs(seed, layout="nchw").padded(8)
        d.gt_boxes, d.gt_labels = d.gt_boxes[:, :8].contiguous(), d.gt_labels[:, :8].contiguous()
        heads = d.requiring_grad(), d.requiring_grad()
        results = []
        for function, leaves in zip((loss, compiled), heads, strict=True):
            out = function(leaves.cls_logits, leaves.bbox_deltas, d.anchors, d.gt_boxes, d.gt_labels)
            results.append([*out, *torch.autograd.grad(out[0] + out[1], leaves.heads())])
        assert int(results[0][2]) > 0
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


def test_matching() -> None:
    """Lists and padded boxes, both functions, on the reference."""

    def matches(anchors: torch.Tensor, boxes: list, padded: torch.Tensor) -> list[torch.Tensor]:
        shapes = [(4, 6), (2, 3)]
        fovea = ik.match_fovea(padded, shapes, strides=(32, 64), scale_ranges=((1, 64), (32, 512)))
        return [ik.match_anchors(anchors, boxes), ik.match_anchors(anchors, padded, force_best=True), fovea]

    compiled = torch.compile(matches, fullgraph=True, backend="eager")
    d = testing.detection_inputs(0)
    padded = d.padded().gt_boxes
    with ik.use_backend("reference"):
        for want, got in zip(
            matches(d.anchors, d.gt_boxes, padded), compiled(d.anchors, d.gt_boxes, padded), strict=True
        ):
            assert torch.equal(got, want)


def test_looking_for_triton_is_not_traced(monkeypatch) -> None:
    """What says whether Triton can run asks the GPU and looks for a compiler on the disk, which no trace can follow."""
    with_triton = importlib.import_module("ioubal_kernels.ops.with_triton")
    gpu = types.SimpleNamespace(is_available=lambda: True, get_device_capability=lambda: (9, 0))
    there = types.SimpleNamespace(cuda=gpu, version=types.SimpleNamespace(cuda="13.0"))
    monkeypatch.setattr(with_triton, "torch", there)

    def call(x: torch.Tensor) -> torch.Tensor:
        return x + (1 if backends._BACKENDS["triton"].unavailable() is None else 2)

    want = call(torch.zeros(3))
    assert torch.equal(torch.compile(call, fullgraph=True, backend="eager")(torch.zeros(3)), want)
