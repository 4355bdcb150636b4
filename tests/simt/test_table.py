"""16-bit logits whose loss and gradient are looked up in shared memory: every value there is, when it is not done."""

import emulation
import pytest
import torch

import ioubal_kernels as ik
from ioubal_kernels import testing

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = (torch.bfloat16, torch.float16)
INF, NAN = float("inf"), float("nan")


def name_of(value):
    return str(value).replace("torch.", "") if isinstance(value, torch.dtype) else None


def every_value(dtype):
    """All bit patterns twice: in their order, so that most vectors have logits of one kind, and mixed."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    mixed = bits[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    return torch.cat([bits, mixed]).view(dtype).view(-1, 64)


def focal(x, backend="cpu", *, grad_scale=1.0, **options):
    """The sum of the losses, and `grad_scale` times its gradient."""
    leaf = x.clone().requires_grad_()
    labels = torch.full((len(x),), ik.BACKGROUND)
    labels[5::7] = ik.IGNORE
    given = (leaf, labels, torch.zeros(len(x)))
    loss = ik.iou_balanced_sigmoid_focal_loss(
        *given, backend=backend, reduction="sum", grad_scale=grad_scale, **options
    )
    (grad_scale * loss).backward()
    return loss.detach(), leaf.grad


def computed_and_looked_up(dtype, run):
    first, second = (run() for _ in emulation.variants(dtype))
    return first, second


@pytest.mark.parametrize("grad_scale", (1.0, -0.37))
@pytest.mark.parametrize("gamma", (2.0, 0.0, 0.7))
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_every_finite_logit(dtype, gamma, grad_scale):
    x = every_value(dtype)
    x = torch.where(x.float().abs() < 1e4, x, 0.0)
    want, want_grad = focal(x.double(), "reference", gamma=gamma, grad_scale=grad_scale)
    computed, (loss, grad) = computed_and_looked_up(dtype, lambda: focal(x, gamma=gamma, grad_scale=grad_scale))
    testing.assert_close_budget(loss, want, torch.float32, "loss")
    testing.assert_close_budget(grad, want_grad, dtype)
    if gamma == 0.7:  # the table is filled by the very function that computes any gamma
        assert torch.equal(grad, computed[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_logits_that_are_not_finite(dtype):
    """Next to others and among those of ignored rows."""
    (loss, grad), (table_loss, table_grad) = computed_and_looked_up(dtype, lambda: focal(every_value(dtype)))
    assert loss.isnan() and table_loss.isnan()
    assert torch.equal(grad.isnan(), table_grad.isnan()) and bool(grad.isnan().any())
    assert bool((table_grad[5::7] == 0).all())


@pytest.mark.parametrize("scale", (0.0, INF, NAN, 1e-30))
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_any_scale(dtype, scale):
    """A scale that no table can hold, and one for which all its gradients are 0."""
    x = (torch.randn(300, 40, generator=torch.Generator().manual_seed(1)) * 2 - 4).to(dtype)
    (loss, grad), (table_loss, table_grad) = computed_and_looked_up(
        dtype, lambda: focal(x, grad_scale=torch.tensor(scale))
    )
    torch.testing.assert_close(table_loss, loss, rtol=2e-6, atol=0)
    torch.testing.assert_close(table_grad, grad, rtol=0.01, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_divisors_of_each_image(dtype, layout):
    """A table holds gradients of one scale: such losses are computed, to the bit as without one."""
    inputs = testing.detection_inputs(seed=3, images=3, classes=8, layout=layout, dtype=dtype)
    factor = torch.tensor([3.0, 0.5, 40.0])

    def run():
        used = inputs.requiring_grad()
        out = ik.iou_balanced_detection_loss(*used.arguments(), avg_factor=factor, backend="cpu")
        out.classification.backward()
        return out.classification, [t.grad for t in used.heads()]

    (loss, grads), (table_loss, table_grads) = computed_and_looked_up(dtype, run)
    assert loss == table_loss
    assert all(torch.equal(a, b) for a, b in zip(grads, table_grads, strict=True) if a is not None)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_the_same_in_any_order_of_the_threads(kernels, layout):
    inputs = testing.detection_inputs(
        seed=5, images=2, classes=80, per_location=3, levels=((16, 20), (8, 10)), layout=layout, dtype=torch.bfloat16
    )
    results = []
    for seed in (1, 2):
        kernels.seed(seed)

        def run():
            used = inputs.requiring_grad()
            out = ik.iou_balanced_detection_loss(*used.arguments(), backend="cpu")
            out.classification.backward()
            return out.classification, [t.grad for t in used.heads()[: len(used.heads()) // 2]]

        results.append(computed_and_looked_up(torch.bfloat16, run)[1])
    (loss, grads), (again, grads_again) = results
    assert loss == again
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
