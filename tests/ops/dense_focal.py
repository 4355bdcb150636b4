"""What the tests of the focal loss's dense pass share."""

import torch

import ioubal_kernels as ik
from ioubal_kernels.ops.library import isa_levels, limit_isa, limit_table

ALWAYS, NEVER = 64, 2**62  # from how many 16-bit logits of a scale on they are looked up


def focal(logits, labels, *, grad_output=1.0, **options):
    """(loss, gradient)"""
    leaf = logits.detach().clone().requires_grad_()
    loss = ik.iou_balanced_sigmoid_focal_loss(leaf, labels, torch.full(labels.shape, 0.6), backend="cpu", **options)
    loss.backward(torch.full_like(loss, grad_output))
    return loss.detach(), leaf.grad


def background_focal(x, gamma, **options):
    """(sum of the losses, gradient) of logits of one class, all of background."""
    background = torch.full((x.numel(),), ik.BACKGROUND)
    loss, grad = focal(x.reshape(-1, 1), background, gamma=gamma, reduction="sum", **options)
    return loss, grad.view(x.shape)


def both(function):
    """(looked up, computed) on each instruction set."""
    for level in isa_levels():
        limit_isa(level)
        limit_table(ALWAYS)
        table = function()
        limit_table(NEVER)
        yield table, function()
