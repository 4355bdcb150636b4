"""Sample weights of the sigmoid losses on a CPU: runs of equal weights, and rows that have one each."""

import pytest
import torch

import ioubal_kernels as ik
from ioubal_kernels import testing
from ioubal_kernels.ops.library import cpu_variants

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def weighted_rows(rows, classes, stretch, dtype):
    """Labels with positives and ignored rows, whose weight is NaN; the others' changes every `stretch` rows."""
    inputs = testing.classification_inputs(seed=rows + classes, rows=rows, classes=classes, dtype=dtype)
    weight = torch.rand(rows // stretch + 1).add(0.5).repeat_interleave(stretch)[:rows]
    weight[:: 7 * stretch] = 0.0
    inputs.labels[5:9] = -2
    weight[inputs.labels == -2] = torch.nan
    return inputs, weight


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize(("rows", "classes"), [(700, 3), (5000, 1), (60, 91), (3, 2500), (1, 1)])
@pytest.mark.parametrize("stretch", [1, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_rows(dtype, stretch, rows, classes, reduction):
    inputs, weight = weighted_rows(rows, classes, stretch, dtype)
    options = {"weight": weight, "reduction": reduction, "gamma": 1.5}

    def loss_and_gradient(logits, backend):
        x = logits.clone().requires_grad_()
        loss = ik.iou_balanced_sigmoid_focal_loss(x, inputs.labels, inputs.iou, backend=backend, **options)
        grad_output = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
        return loss, torch.autograd.grad(loss, x, grad_output)[0]

    want_loss, want = loss_and_gradient(inputs.logits.double(), "reference")
    assert want.isfinite().all() and (want[inputs.labels == -2] == 0).all()
    for variant in cpu_variants(dtype):
        loss, grad = loss_and_gradient(inputs.logits, "cpu")
        kind, of = ("gradient", loss.dtype) if loss.ndim else ("loss", dtype)  # single losses have the elements' budget
        testing.assert_close_budget(loss, want_loss, of, kind, what=variant)
        testing.assert_close_budget(grad, want, dtype, "gradient", what=variant)


@pytest.mark.parametrize("stretch", [1, 300])
def test_weights_in_place_and_for_any_number_of_threads(stretch):
    inputs, weight = weighted_rows(90_000, 3, stretch, torch.float32)
    found = []
    for threads, inplace in ((1, False), (2, False), (1, True)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            leaf = inputs.logits.clone().requires_grad_()
            loss = ik.iou_balanced_sigmoid_focal_loss(
                leaf * 1, inputs.labels, inputs.iou, weight=weight, inplace=inplace, backend="cpu"
            )
            found.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
        finally:
            torch.set_num_threads(before)
    for loss, grad in found[1:]:
        assert torch.equal(loss, found[0][0]) and torch.equal(grad, found[0][1])
