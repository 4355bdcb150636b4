"""bfloat16 logits looked up by their octave: what is written is what the kernels compute, whatever lies in a chunk."""

import pytest
import torch
from dense_focal import ALWAYS, background_focal, both

import ioubal_kernels as ik
from ioubal_kernels import testing
from ioubal_kernels.ops.library import isa_levels, limit_isa, limit_table

CHUNK = 256  # logits
GAMMAS = (0.0, 1.0, 2.0, 1.5)


def assert_as_computed(x, gamma, **options):
    """Gradients to the bit, the loss within its budget of the float64 one."""
    oracle, _ = background_focal(x.double(), gamma, **options)
    for (loss, grad), (_, want) in both(lambda: background_focal(x, gamma, **options)):
        different = (grad != want).nonzero().flatten().tolist()
        assert not different, f"isa {limit_isa(-1)}: {len(different)} gradients, the first at {different[0]}"
        testing.assert_close_budget(loss, oracle, torch.bfloat16, "loss", what=f"isa {limit_isa(-1)}")


def usual(entries, seed=0):
    """As a detector's: nearly all in an octave."""
    x = torch.randn(entries, generator=torch.Generator().manual_seed(seed)) * 0.8 - 4.6
    return x.clamp(-15, -0.6).to(torch.bfloat16)


def values(first, last):
    """Every bfloat16 from one number to another of its sign."""
    low, high = (int(torch.tensor(x, dtype=torch.bfloat16).view(torch.int16)) for x in (first, last))
    return torch.arange(low, high + 1, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_every_value_of_the_octaves_and_beside_them(gamma):
    x = values(-(2.0**-11), -40.0)
    assert_as_computed(
        torch.cat((x, x.flip(0), x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))])), gamma
    )


@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_logit_of_no_octave_at_every_place(gamma):
    """Each of these stands once at every place of a chunk, and beside itself at another."""
    others = (-0.25, 2.0**-10, -(2.0**-10), 0.5, 3.0, 15.9)
    x = usual(len(others) * CHUNK * CHUNK).view(len(others), CHUNK, CHUNK)
    for chunks, other in zip(x, others, strict=True):
        place = torch.arange(CHUNK)
        chunks[place, place] = other
        chunks[place[::2], (place[::2] * 7 + 3) % CHUNK] = other
    assert_as_computed(x.view(-1), gamma)


@pytest.mark.parametrize("value", (-0.498046875, -0.5, -0.99609375, -1.0, -7.96875, -8.0, -15.9375, -16.0))
def test_the_ends_of_the_octaves(value):
    """Among logits for which the inner octaves, from -1 to -8, are enough."""
    x = usual(40 * CHUNK).clamp(-7.5, -1.5)
    x[5 * CHUNK + 9], x[37 * CHUNK + 250] = value, value
    assert_as_computed(x, 2.0)


@pytest.mark.parametrize("count", (2, 8, 9, 64, 256))
def test_several_of_no_octave(count):
    """As many as are read one by one, more than that, a whole chunk."""
    x = usual(40 * CHUNK).view(40, CHUNK)
    for i, chunk in enumerate(x):
        chunk[torch.randperm(CHUNK, generator=torch.Generator().manual_seed(i))[:count]] = 0.3 + i / 16
        if i % 3 == 0:
            chunk[:count] = -0.125  # side by side
    assert_as_computed(x.view(-1), 2.0)


@pytest.mark.parametrize("value", (0.0, -0.0, 2.0**-11, 16.0, -16.0, -90.0, 1e30))
def test_a_logit_beyond_the_table(value):
    x = usual(20 * CHUNK + 77)
    x[3 * CHUNK + 5], x[11 * CHUNK - 1], x[-1] = value, value, value
    assert_as_computed(x, 2.0)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_what_is_no_number(value):
    x = usual(20 * CHUNK)
    x[7 * CHUNK + 70] = value
    for (loss, grad), (computed, want) in both(lambda: background_focal(x, 2.0)):
        assert torch.equal(grad.nan_to_num(9.0), want.nan_to_num(9.0))
        torch.testing.assert_close(loss, computed, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("grad_output", (0.0, -3.0, 1e-20, 1e30))
def test_any_scale(grad_output):
    assert_as_computed(usual(4 * CHUNK), 2.0, grad_scale=grad_output, grad_output=grad_output)


def test_one_value_everywhere():
    """A sum of equal losses has the error of one, an element's; at both ends of the octaves and between."""
    budget = testing.GRADIENT_BUDGET[torch.float32]
    for value in (-0.5, -0.6015625, -4.59375, -15.9375):
        x = torch.full((64 * CHUNK,), value, dtype=torch.bfloat16)
        want, _ = background_focal(x.double(), 2.0)
        for level in isa_levels():
            limit_isa(level)
            limit_table(ALWAYS)
            assert float(background_focal(x, 2.0)[0]) == pytest.approx(float(want), rel=budget), f"isa {level}, {value}"


def test_in_place_and_without_a_gradient():
    x = usual(33 * CHUNK)
    x[::1000] = 0.75
    background = torch.full((x.numel(),), ik.BACKGROUND)
    iou = torch.zeros(x.numel())
    for level in isa_levels():
        limit_isa(level)
        limit_table(ALWAYS)
        want_loss, want = background_focal(x, 2.0)
        leaf = x.clone().requires_grad_()
        logits = leaf.mul(1).view(-1, 1)
        loss = ik.iou_balanced_sigmoid_focal_loss(logits, background, iou, reduction="sum", inplace=True, backend="cpu")
        loss.backward()
        assert torch.equal(leaf.grad, want) and torch.equal(loss.detach(), want_loss)
        with torch.no_grad():
            loss = ik.iou_balanced_sigmoid_focal_loss(x.view(-1, 1), background, iou, reduction="sum", backend="cpu")
        torch.testing.assert_close(loss, want_loss, rtol=1e-7, atol=0)
