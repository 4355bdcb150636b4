"""Anchors: the order that the fused loss reads, the scale that fits the boxes."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.models.detection.image_list import ImageList

from ioubal_kernels.detection.anchors import SCALE_CANDIDATES, anchor_fit, choose_anchor_scale, network_boxes
from ioubal_kernels.detection.architectures import OCTAVES
from ioubal_kernels.detection.data import Dataset, TransformConfig, make_record
from ioubal_kernels.detection.models import build_model
from ioubal_kernels.detection.models.retinanet import make_anchor_generator

STRIDES = (8, 16, 32)


def test_anchor_order_is_level_h_w_a():
    """Every anchor of a non-square pyramid against the definition, one by one."""
    model = build_model("retinanet_tiny", 2, anchor_scale=2.0)
    grid = ((4, 6), (2, 3), (1, 2))
    # The last map's stride does not divide the image: torchvision takes the whole part of 32 / 1 and 48 / 2.
    strides = ((8, 8), (16, 16), (32, 24))
    images = ImageList(torch.zeros(1, 3, 32, 48), [(32, 48)])
    anchors = model.network.anchor_generator(images, [torch.zeros(1, 18, *s) for s in grid])[0].tolist()
    expected = []
    for (height, width), (down, across), stride in zip(grid, strides, STRIDES, strict=True):
        for h in range(height):
            for w in range(width):
                for ratio in (0.5, 1.0, 2.0):
                    for octave in OCTAVES:
                        edge = stride * 2.0 * octave
                        half_w, half_h = edge / math.sqrt(ratio) / 2, edge * math.sqrt(ratio) / 2
                        # torchvision rounds the corners of an anchor around the origin
                        expected.append([w * across - round(half_w), h * down - round(half_h)])
                        expected[-1] += [w * across + round(half_w), h * down + round(half_h)]
    assert anchors == expected


@pytest.mark.parametrize("scale", [1.5, 3.0, 5.0])
def test_auto_scale_finds_the_scale_boxes_were_made_with(scale):
    """Boxes made from a scale's anchors: found up to a third of an octave, where two of three octaves recur."""
    generator = make_anchor_generator(STRIDES, scale)
    generator.set_cell_anchors(torch.float32, torch.device("cpu"))
    boxes = torch.cat([cell + 128 for cell in generator.cell_anchors])
    sizes = torch.tensor([[256.0, 256.0]]).expand(len(boxes), 2)
    fit = choose_anchor_scale(boxes, sizes, STRIDES, OCTAVES)
    assert fit.covered == 1.0
    assert abs(math.log2(fit.scale / scale)) <= 1 / 3 + 0.01
    assert fit.mean_best_iou > 0.8


def test_of_scales_that_cover_alike_the_one_that_fits_best():
    edge = 32 * SCALE_CANDIDATES[1]
    boxes = torch.tensor([[64 - edge / 2, 64 - edge / 2, 64 + edge / 2, 64 + edge / 2]])
    sizes = torch.tensor([[128.0, 128.0]])
    fits = [anchor_fit(boxes, sizes, STRIDES, OCTAVES, scale) for scale in SCALE_CANDIDATES]
    covering = [fit.mean_best_iou for fit in fits if fit.covered == 1]
    assert len(covering) > 2 and covering[0] < max(covering) - 0.01
    assert choose_anchor_scale(boxes, sizes, STRIDES, OCTAVES).mean_best_iou == max(covering)


def test_coverage_by_hand():
    """One square anchor-sized box at a cell's centre (IoU 1), one far too small (4 of 256 square pixels)."""
    boxes = torch.tensor([[56.0, 56, 72, 72], [63, 63, 65, 65]])
    sizes = torch.tensor([[128.0, 128.0]]).expand(2, 2)
    fit = anchor_fit(boxes, sizes, (8,), OCTAVES, 2.0)
    assert fit.covered == 0.5
    # the smallest anchor area of scale 2 at stride 8 is 16 x 16 up to the rounding of the ratios' edges (22 x 12 = 264)
    assert fit.mean_best_iou == pytest.approx((1 + 4 / 256) / 2, abs=1e-6)


def test_no_boxes_need_no_anchors():
    fit = choose_anchor_scale(torch.zeros(0, 4), torch.zeros(0, 2), STRIDES, OCTAVES)
    assert fit.covered == 1.0
    assert math.isfinite(fit.scale)


@pytest.mark.parametrize(
    ("transform", "factors", "size"),
    [
        (TransformConfig(size=(50, 50)), (0.25, 0.5), (50, 50)),
        (TransformConfig(size=(50, 50), keep_ratio=True), (0.25, 0.25), (25, 50)),
        (TransformConfig(size=None, short_side=300, long_side=500), (2.5, 2.5), (250, 500)),
        (TransformConfig(size=None, short_side=200, long_side=500), (2.0, 2.0), (200, 400)),
    ],
)
def test_network_boxes_scale_like_the_images(transform, factors, size):
    record = make_record(
        id=1, name="a", path="/a", width=200, height=100,
        boxes=[[20, 10, 60, 50], [0, 0, 9, 9]], labels=[0, 0], difficult=[False, True],
    )  # fmt: skip
    boxes, sizes = network_boxes(Dataset("/", "coco", "train", ("a",), (1,), [record]), transform)
    x, y = factors
    assert boxes.tolist() == [[20 * x, 10 * y, 60 * x, 50 * y]]
    assert sizes.tolist() == [list(map(float, size))]
