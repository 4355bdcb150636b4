"""Anchors: the order that the fused loss reads, the scale that fits the boxes, the matching."""

from __future__ import annotations

import math

import pytest
import torch

from ioubal_kernels.detection.anchors import anchor_fit, choose_anchor_scale, match_batch, network_boxes
from ioubal_kernels.detection.data import Dataset, TransformConfig, make_record
from ioubal_kernels.detection.models import build_model
from ioubal_kernels.detection.models.retinanet import HeadMaps, flatten_maps, make_anchor_generator

STRIDES = (8, 16, 32)


def test_anchor_order_is_level_h_w_a():
    """Every anchor of a non-square pyramid against the definition, one by one."""
    model = build_model("retinanet_tiny", 2, 2.0)
    grid = ((4, 6), (2, 3), (1, 2))
    maps = HeadMaps([torch.zeros(1, 18, *s) for s in grid], [torch.zeros(1, 36, *s) for s in grid])
    anchors = model.anchors(maps).tolist()
    expected = []
    for (height, width), stride in zip(grid, STRIDES):
        for h in range(height):
            for w in range(width):
                for ratio in (0.5, 1.0, 2.0):
                    for octave in (1.0, 2 ** (1 / 3), 2 ** (2 / 3)):
                        edge = stride * 2.0 * octave
                        half_w, half_h = edge / math.sqrt(ratio) / 2, edge * math.sqrt(ratio) / 2
                        # torchvision rounds the corners of an anchor around the origin
                        expected.append([w * stride - round(half_w), h * stride - round(half_h)])
                        expected[-1] += [w * stride + round(half_w), h * stride + round(half_h)]
    assert anchors == expected


def test_flattened_maps_have_the_same_order():
    """Channel a*K + k of cell (h, w) is row (h*W + w)*A + a, column k."""
    level = torch.arange(2 * 6 * 2 * 3, dtype=torch.float32).reshape(2, 6, 2, 3)
    flat = flatten_maps([level], 2)
    for n in range(2):
        for h in range(2):
            for w in range(3):
                for a in range(3):
                    for k in range(2):
                        assert flat[n, (h * 3 + w) * 3 + a, k] == level[n, a * 2 + k, h, w]


def test_a_map_of_a_size_that_the_stride_does_not_divide_keeps_the_stride():
    model = build_model("retinanet_tiny", 1, 2.0)
    with torch.no_grad():
        maps = model.eval()(torch.zeros(1, 3, 72, 72))
    anchors = model.anchors(maps)
    assert [tuple(m.shape[-2:]) for m in maps.bbox_deltas] == [(9, 9), (5, 5), (3, 3)]
    second_level = anchors[81 * 9 :][: 25 * 9]
    centers = (second_level[:, :2] + second_level[:, 2:]) / 2
    assert centers.max() == 4 * 16


@pytest.mark.parametrize("scale", [1.5, 3.0, 5.0])
def test_auto_scale_finds_the_scale_boxes_were_made_with(scale):
    """Boxes made from a scale's anchors: found up to a third of an octave, where two of three octaves recur."""
    generator = make_anchor_generator(STRIDES, scale)
    generator.set_cell_anchors(torch.float32, torch.device("cpu"))
    boxes = torch.cat([cell + 128 for cell in generator.cell_anchors])
    sizes = torch.tensor([[256.0, 256.0]]).expand(len(boxes), 2)
    fit = choose_anchor_scale(boxes, sizes, STRIDES)
    assert fit.covered == 1.0
    assert abs(math.log2(fit.scale / scale)) <= 1 / 3 + 0.01
    assert fit.mean_best_iou > 0.8


def test_coverage_by_hand():
    """One square anchor-sized box at a cell's centre (IoU 1), one far too small (4 of 256 square pixels)."""
    boxes = torch.tensor([[56.0, 56, 72, 72], [63, 63, 65, 65]])
    sizes = torch.tensor([[128.0, 128.0]]).expand(2, 2)
    fit = anchor_fit(boxes, sizes, (8,), 2.0)
    assert fit.covered == 0.5
    # the smallest anchor area of scale 2 at stride 8 is 16 x 16 up to the rounding of the ratios' edges (22 x 12 = 264)
    assert fit.mean_best_iou == pytest.approx((1 + 4 / 256) / 2, abs=1e-6)


def test_no_boxes_need_no_anchors():
    fit = choose_anchor_scale(torch.zeros(0, 4), torch.zeros(0, 2), STRIDES)
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


def test_matching_by_hand():
    """IoU 1 positive; 0.45 ignored; 0 background; and a box whose best IoU is 0.2 still gets that anchor."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 4.5], [50, 50, 60, 60], [80, 80, 90, 90]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 52, 60]])
    matched = match_batch(anchors, [boxes, torch.zeros(0, 4)])
    assert matched.dtype == torch.int32
    assert matched.tolist() == [[0, -2, 1, -1], [-1, -1, -1, -1]]
