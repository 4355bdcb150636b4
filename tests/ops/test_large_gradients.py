"""Gradients larger than a cache, which some CPUs write past it: what is written is the same, to the bit."""

import pytest
import torch

import ioubal_kernels as ik

LARGE = 26 << 20  # bytes; from 24 MiB on they may be streamed


def gradient(function, logits, labels, iou, **options):
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, labels, iou, avg_factor=0.01, backend="cpu", **options)
    loss.backward()
    return loss.detach(), leaf.grad


def whole_and_parts(function, logits, labels, iou, threads, **options):
    """Loss and gradient of all rows, and of either half."""
    half = len(labels) // 2
    torch.set_num_threads(threads)
    return [
        gradient(function, *(t[at] for t in (logits, labels, iou)), **options)
        for at in (slice(None), slice(half), slice(half, None))
    ]


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
    (loss, whole), *parts = whole_and_parts(
        ik.iou_balanced_sigmoid_focal_loss, logits, labels, iou, threads, gamma=gamma
    )
    assert torch.equal(whole, torch.cat([grad for _, grad in parts]))
    torch.testing.assert_close(loss, parts[0][0] + parts[1][0], rtol=1e-6, atol=0)
    counted = labels != -2
    assert bool((whole[~counted] == 0).all())
    assert float((whole[counted] != 0).float().mean()) > 0.9  # not all: float16 underflows


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("columns", (9, 21, 81))  # shorter than a line, with and without whole ones at a row's end
def test_large_softmax_as_in_parts(columns, threads):
    g = torch.Generator().manual_seed(0)
    rows = LARGE // 4 // columns
    logits = torch.empty(rows, columns).normal_(0.0, 2.0, generator=g)
    labels = torch.randint(0, columns, (rows,), generator=g)
    labels[torch.rand(rows, generator=g) < 0.005] = -1
    iou = torch.full((rows,), 0.6)
    (loss, whole), *parts = whole_and_parts(ik.iou_balanced_cross_entropy, logits, labels, iou, threads)
    # In what order a row's exponentials are added up depends on how it lies to the lines of memory.
    torch.testing.assert_close(whole, torch.cat([grad for _, grad in parts]), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, parts[0][0] + parts[1][0], rtol=1e-6, atol=0)
    assert bool((whole[labels < 0] == 0).all()) and bool((whole[labels >= 0] != 0).all())
