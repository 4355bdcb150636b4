"""Figure 2 measured through the kernels: where anchor and box are of one size it is Eq. 13 and 14 exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ioubal_kernels as ik
from ioubal_kernels.experiments.gradients import BETA, measured_gradient_norms
from ioubal_kernels.experiments.paper import W_LOC

D = [0.0, 0.03, 0.1, 0.2, 0.45, 0.8]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", ["center", "size"])
def test_equal_sizes_give_the_papers_curves(kind, backend):
    if backend == "cpu" and "cpu" not in ik.available_backends():
        pytest.skip("the CPU library is not built")
    targets = torch.zeros(3, 4)
    targets[1, :2] = torch.tensor([0.3, -0.2])  # where the box is plays no part
    for lambda_, w_loc in W_LOC.items():
        found = measured_gradient_norms(targets, D, kind, lambda_, w_loc, backend=backend)
        expected = ik.analysis.gradient_norm(torch.tensor(D, dtype=torch.float64), kind, lambda_, w_loc, BETA).numpy()
        for values in (found.median, found.low, found.high):
            np.testing.assert_allclose(values, expected, rtol=2e-4, atol=2e-5)


def test_wider_boxes_follow_eq_11():
    """A box twice as wide as its anchor: the same |dx| costs less IoU, the ratio of Eq. 11."""
    targets = torch.zeros(4, 4)
    targets[:, 2:] = torch.tensor(2.0).log()
    found = measured_gradient_norms(targets, D, "center", 1.5, 1.0)
    d = torch.tensor(D, dtype=torch.float64)
    expected = ik.analysis.bounded_iou(d, "center", ratio=2.0) ** 1.5 * (d / BETA).clamp(max=1)
    np.testing.assert_allclose(found.median, expected.numpy(), rtol=2e-4, atol=2e-5)


def test_sizes_do_not_depend_on_the_boxes():
    targets = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) * 0.3
    found = measured_gradient_norms(targets, D, "size", 1.8, 3.649)
    np.testing.assert_allclose(found.low, found.high, rtol=2e-3, atol=2e-4)
