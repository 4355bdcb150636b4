"""Every logit that 16 bits can hold, finite or not, and every kind of scale."""

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


@pytest.mark.parametrize("grad_scale", (1.0, -0.37))
@pytest.mark.parametrize("gamma", (2.0, 1.0, 0.0, 0.7))
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_every_finite_logit(dtype, gamma, grad_scale):
    x = every_value(dtype)
    x = torch.where(x.float().abs() < 1e4, x, 0.0)
    want, want_grad = focal(x.double(), "reference", gamma=gamma, grad_scale=grad_scale)
    loss, grad = focal(x, gamma=gamma, grad_scale=grad_scale)
    testing.assert_close_budget(loss, want, torch.float32, "loss")
    testing.assert_close_budget(grad, want_grad, dtype)


@pytest.mark.parametrize("grad_scale", (1e-25, -1e-20, 1e-13, 1e13, 1e25))
@pytest.mark.parametrize("logit", (-1.0, -20.0, -28.0))
def test_the_loss_does_not_depend_on_the_scale(logit, grad_scale):
    """Where the factor is folded into the gradient, the sum has a power of it."""
    x = torch.full((64, 64), logit, dtype=torch.bfloat16)
    want, want_grad = focal(x.double(), "reference", gamma=2.0, grad_scale=grad_scale)
    loss, grad = focal(x, gamma=2.0, grad_scale=grad_scale)
    testing.assert_close_budget(loss, want, torch.float32, "loss")
    testing.assert_close_budget(grad, want_grad, torch.bfloat16)


@pytest.mark.parametrize("gamma", (2.0, 1.0, 0.0, 0.7))
def test_logits_below_zero_and_others_agree(gamma):
    """A warp whose logits are all below zero takes a shorter path: the same numbers, to float32's last bits."""
    x = -torch.logspace(-6, 2, 8192).view(-1, 64)
    _, below = focal(x, gamma=gamma)
    mixed = x.clone()
    mixed[:, ::8] = 1.0  # one in every vector of eight
    _, grad = focal(mixed, gamma=gamma)
    rest = torch.arange(64) % 8 != 0
    torch.testing.assert_close(below[:, rest], grad[:, rest], rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", (2.0, 1.0, 0.0, 0.5))
@pytest.mark.parametrize("label", (ik.BACKGROUND, 0))
def test_huge_logits_one_by_one(gamma, label):
    """Losses up to the largest number, next to small ones: none is infinite before it has to be."""
    x = every_value(torch.bfloat16).view(-1, 1)[: 2**16]
    x = torch.where(x.isfinite(), x, 0.0)
    labels, iou = torch.full((len(x),), label), torch.ones(len(x))
    for dtype in (torch.bfloat16, torch.float32):
        options = {"gamma": gamma, "reduction": "none"}
        got = ik.iou_balanced_sigmoid_focal_loss(x.to(dtype), labels, iou, backend="cpu", **options)
        want = ik.iou_balanced_sigmoid_focal_loss(x.double(), labels, iou, backend="reference", **options)
        testing.assert_close_budget(got, want, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_logits_that_are_not_finite(dtype):
    """Next to others and among those of ignored rows."""
    x = every_value(dtype)
    loss, grad = focal(x)
    counts = torch.ones(len(x), dtype=torch.bool)
    counts[5::7] = False
    assert loss.isnan()
    assert torch.equal(grad.isnan()[counts], x.isnan()[counts])
    assert bool((grad[~counts] == 0).all())
    assert bool((grad[counts][x[counts] == INF] != 0).all()) and bool((grad[x == -INF] == 0).all())


@pytest.mark.parametrize("scale", (0.0, INF, NAN, 1e-30, 1e35))
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float32), ids=name_of)
def test_any_scale(dtype, scale):
    """Scales that the fast loop takes, and those that it leaves to the exact path."""
    x = (torch.randn(300, 40, generator=torch.Generator().manual_seed(1)) * 2 - 4).to(dtype)
    loss, grad = focal(x, grad_scale=torch.tensor(scale))
    want, unit = focal(x.double(), "reference")
    testing.assert_close_budget(loss, want, torch.float32, "loss")
    counts = torch.ones(len(x), dtype=torch.bool)
    counts[5::7] = False
    expected = (unit * scale).to(dtype)
    assert bool((grad[~counts] == 0).all())
    torch.testing.assert_close(grad[counts], expected[counts], rtol=0.01, atol=1e-40, equal_nan=True)
