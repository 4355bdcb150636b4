"""torch.compile(fullgraph=True) traces the public functions through validation, backend choice and the reference
(A50).
"""

import pytest
import torch
import torch._dynamo.testing

import ioubal_kernels as ik
from ioubal_kernels import testing


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
