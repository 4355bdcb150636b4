"""16-bit logits looked up in a table of all their values: what is written is what the kernel computes, to the bit."""

import pytest
import torch
from dense_focal import NEVER, both, focal

import ioubal_kernels as ik
from ioubal_kernels import testing
from ioubal_kernels.ops.library import limit_table

DTYPES = (torch.bfloat16, torch.float16)


def every_value(dtype):
    """All 65,536 values, those near zero among them, in rows of 16."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(-1, 16)


def bits(t):
    """What tells every NaN from every number, but not one NaN from another, nor the zeros' signs."""
    return torch.where(t.isnan(), 0.0, t).float(), t.isnan()


@pytest.mark.parametrize("reduction", ("sum", "none"))
@pytest.mark.parametrize("gamma", (2.0, 1.5, 1.0, 0.0))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_value(dtype, gamma, reduction):
    logits = every_value(dtype)
    labels = torch.full((len(logits),), -1)
    labels[5::7] = -2  # ignored
    lowest = logits == -float("inf")
    for scale in (1.0, -0.37, 0.0):
        for table, computed in both(
            lambda s=scale: focal(logits, labels, grad_output=s, gamma=gamma, reduction=reduction)
        ):
            for (value, nan), (want, want_nan) in zip(map(bits, table), map(bits, computed), strict=True):
                if value.ndim:  # there the kernels end at exp(-87)
                    assert bool((want[lowest].abs() < 1e-35).all())
                    value[lowest] = want[lowest]
                assert torch.equal(value, want) and torch.equal(nan, want_nan)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_of_every_finite_loss(dtype):
    logits = every_value(dtype)
    logits = torch.where(logits.float().abs() < 60, logits, 0.0)
    labels = torch.full((len(logits),), -1)
    want, _ = focal(logits.double(), labels, reduction="sum")
    for (table, _), _ in both(lambda: focal(logits, labels, reduction="sum")):
        testing.assert_close_budget(table, want, dtype, "loss")


@pytest.mark.parametrize(
    "value, want", ((float("inf"), float("inf")), (float("nan"), float("nan")), (-float("inf"), 0.0))
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_finite_loss(dtype, value, want):
    logits = torch.full((40, 16), -float("inf"), dtype=dtype)
    logits[17, 3] = value
    labels = torch.full((40,), -1)
    for (loss, grad), (_, computed) in both(lambda: focal(logits, labels, reduction="sum")):
        assert loss.isnan() if want != want else float(loss) == want
        assert torch.equal(grad.nan_to_num(9.0), computed.nan_to_num(9.0))
    labels[17] = -2  # ignored: what stands there does not matter
    for (loss, grad), _ in both(lambda: focal(logits, labels, reduction="sum")):
        assert float(loss) == 0 and not grad.any()


@pytest.mark.parametrize("levels", (((16, 16), (3, 5)), ((40, 13), (1, 1)), ((1, 7), (7, 1))))
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_anchors_of_every_layout(dtype, layout, levels):
    """Masks of any period, whole lines and parts of them; logits of ignored anchors may be anything."""
    inputs = testing.detection_inputs(
        images=2, classes=17, per_location=2, levels=levels, ignored_share=0.1, layout="flat", dtype=dtype
    )
    inputs.cls_logits.data[inputs.matched_idxs == -2] = float("nan")
    inputs = inputs.in_layout(layout)

    def run():
        heads = [t.detach().clone().requires_grad_() for t in inputs.heads()]
        half = len(heads) // 2
        cls_logits, bbox_deltas = (heads[0], heads[1]) if layout == "flat" else (heads[:half], heads[half:])
        out = ik.iou_balanced_detection_loss(cls_logits, bbox_deltas, *inputs.arguments()[2:], backend="cpu")
        (out.classification + out.localization).backward()
        return out.classification.detach(), [t.grad for t in heads]

    for (loss, grads), (want, want_grads) in both(run):
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(grads, want_grads, strict=True))


def test_every_image_has_its_scale(monkeypatch):
    """A table for each; a divisor that is not a number has none and spoils its image only."""
    monkeypatch.setenv("IOUBAL_CHECK", "0")
    inputs = testing.detection_inputs(images=4, classes=16, levels=((9, 13), (4, 7)), dtype=torch.bfloat16)
    divisors = torch.tensor([3.0, float("nan"), 5.0, 0.25])

    def run():
        logits = inputs.cls_logits.detach().clone().requires_grad_()
        arguments = (logits, *inputs.arguments()[1:])
        out = ik.iou_balanced_detection_loss(*arguments, avg_factor=divisors, backend="cpu")
        out.classification.backward()
        return logits.grad

    for grad, want in both(run):
        assert grad[1].isnan().any() and torch.equal(grad.isnan(), want.isnan())
        assert torch.equal(grad.nan_to_num(7.0), want.nan_to_num(7.0)) and grad[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("gamma", (1.5, 2.0))  # on Zen 5 float16's tables are for the first alone
@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_inputs_with_the_default(dtype, threads, gamma):
    """Above the threshold, sample weights of two values: two tables; a third value stays below."""
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(30000, 80, generator=g) * 1.5 - 4.6).to(dtype)
    labels = torch.where(torch.rand(30000, generator=g) < 0.002, torch.randint(0, 80, (30000,), generator=g), -1)
    weight = torch.ones(30000)
    weight[14000:29000], weight[29000:] = 0.5, 0.25
    torch.set_num_threads(threads)
    limit = limit_table(-1)
    assert limit == 2**20
    got = focal(logits, labels, weight=weight, gamma=gamma)
    limit_table(NEVER)
    want = focal(logits, labels, weight=weight, gamma=gamma)
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=0)
