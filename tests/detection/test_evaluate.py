"""Evaluation against detections made by hand, whose average precision is known."""

from __future__ import annotations

import pytest
import torch

from ioubal_kernels.detection.data import BadImageError, Dataset, make_record
from ioubal_kernels.detection.errors import UsageError
from ioubal_kernels.detection.evaluate import ImageDetections, evaluate_detections, percent, without_unread
from ioubal_kernels.detection.progress import Reporter


def dataset(images: list[dict], classes: tuple[str, ...] = ("a", "b")) -> Dataset:
    records = [
        make_record(id=i + 1, name=f"{i}.png", path=f"/{i}.png", width=200, height=200, **image)
        for i, image in enumerate(images)
    ]
    return Dataset("/", "coco", "val", classes, tuple(range(1, len(classes) + 1)), records)


def found(image_id: int, boxes: list[list[float]], scores: list[float], labels: list[int]) -> ImageDetections:
    shape = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return ImageDetections(image_id, shape, torch.tensor(scores), torch.tensor(labels, dtype=torch.int64))


ONE = pytest.approx(1.0, abs=1e-12)  # pycocotools adds an eps to the precision's denominator
ONE_BOX = {"boxes": [[10, 10, 110, 110]], "labels": [0]}


def test_perfect_detections():
    data = dataset([ONE_BOX, {"boxes": [[20, 20, 60, 60]], "labels": [1]}])
    metrics = evaluate_detections(
        data, [found(1, [[10, 10, 110, 110]], [0.9], [0]), found(2, [[20, 20, 60, 60]], [0.3], [1])]
    )
    for name in ("AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90", "APm", "APl", "AR"):
        assert metrics[name] == ONE, name
    assert metrics["APs"] is None  # no object below 32 x 32
    assert metrics["per_class"]["b"] == {"AP": ONE, "AP50": ONE, "AP75": ONE, "boxes": 1}
    assert (metrics["images"], metrics["boxes"], metrics["detections"]) == (2, 2, 2)


@pytest.mark.parametrize("height", [53, 62, 72, 77, 82, 88, 92, 97])
def test_ap_by_threshold_of_one_box_of_known_iou(height):
    """As wide as the box of 100 x 100 and `height` high: IoU = height / 100, a hit at every threshold up to that."""
    metrics = evaluate_detections(dataset([ONE_BOX]), [found(1, [[10, 10, 110, 10 + height]], [0.5], [0])])
    expected = {f"{t / 100:.2f}": float(height >= t) for t in range(50, 100, 5)}
    assert metrics["thresholds"] == pytest.approx(expected)
    assert [metrics["AP"], metrics["AR"]] == pytest.approx([sum(expected.values()) / 10] * 2)
    of_class = metrics["per_class"]["a"]
    assert [of_class["AP50"], of_class["AP75"]] == pytest.approx([expected["0.50"], expected["0.75"]])
    for name in ("AP50", "AP60", "AP70", "AP75", "AP80", "AP90"):
        assert metrics[name] == pytest.approx(float(height >= int(name[2:]))), name


def test_ap90_is_not_lost_to_the_threshold_that_is_not_quite_a_point_nine():
    metrics = evaluate_detections(dataset([ONE_BOX]), [found(1, [[10, 10, 110, 10 + 92]], [0.5], [0])])
    assert metrics["AP90"] == ONE
    assert metrics["thresholds"]["0.95"] == 0.0


def test_average_precision_with_a_false_positive_between_two_hits():
    """Two boxes; hit (.9), miss (.8), hit (.7): precision 1 up to recall 1/2, then 2/3 up to recall 1.

    At 101 recall points 0, .01, ..., 1: 51 of them (<= .5) at precision 1, the other 50 at 2/3.
    """
    data = dataset([{"boxes": [[0, 0, 50, 50], [100, 100, 150, 150]], "labels": [0, 0]}], ("a",))
    metrics = evaluate_detections(
        data, [found(1, [[0, 0, 50, 50], [60, 60, 90, 90], [100, 100, 150, 150]], [0.9, 0.8, 0.7], [0, 0, 0])]
    )
    assert metrics["AP50"] == pytest.approx((51 * 1 + 50 * 2 / 3) / 101)


def test_one_box_found_twice_is_one_false_positive():
    """Two boxes, hits .9 and .7, a duplicate of the first at .8: as above, precision 1 and then 2/3."""
    data = dataset([{"boxes": [[0, 0, 50, 50], [100, 100, 150, 150]], "labels": [0, 0]}], ("a",))
    metrics = evaluate_detections(
        data, [found(1, [[0, 0, 50, 50], [0, 0, 50, 49], [100, 100, 150, 150]], [0.9, 0.8, 0.7], [0, 0, 0])]
    )
    assert metrics["AP50"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_the_class_must_be_right():
    metrics = evaluate_detections(dataset([ONE_BOX]), [found(1, [[10, 10, 110, 110]], [0.9], [1])])
    assert metrics["AP"] == 0.0
    assert metrics["per_class"]["b"]["AP"] is None


def test_no_detections_are_zeros():
    data = dataset([ONE_BOX])
    for nothing in ([], [found(1, [], [], [])]):
        metrics = evaluate_detections(data, nothing)
        assert metrics["AP"] == metrics["AP90"] == metrics["APl"] == metrics["AR"] == 0.0
        assert metrics["detections"] == 0


def test_no_ground_truth_is_none_not_zero():
    metrics = evaluate_detections(dataset([{"boxes": [], "labels": []}]), [found(1, [[0, 0, 9, 9]], [0.5], [0])])
    assert metrics["AP"] is None
    assert metrics["per_class"]["a"]["AP50"] is None


def test_difficult_and_crowd_boxes_are_ignored():
    """A hit on an ignored box is neither right nor wrong; missing one costs nothing."""
    for flag in ("difficult", "iscrowd"):
        data = dataset(
            [{"boxes": [[0, 0, 50, 50], [100, 100, 150, 150]], "labels": [0, 0], flag: [False, True]}], ("a",)
        )
        with_ignored = [found(1, [[100, 100, 150, 150], [0, 0, 50, 50]], [0.9, 0.8], [0, 0])]
        assert evaluate_detections(data, with_ignored)["AP"] == ONE
        without = [found(1, [[0, 0, 50, 50]], [0.8], [0])]
        assert evaluate_detections(data, without)["AP"] == ONE
        assert evaluate_detections(data, without)["boxes"] == 1


def test_an_image_that_comes_twice_counts_once():
    data = dataset([ONE_BOX])
    once = found(1, [[10, 10, 110, 110]], [0.9], [0])
    assert evaluate_detections(data, [once, once]) == evaluate_detections(data, [once])


def test_max_detections_keeps_the_best():
    data = dataset([ONE_BOX])
    many = found(1, [[150, 150, 160, 160]] * 3 + [[10, 10, 110, 110]], [0.9, 0.8, 0.7, 0.6], [0] * 4)
    assert evaluate_detections(data, [many], max_detections=3)["AP"] == 0.0
    assert evaluate_detections(data, [many], max_detections=4)["AP"] == pytest.approx(0.25)


def test_coco_counts_a_hundred_detections_and_voc_all():
    """A hit behind 100 misses: an SSD leaves 200 boxes."""
    data = dataset([ONE_BOX])
    boxes, scores = [[150, 150, 160, 160]] * 100 + [[10, 10, 110, 110]], torch.linspace(0.9, 0.1, 101).tolist()
    many = found(1, boxes, scores, [0] * 101)
    metrics = evaluate_detections(data, [many], voc07=True)
    assert metrics["AP"] == 0.0
    assert metrics["VOC07"]["AP"] == pytest.approx(1 / 101)


def test_images_that_could_not_be_read_are_no_misses(capsys):
    data = dataset([ONE_BOX, ONE_BOX, {"boxes": [], "labels": []}])
    reporter = Reporter(quiet=True)
    hit, nothing = found(2, [[10, 10, 110, 110]], [0.9], [0]), found(3, [], [], [])
    read = without_unread(data, [hit, nothing], 0.0, reporter)  # always one may be missing
    assert evaluate_detections(read, [hit, nothing])["AP"] == ONE and len(read) == 2
    assert "1 of 3 images could not be read and are left out: " in capsys.readouterr().err
    assert without_unread(data, [hit, nothing, found(1, [], [], [])], 0.0, reporter) is data
    with pytest.raises(BadImageError, match="at most 1 bad images of 3"):
        without_unread(data, [nothing], 0.1, reporter)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (found(1, [[0, 0, 9, 9]], [float("nan")], [0]), r"image 1: scores: expected finite numbers, got NaN"),
        (found(1, [[0, 0, float("inf"), 9]], [0.5], [0]), r"image 1: boxes: expected finite numbers"),
        (found(7, [[0, 0, 9, 9]], [0.5], [0]), r"image 7: expected an image of split 'val'"),
        (found(1, [[0, 0, 9, 9]], [0.5], [2]), r"image 1: labels: expected 0 .. 1, got 2"),
        (found(1, [[0, 0, 9, 9]], [0.5], [-1]), r"image 1: labels"),
        (found(1, [[0, 0, 9, 9]], [0.5, 0.4], [0, 0]), r"expected boxes \(D, 4\).*got \(1, 4\), \(2,\), \(2,\)"),
    ],
)
def test_bad_detections_are_refused(bad, message):
    with pytest.raises(UsageError, match=message):
        evaluate_detections(dataset([ONE_BOX]), [bad])


def test_percent():
    assert percent(0.5) == "50.0"
    assert percent(None) == "-"
