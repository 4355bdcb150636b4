"""Gradients larger than a cache, which some CPUs write past it: what is written is the same, to the bit."""

import pytest
import torch

import ioubal_kernels as ik

LARGE = 26 << 20  # bytes; from 24 MiB on they may be streamed


def gradient(logits, labels, iou, **options):
    leaf = logits.detach().requires_grad_()
    loss = ik.iou_balanced_sigmoid_focal_loss(leaf, labels, iou, avg_factor=0.01, backend="cpu", **options)
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("gamma", (2.0, 1.5))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_large_as_in_parts(dtype, gamma, threads):
    """Positives and ignored rows leave runs that begin and end inside of a cache line."""
    g = torch.Generator().manual_seed(0)
    columns = 73
    rows = LARGE // dtype.itemsize // columns
    logits = torch.empty(rows, columns).normal_(-4.6, 1.5, generator=g).to(dtype)
    labels = torch.where(torch.rand(rows, generator=g) < 0.002, torch.randint(0, columns, (rows,), generator=g), -1)
    labels[torch.rand(rows, generator=g) < 0.005] = -2
    iou = torch.full((rows,), 0.6)  # one value: every part is renormalised as the whole is
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        loss, whole = gradient(logits, labels, iou, gamma=gamma)
        half = rows // 2
        parts = [
            gradient(*(t[at] for t in (logits, labels, iou)), gamma=gamma) for at in (slice(half), slice(half, None))
        ]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole, torch.cat([grad for _, grad in parts]))
    torch.testing.assert_close(loss, parts[0][0] + parts[1][0], rtol=1e-6, atol=0)
    counted = labels != -2
    assert bool((whole[~counted] == 0).all())
    assert float((whole[counted] != 0).float().mean()) > 0.9  # not all: float16 underflows
