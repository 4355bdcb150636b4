"""Scratch memory of the GPU backends: with the gradients it keeps the fused loss below 1.1 times the logits."""

import pytest
import torch

from ioubal_kernels import testing
from ioubal_kernels.ops.workspace import detection_workspace, rows_workspace

IMAGES, CLASSES, PER_LOCATION = 16, 80, 9
ANCHORS = PER_LOCATION * sum(h * w for h, w in testing.RETINANET_LEVELS)
META = torch.device("meta")


def size_of(workspace):
    return sum(t.numel() * t.element_size() for t in workspace)


@pytest.mark.parametrize("powers", (1, 2))
@pytest.mark.parametrize("layout, groups, levels", (("flat", 1, 1), ("maps", 45, 5)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("backend", ("cuda", "triton"))
def test_detection(backend, dtype, layout, groups, levels, powers):
    logits, deltas = (IMAGES * ANCHORS * n * dtype.itemsize for n in (CLASSES, 4))
    weights = powers if backend == "cuda" else 0
    scratch = detection_workspace(backend, IMAGES, ANCHORS, CLASSES, groups, levels, 1, weights, META)
    limit = 1.1 if powers == 1 else 1.125  # CUDA keeps a second number where eta and lambda differ
    assert logits + deltas + size_of(scratch) <= limit * logits


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("backend", ("cuda", "triton"))
def test_focal(backend, dtype):
    logits = ANCHORS * CLASSES * dtype.itemsize
    assert logits + size_of(rows_workspace(backend, "focal", ANCHORS, CLASSES, 1, META)) <= 1.1 * logits


def test_many_classes_have_longer_marks():
    sizes = [size_of(rows_workspace("triton", "focal", 1000, k, 1, META)) for k in (128, 129, 32768, 32769)]
    assert sizes[1] - sizes[0] == pytest.approx(1000, abs=64) and sizes[3] - sizes[2] == pytest.approx(2000, abs=64)
