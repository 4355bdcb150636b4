"""Bad arguments of matching: the type of the error, and that it names operation, argument, expected and got."""

import re
from typing import Any

import pytest
import torch

import ioubal_kernels as ik
from ioubal_kernels import testing

BOXES = [torch.rand(3, 4), torch.rand(2, 4)]
LABELS = [torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)]
META = torch.device("meta")
ANCHORS = [
    ({"anchors": None}, TypeError, ["anchors must be a floating-point tensor", "None"]),
    ({"anchors": torch.zeros(5, 4, dtype=torch.int64)}, TypeError, ["anchors", "float32", "torch.int64"]),
    ({"anchors": torch.zeros(5, 5)}, ValueError, ["anchors", "(R, 4) or (N, R, 4)", "(5, 5)"]),
    ({"anchors": torch.zeros(4)}, ValueError, ["anchors", "(R, 4)", "(4,)"]),
    ({"anchors": torch.zeros(3, 5, 4)}, ValueError, ["gt_boxes", "each of the 3 images of anchors", "length 2"]),
    ({"anchors": torch.zeros(5, 4, device=META)}, ValueError, ["gt_boxes[0]", "on meta like anchors", "cpu"]),
    ({"high": 0.3}, ValueError, ["low must be at most high", "low=0.4", "high=0.3"]),
    ({"high": float("nan")}, ValueError, ["high", "finite", "nan"]),
    ({"low": -0.1}, ValueError, ["low", "at least 0", "-0.1"]),
    ({"low": "0.4"}, TypeError, ["low", "number", "'0.4'"]),
    ({"high": torch.tensor(0.5)}, TypeError, ["high", "number", "tensor"]),
    ({"allow_low_quality": 1}, TypeError, ["allow_low_quality", "True or False", "1"]),
    ({"force_best": None}, TypeError, ["force_best", "True or False", "None"]),
    ({"backend": "gpu"}, ValueError, ["backend", "'gpu'"]),
]
FOVEA = [
    ({"level_shapes": 5}, TypeError, ["level_shapes", "one entry per level", "5"]),
    ({"level_shapes": [(4, 4)]}, ValueError, ["strides", "1 entries like level_shapes", "length 2"]),
    ({"level_shapes": [(4, 4), 7]}, TypeError, ["level_shapes[1]", "pair", "7"]),
    ({"level_shapes": [(4, 4), (2, -2)]}, ValueError, ["level_shapes[1][1]", "at least 0", "-2"]),
    ({"level_shapes": [(4, 4), (2, 2.0)]}, TypeError, ["level_shapes[1][1]", "int", "2.0"]),
    ({"strides": (8, 0)}, ValueError, ["strides[1]", "at least 1", "0"]),
    ({"scale_ranges": ((1, 64), (64, 32))}, ValueError, ["scale_ranges[1]", "smallest <= largest"]),
    ({"scale_ranges": ((1, 64), (32, float("inf")))}, ValueError, ["scale_ranges[1][1]", "finite", "inf"]),
    ({"sigma": 0}, ValueError, ["sigma", "positive", "0"]),
    ({"sigma": 1.5}, ValueError, ["sigma", "between 0 and 1", "1.5"]),
]
BOTH = [
    ({"gt_boxes": None}, TypeError, ["gt_boxes", "list of tensors (G_i, 4) or a padded tensor", "None"]),
    ({"gt_boxes": torch.rand(3, 4)}, ValueError, ["gt_boxes", "(N, G, 4)", "(3, 4)"]),
    ({"gt_boxes": torch.rand(2, 3, 5)}, ValueError, ["gt_boxes", "(N, G, 4)", "(2, 3, 5)"]),
    ({"gt_boxes": [BOXES[0], torch.rand(2, 5)]}, ValueError, ["gt_boxes[1]", "(G_i, 4)", "(2, 5)"]),
    ({"gt_boxes": [BOXES[0], None]}, TypeError, ["gt_boxes[1]", "tensor", "None"]),
    ({"gt_boxes": [BOXES[0], BOXES[1].double()]}, TypeError, ["gt_boxes[1]", "float32 like gt_boxes[0]", "float64"]),
    ({"gt_boxes": [BOXES[0], BOXES[1].to(META)]}, ValueError, ["gt_boxes[1]", "cpu like", "meta"]),
    ({"gt_labels": LABELS[0]}, TypeError, ["gt_labels", "list because gt_boxes is a list", "tensor"]),
    ({"gt_labels": LABELS[:1]}, ValueError, ["gt_labels", "2 tensors like gt_boxes", "length 1"]),
    ({"gt_labels": LABELS[::-1]}, ValueError, ["gt_labels[0]", "(3,)", "(2,)"]),
    ({"gt_labels": [LABELS[0], LABELS[1].int()]}, TypeError, ["gt_labels[1]", "int64 like", "int32"]),
    ({"gt_labels": [t.float() for t in LABELS]}, TypeError, ["gt_labels[0]", "int32", "float32"]),
    ({"gt_boxes": torch.rand(2, 3, 4), "gt_labels": LABELS}, TypeError, ["gt_labels", "padded tensor (N, G)", "list"]),
    (
        {"gt_boxes": torch.rand(2, 3, 4), "gt_labels": torch.zeros(2, 2, dtype=torch.int64)},
        ValueError,
        ["gt_labels", "(2, 3)", "(2, 2)"],
    ),
    ({"dtype": torch.int16}, TypeError, ["dtype", "torch.int32 or torch.int64", "torch.int16"]),
    ({"gt_boxes": [BOXES[0], torch.tensor([[0, 0, torch.nan, 1]])]}, ValueError, ["NaN", "nan", "gt_boxes[1][0]"]),
]


def call(function: str, bad: dict[str, Any], backend: str) -> None:
    arguments = {"gt_boxes": BOXES, "backend": backend}
    if function == "match_anchors":
        arguments |= {"anchors": torch.rand(5, 4)}
    else:
        arguments |= {"level_shapes": [(4, 4), (2, 2)], "strides": (8, 16), "scale_ranges": ((1, 64), (32, 128))}
    getattr(ik, function)(**arguments | bad)


@pytest.mark.parametrize(
    ("function", "case"),
    [("match_anchors", c) for c in ANCHORS + BOTH] + [("match_fovea", c) for c in FOVEA + BOTH],
    ids=lambda value: value if isinstance(value, str) else "-".join(value[2]),
)
def test_bad_arguments(function: str, case: tuple, backend: str) -> None:
    bad, kind, texts = case
    with pytest.raises(kind, match=f"^{function}: ") as caught:
        call(function, bad, backend)
    for text in texts:
        assert re.search(re.escape(text), str(caught.value)), f"{text!r} is not in {caught.value}"


def test_unchecked_nan_in_a_list_is_no_box(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IOUBAL_CHECK", "0")
    anchors = torch.tensor([[0.0, 0, 1, 1], [5, 5, 6, 6]])
    boxes = [torch.tensor([[0.0, 0, torch.nan, 1], [5, 5, 6, 6]])]
    assert ik.match_anchors(anchors, boxes, backend=backend).tolist() == [[-1, 1]]


def test_transforms_are_refused(backend: str) -> None:
    if backend == "reference":
        pytest.skip("plain PyTorch takes what torch.func does")
    with pytest.raises(NotImplementedError, match="match_anchors"):
        torch.func.vmap(lambda a: ik.match_anchors(a, BOXES, backend=backend))(torch.rand(2, 5, 4))
    anchors, stacked = torch.rand(5, 4), torch.rand(2, 5, 4)
    with pytest.raises(NotImplementedError, match="match_anchors"):
        torch.func.vmap(lambda b: ik.match_anchors(anchors, [b], backend=backend))(stacked)
    for function in (ik.encode_boxes, ik.decode_boxes, ik.paired_box_iou, ik.delta_iou):
        with pytest.raises(NotImplementedError, match=function.__name__):
            torch.func.vmap(lambda b, f=function: f(anchors, b, backend=backend))(stacked)


def test_boxes_that_say_their_format(backend: str) -> None:
    """torchvision's BoundingBoxes: only x1 y1 x2 y2, and with the checks of plain tensors."""
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    given = {"canvas_size": (99, 99)}
    anchors = torch.tensor([[10.0, 10, 30, 30]])
    corners = tv_tensors.BoundingBoxes([[10.0, 10, 30, 30]], format="XYXY", **given)
    sizes = tv_tensors.BoundingBoxes([[10.0, 10, 20, 20]], format="XYWH", **given)
    assert ik.match_anchors(anchors, [corners], backend=backend).tolist() == [[0]]
    assert float(ik.paired_box_iou(corners, anchors, backend=backend)) == 1.0
    d = testing.detection_inputs(images=1, levels=((1, 1),), per_location=1)
    d.anchors, d.gt_boxes, d.gt_labels = anchors, [sizes], [torch.zeros(1, dtype=torch.int64)]
    d.matched_idxs = torch.zeros(1, 1, dtype=torch.int64)
    for call, name in (
        (lambda: ik.match_anchors(anchors, [sizes], backend=backend), "match_anchors"),
        (lambda: ik.match_anchors(sizes, [anchors], backend=backend), "match_anchors"),
        (lambda: ik.paired_box_iou(sizes, anchors, backend=backend), "paired_box_iou"),
        (lambda: ik.encode_boxes(sizes, anchors, backend=backend), "encode_boxes"),
        (lambda: ik.iou_balanced_detection_loss(*d.arguments(), backend=backend), "iou_balanced_detection_loss"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: .*must be boxes x1 y1 x2 y2, got BoundingBoxes of format XYWH"):
            call()
    wrong = tv_tensors.BoundingBoxes([[torch.nan, 10, 20, 20]], format="XYXY", **given)
    with pytest.raises(ValueError, match="must have no NaN"):
        ik.match_anchors(anchors, [wrong], backend=backend)
