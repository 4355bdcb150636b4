"""The decisions of the compiled matching kernels, the CPU's and the emulated CUDA ones, against torchvision's."""

import pytest
import torch

import ioubal_kernels as ik
from ioubal_kernels.testing_matching import matching_case, padded_boxes, torchvision_matches

pytestmark = pytest.mark.usefixtures("kernels")

SEEDS = 100


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_decides_as_torchvision(dtype):
    """Ties, nested, zero-area, inverted, overflowing, infinite and NaN boxes, all rules; 16 bits are converted."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    for seed in range(SEEDS):
        case = matching_case(seed, dtype)
        given = case.gt_boxes if seed % 2 else padded_boxes(case.gt_boxes)
        index = (torch.int64, torch.int32)[seed // 2 % 2]
        got = ik.match_anchors(case.anchors, given, **case.options, dtype=index, backend="cpu")
        assert got.dtype == index
        want = torchvision_matches(case.anchors.to(wide), [b.to(wide) for b in case.gt_boxes], **case.options)
        assert torch.equal(got.long(), want), case.what


@pytest.mark.parametrize("model", sorted(ik.MATCHING_RULES))
def test_rules_of_torchvisions_models(model):
    rule = ik.MATCHING_RULES[model]
    for seed in range(40):
        case = matching_case(seed)
        got = ik.match_anchors(case.anchors, case.gt_boxes, **rule, backend="cpu")
        assert torch.equal(got, torchvision_matches(case.anchors, case.gt_boxes, **rule)), case.what
