"""The metric of VOC 2007 on rankings written down by hand.

Boxes to find are 100 x 100 at (x, 0); a detection as wide and h high at the same place has IoU h / 100.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from ioubal_kernels.detection.data import Dataset, make_record
from ioubal_kernels.detection.errors import UsageError
from ioubal_kernels.detection.evaluate import ImageDetections, evaluate_detections
from ioubal_kernels.detection.tables import voc_table
from ioubal_kernels.detection.voc_metric import voc07_metrics


def square(x):
    return [x, 0, x + 100, 100]


def dataset(*images, classes=("a", "b"), kind="voc"):
    """Each image: a list of (x, label, difficult)."""
    records = [
        make_record(
            id=10 + i, name=str(i), path=f"/{i}.jpg", width=1000, height=100, boxes=[square(x) for x, _, _ in objects],
            labels=[label for _, label, _ in objects], difficult=[flag for _, _, flag in objects],
        )
        for i, objects in enumerate(images)
    ]  # fmt: skip
    return Dataset("/", kind, "test", classes, classes, records)


def found(image, *detections):
    """Each detection: (x, height, score) or (x, height, score, label)."""
    rows = [(*d, 0)[:4] for d in detections]
    boxes = torch.tensor([[x, 0, x + 100, h] for x, h, _, _ in rows], dtype=torch.float32).reshape(-1, 4)
    scores = torch.tensor([row[2] for row in rows], dtype=torch.float32)
    return ImageDetections(10 + image, boxes, scores, torch.tensor([row[3] for row in rows], dtype=torch.int64))


def metric(data, *detections, **options):
    return evaluate_detections(data, detections, **options)["VOC07"]


def approx(value):
    return pytest.approx(value, abs=1e-12)


def test_hit_miss_hit():
    """Two objects; ranking: hit .9, miss .8, hit .7. Precision 1 at recall 1/2, 2/3 at recall 1.

    Recalls 0 .. .5 (6 points) have 1, recalls .6 .. 1 (5 points) 2/3.
    """
    result = metric(
        dataset([(0, 0, False), (200, 0, False)]), found(0, (0, 100, 0.9), (500, 100, 0.8), (200, 100, 0.7))
    )
    assert result["AP50"] == result["AP95"] == approx((6 + 5 * 2 / 3) / 11)
    assert result["AP"] == approx((6 + 5 * 2 / 3) / 11)
    assert result["per_class"] == {"a": approx((6 + 5 * 2 / 3) / 11), "b": None}


def test_the_ranking_is_over_all_images():
    """Image 0: hit .9, hit .5. Image 1: miss .8, hit .7. Ranking: hit, miss, hit, hit of 4 objects.

    (recall, precision): (1/4, 1), (1/4, 1/2), (2/4, 2/3), (3/4, 3/4). Largest from each recall on: 1 at 0, .1, .2; 3/4
    at .3 .. .7 (5 points); 0 at .8, .9, 1.
    """
    data = dataset([(0, 0, False), (200, 0, False)], [(0, 0, False), (200, 0, False)])
    result = metric(data, found(0, (0, 100, 0.9), (200, 100, 0.5)), found(1, (500, 100, 0.8), (0, 100, 0.7)))
    assert result["AP50"] == approx((3 + 5 * 3 / 4) / 11)


def test_a_second_match_is_a_false_positive_even_when_it_fits_better():
    """One object of two; ranking: IoU .6 hit, IoU 1 duplicate, hit. At .5: 1 up to recall .5, then 2/3.

    At .65: the first is a miss, so the second is a hit: miss, hit, hit: 2/3 at all recalls (1/2, then 2/3).
    """
    data = dataset([(0, 0, False), (200, 0, False)])
    result = metric(data, found(0, (0, 60, 0.9), (0, 100, 0.8), (200, 100, 0.7)))
    assert result["AP50"] == result["AP60"] == approx((6 + 5 * 2 / 3) / 11)
    assert result["AP65"] == result["AP95"] == approx(2 / 3)


def test_difficult_objects_neither_count_nor_punish():
    """Found twice, the difficult object changes nothing: one object, ranking: hit. Below the threshold it is a miss."""
    data = dataset([(0, 0, False), (200, 0, True)])
    result = metric(data, found(0, (200, 100, 0.9), (200, 90, 0.8), (0, 100, 0.7)))
    assert result["AP50"] == result["AP90"] == approx(1.0)
    # At .95 the second detection (IoU .9) is a false positive: it matches nothing. Ranking: -, miss, hit: 1/2.
    assert result["AP95"] == approx(0.5)


def test_the_largest_overlap_decides_even_if_that_one_is_difficult():
    """Between objects at 0 and at 20 (difficult), a detection at 12 overlaps both: 88/112 and 92/108. It is ignored."""
    data = dataset([(0, 0, False), (20, 0, True)])
    assert metric(data, found(0, (12, 100, 0.9)))["AP50"] == 0.0
    # Nothing counted at all, so a later hit has precision 1.
    assert metric(data, found(0, (12, 100, 0.9), (0, 100, 0.8)))["AP50"] == approx(1.0)


def test_a_detection_does_not_fall_back_to_the_second_best_object():
    """Objects at 0 and 30. Both detections overlap the first most (10: 90/110 and 80/120): hit and duplicate."""
    data = dataset([(0, 0, False), (30, 0, False)])
    result = metric(data, found(0, (0, 100, 0.9), (10, 100, 0.8)))
    assert result["AP50"] == approx(6 / 11)


def test_equal_overlaps_take_the_first_object():
    """A detection at 10 between objects at 0 (difficult) and 20: the same IoU; the first one listed decides."""
    assert metric(dataset([(0, 0, True), (20, 0, False)]), found(0, (10, 100, 0.9)))["AP50"] == 0.0
    assert metric(dataset([(20, 0, False), (0, 0, True)]), found(0, (10, 100, 0.9)))["AP50"] == approx(1.0)


def test_ties_keep_their_order():
    """Equal scores: in the order of images and detections. Hit before miss: 1; miss before hit: 1/2."""
    data = dataset([(0, 0, False)], [])
    assert metric(data, found(0, (0, 100, 0.5)), found(1, (0, 100, 0.5)))["AP50"] == approx(1.0)
    assert metric(data, found(0, (500, 100, 0.5), (0, 100, 0.5)))["AP50"] == approx(0.5)


@pytest.mark.parametrize("height", [50, 55, 60, 65, 70, 75, 80, 85, 90, 95])
def test_exactly_the_threshold_is_a_hit(height):
    result = metric(dataset([(0, 0, False)]), found(0, (0, height, 0.5)))
    for percent in range(50, 100, 5):
        assert result[f"AP{percent}"] == approx(float(height >= percent)), percent
    assert result["AP"] == approx((height - 45) / 50)


def test_recalls_are_compared_exactly():
    """Ten objects, three found: recall .3 is reached (3 / 10 against 3 * .1 = .30000000000000004): 4 points of 11."""
    data = dataset([(100 * k, 0, False) for k in range(10)])
    hits = found(0, *((100 * k, 100, 0.9) for k in range(3)))
    assert metric(data, hits)["AP50"] == approx(4 / 11)


def test_nothing_found_and_classes_without_objects():
    assert metric(dataset([(0, 0, False)]))["AP"] == 0.0
    # Class b has a difficult object only: it is not in the mean.
    result = metric(dataset([(0, 0, False), (0, 1, True)]), found(0, (0, 100, 0.9), (0, 100, 0.9, 1)))
    assert result["AP50"] == approx(1.0) and result["per_class"] == {"a": approx(1.0), "b": None}
    empty = metric(dataset([], []), found(1, (0, 100, 0.9)))
    assert empty["AP"] is None and empty["AP75"] is None


def test_classes_are_apart_and_averaged():
    """Class a is found (1); class b's only detection lies on an object of class a (0): the mean is 1/2."""
    data = dataset([(0, 0, False), (200, 1, False)])
    result = metric(data, found(0, (0, 100, 0.9), (0, 100, 0.8, 1)))
    assert result["AP50"] == approx(0.5) and result["per_class"] == {"a": approx(1.0), "b": 0.0}


def test_max_detections_of_an_image_and_class():
    """Miss .9, hit .8 in image 0, hit .7 in image 1, class b's hit at .1. With one each: miss .9, hit .7, and b's."""
    data = dataset([(0, 0, False), (200, 1, False)], [(0, 0, False)])
    detections = (found(0, (500, 100, 0.9), (0, 100, 0.8), (200, 100, 0.1, 1)), found(1, (0, 100, 0.7)))
    # All: miss, hit, hit of two: 2/3 everywhere. One each: miss, hit of two: 1/2 up to recall .5.
    assert metric(data, *detections)["per_class"] == {"a": approx(2 / 3), "b": approx(1.0)}
    limited = metric(data, *detections, max_detections=1)
    assert limited["per_class"] == {"a": approx(6 * 0.5 / 11), "b": approx(1.0)}


def test_when_it_is_measured():
    data, detections = dataset([(0, 0, False)], kind="coco"), [found(0, (0, 100, 0.9))]
    assert "VOC07" not in evaluate_detections(data, detections)
    assert evaluate_detections(data, detections, voc07=True)["VOC07"]["AP"] == approx(1.0)
    assert "VOC07" not in evaluate_detections(dataset([(0, 0, False)]), detections, voc07=False)
    data.labelled = False
    with pytest.raises(UsageError, match="expected annotations to measure with, split 'test' of / has none"):
        evaluate_detections(data, detections)


def test_detections_without_extent_are_misses():
    """A line, a point and an inverted box before the hit: 1/4 everywhere."""
    detections = found(0, (0, 0, 0.9), (0, -50, 0.8), (0, 100, 0.6))
    data = dataset([(0, 0, False)])
    result = voc07_metrics(
        data, np.zeros(4, np.int64), np.array([[0, 0, 100, 0], [5, 5, 5, 5], [100, 100, 0, 0], [0, 0, 100, 100.0]]),
        np.array([0.9, 0.8, 0.7, 0.6]), np.zeros(4, np.int64),
    )  # fmt: skip
    assert result["AP50"] == approx(1 / 4)
    assert metric(data, detections)["AP50"] == approx(1 / 3)


def test_table():
    table = voc_table({"run": {"VOC07": metric(dataset([(0, 0, False)]), found(0, (0, 72, 0.5)))}})
    assert [column.header for column in table.columns][:4] == ["run", "AP", "AP50", "AP55"]
    assert [list(column.cells)[0] for column in table.columns] == ["run", "50.0"] + ["100.0"] * 5 + ["0.0"] * 5


def reference(data, images, boxes, scores, labels, percent):
    """The devkit's loops, one class after the other, with a score order that is already stable."""
    result = []
    for k in range(data.num_classes):
        taken, total = set(), sum(int(((r.labels == k) & ~r.difficult).sum()) for r in data.records)
        tp, fp = [], []
        for d in sorted(np.flatnonzero(labels == k), key=lambda d: -scores[d]):
            record, best, choice = data.records[images[d]], -1.0, None
            for g in np.flatnonzero(record.labels == k):
                truth = record.boxes[g].astype(np.float64)
                w = min(boxes[d][2], truth[2]) - max(boxes[d][0], truth[0])
                h = min(boxes[d][3], truth[3]) - max(boxes[d][1], truth[1])
                inter = max(w, 0) * max(h, 0)
                areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (boxes[d], truth)]
                if inter / (sum(areas) - inter) > best:
                    best, choice = inter / (sum(areas) - inter), g
            if best >= percent / 100 and record.difficult[choice]:
                continue
            hit = best >= percent / 100 and (images[d], choice) not in taken
            taken.add((images[d], choice) if hit else None)
            tp.append(hit)
            fp.append(not hit)
        tp, fp = np.cumsum(tp), np.cumsum(fp)
        points = [max([t / (t + f) for t, f in zip(tp, fp) if 10 * t >= p * total], default=0.0) for p in range(11)]
        result.append(sum(points) / 11)
    return float(np.mean(result))


@pytest.mark.parametrize("seed", range(5))
def test_random_scenes_against_the_devkits_loops(seed):
    rng = np.random.default_rng(seed)
    records, rows = [], []
    for i in range(12):
        corner, extent = rng.integers(0, 60, (6, 2)), rng.integers(10, 40, (6, 2))
        labels = rng.integers(0, 3, 6)
        records.append(
            make_record(
                id=i, name=str(i), path="/x", width=100, height=100, boxes=np.concatenate((corner, corner + extent), 1),
                labels=labels, difficult=rng.random(6) < 0.3,
            )
        )  # fmt: skip
        for g in rng.integers(0, 6, 20):
            moved = np.concatenate((corner[g], corner[g] + extent[g])) + rng.integers(-4, 5, 4)
            label = labels[g] if rng.random() < 0.8 else rng.integers(0, 3)
            rows.append((i, moved, rng.integers(0, 20) / 20, label))
    data = Dataset("/", "voc", "test", ("a", "b", "c"), ("a", "b", "c"), records)
    images, labels = np.array([r[0] for r in rows]), np.array([r[3] for r in rows])
    boxes, scores = np.stack([r[1] for r in rows]).astype(np.float64), np.array([r[2] for r in rows])
    result = voc07_metrics(data, images, boxes, scores, labels)
    for percent in (50, 75, 95):
        assert result[f"AP{percent}"] == approx(reference(data, images, boxes, scores, labels, percent)), percent


def test_half_a_million_detections_take_seconds():
    rng = np.random.default_rng(0)
    records = []
    for i in range(5000):
        corner = rng.uniform(0, 300, (3, 2))
        boxes = np.concatenate((corner, corner + rng.uniform(20, 180, (3, 2))), 1)
        records.append(
            make_record(id=i, name=str(i), path="/", width=500, height=500, boxes=boxes, labels=rng.integers(0, 20, 3))
        )
    data = Dataset("/", "voc", "test", tuple("abcdefghijklmnopqrst"), tuple("abcdefghijklmnopqrst"), records)
    count = 500_000
    corner = rng.uniform(0, 300, (count, 2))
    boxes = np.concatenate((corner, corner + rng.uniform(20, 180, (count, 2))), 1)
    start = time.perf_counter()
    voc07_metrics(data, rng.integers(0, 5000, count), boxes, rng.random(count), rng.integers(0, 20, count))
    assert time.perf_counter() - start < 15
