"""FoveaBox: cells by hand, and MMDetection's assignment written out box by box."""

import pytest
import torch

import ioubal_kernels as ik
from ioubal_kernels.testing_matching import padded_boxes

SHAPES = [(40, 60), (20, 30), (10, 15), (5, 8), (3, 4)]  # 320 x 480 pixels
STRIDES = (8, 16, 32, 64, 128)
RANGES = ((1, 64), (32, 128), (64, 256), (128, 512), (256, 2048))


def assigned(boxes: torch.Tensor, sigma: float) -> torch.Tensor:
    """FoveaHead._get_target_single of MMDetection, with indices in place of labels, stably sorted; sizes by area."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    levels = []
    for (height, width), stride, (smallest, largest) in zip(SHAPES, STRIDES, RANGES, strict=True):
        level = torch.full((height, width), -1)
        hit = ((area >= smallest**2) & (area <= largest**2)).nonzero().flatten()
        hit = hit[torch.sort(-area[hit], stable=True).indices]
        scaled = boxes[hit] / stride
        half_w, half_h = 0.5 * (scaled[:, 2] - scaled[:, 0]), 0.5 * (scaled[:, 3] - scaled[:, 1])
        left = torch.ceil(scaled[:, 0] + (1 - sigma) * half_w - 0.5).long().clamp(0, width - 1)
        right = torch.floor(scaled[:, 0] + (1 + sigma) * half_w - 0.5).long().clamp(0, width - 1)
        top = torch.ceil(scaled[:, 1] + (1 - sigma) * half_h - 0.5).long().clamp(0, height - 1)
        bottom = torch.floor(scaled[:, 1] + (1 + sigma) * half_h - 0.5).long().clamp(0, height - 1)
        for x1, y1, x2, y2, index in zip(left, top, right, bottom, hit, strict=True):
            level[y1 : y2 + 1, x1 : x2 + 1] = index
        levels.append(level.flatten())
    return torch.cat(levels)


def drawn(seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    count = int(torch.randint(0, 14, (1,), generator=g))
    corner = torch.randint(-50, 500, (count, 2), generator=g).float()
    side = torch.randint(0, 300, (count, 2), generator=g) * torch.rand(count, 1, generator=g)
    boxes = torch.cat((corner, corner + side), 1)
    return (boxes / 16).round() * 16 if seed % 2 else boxes  # ties, and bounds that are met exactly


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_assigns_as_mmdetection(backend: str, dtype: torch.dtype) -> None:
    contested = 0
    for seed in range(60):
        boxes = [drawn(3 * seed + i).to(dtype) for i in range(3)]
        for sigma in (0.4, 1.0):
            want = torch.stack([assigned(b, sigma) for b in boxes])
            got = ik.match_fovea(boxes, SHAPES, sigma=sigma, backend=backend)
            assert torch.equal(got, want), f"seed {seed}, sigma {sigma}: {(got != want).nonzero()[:5].tolist()}"
            padded = ik.match_fovea(padded_boxes(boxes), SHAPES, sigma=sigma, dtype=torch.int32, backend=backend)
            assert padded.dtype == torch.int32 and torch.equal(padded.long(), want)
        contested += sum(len(set(w.tolist())) > 3 for w in want)
    assert contested > 30


def test_by_hand(backend: str) -> None:
    """A box of 64 x 32 pixels at (0, 0): size 45, levels of stride 8 and 16. Shrunk to x 19.2 .. 44.8, y 9.6 .. 22.4 it
    holds the centres 20, 28, 36, 44 and 12, 20 of stride 8, and 24, 40 (x) and none (y: 8, 24) of stride 16."""
    shapes = [(4, 8), (2, 4)]
    options = {"strides": (8, 16), "scale_ranges": ((1, 64), (32, 128)), "backend": backend}
    box = torch.tensor([[0.0, 0, 64, 32]])
    level = [[-1] * 8, [-1, -1, 0, 0, 0, 0, -1, -1], [-1, -1, 0, 0, 0, 0, -1, -1], [-1] * 8]
    assert ik.match_fovea([box], shapes, **options)[0].tolist() == sum(level, []) + [-1] * 8
    # A smaller box in it takes its cells, in whichever order they come; of equal ones the last has them.
    small = torch.tensor([[12.0, 4, 36, 28]])  # shrunk to x 19.2 .. 28.8, y 11.2 .. 20.8
    for boxes, index in ((torch.cat((box, small)), 1), (torch.cat((small, box)), 0), (torch.cat((small, small)), 1)):
        got = ik.match_fovea([boxes], shapes, **options)[0]
        assert got[8 + 2] == got[8 + 3] == got[16 + 2] == got[16 + 3] == index
    labels = torch.tensor([[4, -1]])
    got = ik.match_fovea(torch.cat((box, small))[None], shapes, gt_labels=labels, **options)[0]
    assert got.tolist() == sum(level, []) + [-1] * 8


def test_bounds_of_the_scales_are_inclusive(backend: str) -> None:
    options = {"strides": (8,), "scale_ranges": ((16, 32),), "backend": backend}
    for side, taken in ((15.99, False), (16.0, True), (32.0, True), (32.01, False)):
        box = torch.tensor([[4.0, 4, 4 + side, 4 + side]])
        assert bool((ik.match_fovea([box], [(4, 4)], **options) == 0).any()) is taken, side


def test_a_box_beyond_the_map_has_its_border(backend: str) -> None:
    boxes = torch.tensor([[600.0, 8, 632, 40]])
    got = ik.match_fovea([boxes], [(4, 6)], strides=(8,), scale_ranges=((1, 64),), backend=backend).reshape(4, 6)
    assert (got[:, :5] == -1).all() and (got[:, 5] == torch.tensor([-1, -1, 0, 0])).all()


def test_odd_boxes_and_empty_inputs(backend: str) -> None:
    inf, nan = torch.inf, torch.nan
    odd = torch.tensor([[0.0, 0, 1e30, 1e30], [0, 0, inf, 5], [-inf, -inf, inf, inf], [9, 0, 0, 9], [3, 3, 3, 9]])
    assert (ik.match_fovea([odd], SHAPES, backend=backend) == -1).all()
    everything = ((0.0, 3e38),) * 5
    want = ik.match_fovea([odd[4:]], SHAPES, scale_ranges=everything, backend=backend)
    got = ik.match_fovea([odd[1:]], SHAPES, scale_ranges=everything, backend=backend)
    assert torch.equal(got, torch.where(want == 0, 3, want))
    cells = sum(h * w for h, w in SHAPES)
    for empty in ([odd[:0]], torch.zeros(1, 0, 4), torch.full((1, 2, 4), nan)):
        assert torch.equal(ik.match_fovea(empty, SHAPES, backend=backend), torch.full((1, cells), -1))
    assert ik.match_fovea([], SHAPES, backend=backend).shape == (0, cells)
    assert ik.match_fovea([odd], [], strides=(), scale_ranges=(), backend=backend).shape == (1, 0)
    one_row_less = [(0, 60), *SHAPES[1:]]
    assert ik.match_fovea([odd], one_row_less, backend=backend).shape == (1, cells - 2400)


def test_goes_with_the_fused_loss(backend: str) -> None:
    """Anchors around the cells' centres, coder "fovea": the result is the loss's matched_idxs.

    Shrunk to x 16 .. 32, y 13.6 .. 26.4 the box holds the centres (20, 20), (28, 20) and, of stride 16, (24, 24).
    """
    shapes, strides, bases = [(8, 8), (4, 4)], (8, 16), (16.0, 32.0)
    anchors = []
    for (height, width), stride, base in zip(shapes, strides, bases, strict=True):
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        centre = torch.stack((x, y), -1).reshape(-1, 2) * stride
        anchors.append(torch.cat((centre - base / 2, centre + base / 2), 1))
    anchors = torch.cat(anchors)
    boxes, labels = [torch.tensor([[4.0, 4, 44, 36]])], [torch.tensor([1])]
    matched = ik.match_fovea(boxes, shapes, strides=strides, scale_ranges=RANGES[:2], backend=backend)
    target = ik.encode_boxes(boxes[0].expand_as(anchors), anchors, box_coder="fovea", backend=backend)
    out = ik.iou_balanced_detection_loss(
        torch.zeros(1, 80, 3), target[None], anchors, matched, boxes, labels, box_coder="fovea", backend=backend
    )
    assert out.num_positives == (matched >= 0).sum() == 3
    assert out.mean_iou == pytest.approx(1.0) and float(out.localization) == pytest.approx(0.0, abs=1e-6)
