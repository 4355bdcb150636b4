"""Matching: exactly torchvision's decisions, on every kind of box, and the rules of the other detectors."""

import subprocess
import sys

import pytest
import torch
from torchvision.models.detection._utils import Matcher, SSDMatcher
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

import ioubal_kernels as ik
from ioubal_kernels import testing_matching
from ioubal_kernels.testing_matching import matching_case, padded_boxes, torchvision_matches


def assert_same(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    if not torch.equal(got, want):
        image, row = (got != want).nonzero()[0].tolist()
        count = int((got != want).sum())
        raise AssertionError(
            f"{what}: {count} differ, first anchor {row} of image {image}: {got[image, row]} not {want[image, row]}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_decides_as_torchvision(backend: str, dtype: torch.dtype) -> None:
    """Hundreds of drawn batches: ties, nested, zero-area, inverted, overflowing, infinite, NaN; all rules."""
    for seed in range(400 if dtype is torch.float32 else 80):
        case = matching_case(seed, dtype)
        got = ik.match_anchors(case.anchors, case.gt_boxes, **case.options, backend=backend)
        assert_same(got, torchvision_matches(case.anchors, case.gt_boxes, **case.options), case.what)


def test_the_drawn_cases_decide_something() -> None:
    """The cases above hold every decision, restored and forced anchors, NaN IoUs and images without boxes."""
    seen = dict.fromkeys(("background", "ignored", "matched", "restored", "forced", "nan", "no boxes"), 0)
    for seed in range(0, 400, 4):
        case = matching_case(seed)
        plain = {**case.options, "allow_low_quality": False, "force_best": False}
        thresholds, full = (torchvision_matches(case.anchors, case.gt_boxes, **o) for o in (plain, case.options))
        seen["background"] += bool((full == -1).any())
        seen["ignored"] += bool((full == -2).any())
        seen["matched"] += bool((thresholds >= 0).any())
        changed = bool((thresholds != full).any())
        seen["restored"] += changed and not case.options["force_best"]
        seen["forced"] += changed and not case.options["allow_low_quality"]
        seen["no boxes"] += any(b.shape[0] == 0 for b in case.gt_boxes)
        anchors = case.anchors if case.anchors.ndim == 2 else case.anchors[0]
        seen["nan"] += bool(box_iou(case.gt_boxes[0], anchors).isnan().any())
    assert min(seen.values()) >= 10, seen


def test_the_iou_is_torchvisions_to_the_last_bit(backend: str) -> None:
    """A threshold set to an anchor's very IoU matches it, the next number does not. The anchors are those whose IoU a
    multiply-add in the union, or in an area, would change."""
    g = torch.Generator().manual_seed(3)
    corner = torch.rand(2000, 2, generator=g) * 50
    anchors = torch.cat((corner, corner + torch.rand(2000, 2, generator=g) * 90), 1)
    box = torch.tensor([[20.3, 17.7, 71.9, 80.1]])
    iou = box_iou(box, anchors)[0]
    side = (torch.minimum(box[:, 2:], anchors[:, 2:]) - torch.maximum(box[:, :2], anchors[:, :2])).clamp(min=0)
    own, area = ((b[:, 2:] - b[:, :2]) for b in (box, anchors))
    overlap, own_area = side.prod(1), own.prod(1)
    without_product = ((own_area + area.prod(1)).double() - side.double().prod(1)).float()
    without_area = (own_area.double() + area.double().prod(1)).float() - overlap
    changed = [overlap / union != iou for union in (without_product, without_area)]
    exact = {"allow_low_quality": False, "backend": backend}
    for contracted in changed:
        rows = contracted.nonzero().squeeze(1)[:40].tolist()
        assert len(rows) == 40
        for row in rows:
            value, above = float(iou[row]), float(torch.nextafter(iou[row], torch.tensor(2.0)))
            anchor = anchors[row].expand(20, 4)
            assert (ik.match_anchors(anchor, [box], high=value, low=0.0, **exact) == 0).all()
            assert (ik.match_anchors(anchor, [box], high=above, low=above, **exact) == -1).all()


def test_by_hand(backend: str) -> None:
    """Anchors of 10 x 10 against a box of 10 x 10 moved by d: IoU (10 - d) / (10 + d); 1, 2/3, 7/13, 3/7, 1/3, 0."""
    shift = torch.tensor([0.0, 2, 3, 4, 5, 20])
    anchors = torch.stack((shift, torch.zeros(6), shift + 10, torch.full((6,), 10.0)), 1)
    boxes = [torch.tensor([[0.0, 0, 10, 10]]), torch.zeros(0, 4), torch.tensor([[0.0, 0, 10, 10], [16, 0, 26, 10]])]
    got = ik.match_anchors(anchors, boxes, backend=backend)
    assert got.dtype == torch.int64
    # The second box overlaps only the last anchor by 6 of 10: IoU 6 / 14, its largest, restored.
    assert got.tolist() == [[0, 0, 0, -2, -1, -1], [-1] * 6, [0, 0, 0, -2, -1, 1]]


def test_a_box_without_overlap_matches_every_anchor(backend: str) -> None:
    """torchvision's rule to the letter: the largest IoU of such a box is 0, and every anchor has it."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    far = torch.tensor([[0.0, 0, 10, 8], [900, 900, 910, 910]])
    assert ik.match_anchors(anchors, [far], backend=backend).tolist() == [[0, 0]]
    assert ik.match_anchors(anchors, [far], allow_low_quality=False, backend=backend).tolist() == [[0, -1]]
    assert ik.match_anchors(anchors, [far[:, [1, 0, 3, 2]] * 0 + 5], backend=backend).tolist() == [[0, 0]]  # no area


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_padded_boxes_and_labels(backend: str, index: torch.dtype) -> None:
    """Padded by NaN, or by labels of -1 over any coordinates, or both: as the list; also in front and between."""
    for seed in range(60):
        case = matching_case(seed)
        options = {**case.options, "dtype": index, "backend": backend}
        want = ik.match_anchors(case.anchors, case.gt_boxes, **options)
        assert want.dtype == index
        padded = padded_boxes(case.gt_boxes)
        assert_same(ik.match_anchors(case.anchors, padded, **options), want, case.what)
        labels = torch.where(padded.isnan().any(-1), -1, 3).to(index)
        boxes = torch.where(padded.isnan(), 5.0, padded)
        assert_same(ik.match_anchors(case.anchors, boxes, gt_labels=labels, **options), want, case.what)
        # One place moved to the front of each image: every index is one larger.
        boxes, labels = boxes.roll(1, 1), labels.roll(1, 1)
        moved = ik.match_anchors(case.anchors, boxes, gt_labels=labels, **options)
        assert_same(moved, torch.where(want >= 0, want + 1, want), case.what)
        listed = ik.match_anchors(case.anchors, list(boxes), gt_labels=list(labels), **options)
        assert_same(listed, moved, case.what)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes_are_converted_first(backend: str, dtype: torch.dtype) -> None:
    for seed in range(1, 60):
        case = matching_case(seed)
        anchors, boxes = case.anchors.to(dtype), [b.to(dtype) for b in case.gt_boxes]
        want = torchvision_matches(anchors.float(), [b.float() for b in boxes], **case.options)
        assert_same(ik.match_anchors(anchors, boxes, **case.options, backend=backend), want, case.what)
        mixed = torchvision_matches(anchors.double(), [b.double() for b in case.gt_boxes], **case.options)
        double = [b.double() for b in case.gt_boxes]
        assert_same(ik.match_anchors(anchors, double, **case.options, backend=backend), mixed, case.what)


def test_no_anchors_no_images_no_boxes(backend: str) -> None:
    anchors, box = torch.rand(5, 4), torch.rand(2, 4)
    assert ik.match_anchors(anchors[:0], [box, box], backend=backend).shape == (2, 0)
    assert ik.match_anchors(anchors, [], backend=backend).shape == (0, 5)
    assert ik.match_anchors(torch.rand(0, 5, 4), torch.rand(0, 3, 4), backend=backend).shape == (0, 5)
    # An image without boxes is background whatever the thresholds.
    for empty in ([box[:0]] * 2, torch.zeros(2, 0, 4), torch.full((2, 3, 4), torch.nan)):
        for options in ({}, {"high": 0.0, "low": 0.0}, {"force_best": True}):
            assert (ik.match_anchors(anchors, empty, **options, backend=backend) == -1).all()


def test_inputs_in_any_memory(backend: str) -> None:
    case = matching_case(7)
    want = ik.match_anchors(case.anchors, case.gt_boxes, **case.options, backend=backend)
    anchors = torch.stack((case.anchors, case.anchors), -1)[..., 0].requires_grad_()
    boxes = [b.t().contiguous().t() for b in case.gt_boxes]
    got = ik.match_anchors(anchors, boxes, **case.options, backend=backend)
    assert_same(got, want, case.what)
    assert not got.requires_grad


# ----------------------------------------------------------------------------------------------- other detectors' rules


def matcher_of(model: str) -> Matcher:
    """The matcher that torchvision's own constructor makes."""
    backbone = torch.nn.Identity()
    backbone.out_channels = 8
    if model == "retinanet":
        return RetinaNet(backbone, 2).proposal_matcher
    if model == "ssd":
        generator = torch.nn.Identity()
        generator.num_anchors_per_location = lambda: [1]
        return SSD(backbone, generator, (8, 8), 2, head=torch.nn.Identity()).proposal_matcher
    if model == "rpn":
        none = torch.nn.Identity()
        return RegionProposalNetwork(none, none, 0.7, 0.3, 256, 0.5, {}, {}, 0.7).proposal_matcher
    return RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, None, 0.05, 0.5, 100).proposal_matcher


@pytest.mark.parametrize("model", sorted(ik.MATCHING_RULES))
def test_the_rules_are_torchvisions(backend: str, model: str) -> None:
    matcher = matcher_of(model)
    assert isinstance(matcher, SSDMatcher) == (model == "ssd")
    for seed in range(1, 40):
        g = torch.Generator().manual_seed(seed)
        kind = testing_matching.BOX_KINDS[seed % 4]
        anchors, boxes = (testing_matching.draw_boxes(g, kind, n) for n in (200, 6))
        got = ik.match_anchors(anchors, [boxes], **ik.MATCHING_RULES[model], backend=backend)
        assert_same(got, matcher(box_iou(boxes, anchors))[None], f"{model}, {kind}, seed {seed}")


# ------------------------------------------------------------------------------------------------------------- memory

MEMORY = """
import resource, torch
import ioubal_kernels as ik
torch.set_num_threads(1)
rows, boxes = 20000, 1000
g = torch.Generator().manual_seed(0)
corner = torch.rand(rows, 2, generator=g).sort(0).values * 1000
anchors = torch.cat((corner, corner + 20), 1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
for backend in [name for name in ("cpu", "reference") if name in ik.available_backends()]:
    ik.match_anchors(anchors[:300], [anchors[:: rows // 3]], backend=backend)
    before = peak()
    ik.match_anchors(anchors, [anchors[:: rows // boxes] + 1], backend=backend)
    print(backend, peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss in KiB")
def test_memory_is_not_of_the_size_of_the_matrix() -> None:
    """20,000 anchors, 1,000 boxes: the matrix of IoUs alone takes 80 MB, torchvision several times that."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    growth = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert growth["reference"] < 40e6 and growth.get("cpu", 0) < 4e6, growth
