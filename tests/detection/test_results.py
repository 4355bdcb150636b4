"""Test images without annotations, and the result files `ioubal eval --save-results` writes."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ioubal_kernels.detection.data import DataError, check_dataset, load_dataset, load_pair, make_record
from ioubal_kernels.detection.data.records import Dataset
from ioubal_kernels.detection.errors import OutputError, UsageError
from ioubal_kernels.detection.evaluate import ImageDetections
from ioubal_kernels.detection.presets import preset
from ioubal_kernels.detection.progress import Reporter
from ioubal_kernels.detection.results import coco_results, save_coco_results
from ioubal_kernels.detection.train import train

CATEGORIES = [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}]


def image_list(first=1, **more):
    images = [{"id": first + k, "file_name": f"{first + k:012}.jpg", "width": 16, "height": 12} for k in range(2)]
    return {"info": {}, "images": images, "categories": CATEGORIES, **more}


def coco2017(root: Path, **changes):
    """The layout of COCO 2017: test-dev2017 is a part of test2017, whose folder holds the images of both."""
    (root / "annotations").mkdir(parents=True)
    box = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [2, 3, 5, 4], "area": 18.0, "iscrowd": 0}
    for split in ("train2017", "val2017", "test2017"):
        (root / split).mkdir()
        for k in range(1, 4):
            Image.new("RGB", (16, 12), (k, len(split), 0)).save(root / split / f"{k:012}.jpg")
    for name, data in {
        "instances_train2017": image_list(annotations=[box]),
        "instances_val2017": image_list(annotations=[box]),
        "captions_val2017": {},
        "image_info_test2017": image_list(),
        "image_info_test-dev2017": {**image_list(2), **changes},
    }.items():
        (root / f"annotations/{name}.json").write_text(json.dumps(data))
    return root


def test_coco_test_images(tmp_path):
    pair = load_pair(coco2017(tmp_path))
    assert (pair.training.split, pair.evaluation.split) == ("train2017", "val2017")
    assert set(pair.training.splits) == {"train2017", "val2017", "test2017", "test-dev2017"}
    test = load_dataset(tmp_path, "test-dev2017")
    assert (test.labelled, test.num_boxes, test.classes, test.category_ids) == (False, 0, ("dog", "cat"), (3, 7))
    assert [r.id for r in test.records] == [2, 3]
    assert test.records[0].path == str(tmp_path / "test2017/000000000002.jpg")
    assert len(load_dataset(tmp_path, "test2017")) == 2
    # A checkpoint's order of classes.
    assert load_dataset(tmp_path, "test-dev2017", classes=("cat", "dog")).category_ids == (7, 3)
    with pytest.raises(DataError, match="split 'test-dev2017' has no annotations"):
        load_pair(tmp_path, eval_split="test-dev2017")
    report = check_dataset(tmp_path)
    assert "split test-dev2017: it has no annotations and was not checked" in report.warnings
    assert check_dataset(tmp_path, splits=("test-dev2017",)).ok


def test_only_test_images_are_no_default(tmp_path):
    coco2017(tmp_path)
    for name in ("instances_train2017", "instances_val2017", "image_info_test2017"):
        (tmp_path / f"annotations/{name}.json").unlink()
    for role in ("train", "eval"):
        with pytest.raises(DataError, match=f"no default split for {role}: name one of test-dev2017"):
            load_dataset(tmp_path, role=role)


def test_categories_from_the_caller(tmp_path):
    coco2017(tmp_path, categories=[])
    with pytest.raises(DataError, match="'categories': expected at least one, got none"):
        load_dataset(tmp_path, "test-dev2017")
    test = load_dataset(tmp_path, "test-dev2017", classes=("cat", "dog"), category_ids=(17, 5))
    assert (test.classes, test.category_ids) == (("cat", "dog"), (17, 5))
    with pytest.raises(DataError, match="category_ids: expected one for each of 2 classes, got 1"):
        load_dataset(tmp_path, "test-dev2017", classes=("cat", "dog"), category_ids=(17,))


@pytest.mark.parametrize("annotations", [None, []])
def test_a_test_split_without_annotations_in_its_file(tmp_path, annotations):
    coco2017(tmp_path)
    data = image_list() if annotations is None else image_list(annotations=annotations)
    (tmp_path / "annotations/instances_test2017.json").write_text(json.dumps(data))
    assert not load_dataset(tmp_path, "test2017").labelled
    assert load_pair(tmp_path).evaluation.split == "val2017"
    # Any other split without them is a mistake.
    (tmp_path / "annotations/instances_val2017.json").write_text(json.dumps(image_list()))
    with pytest.raises(DataError, match="the key 'annotations' is missing"):
        load_dataset(tmp_path, "val2017")


def test_a_difficult_box_of_a_converted_file(tmp_path):
    coco2017(tmp_path)
    path = tmp_path / "annotations/instances_val2017.json"
    data = json.loads(path.read_text())
    data["annotations"][0].update(iscrowd=1, difficult=1)
    path.write_text(json.dumps(data))
    record = load_dataset(tmp_path, "val2017").records[0]
    assert (record.difficult.tolist(), record.iscrowd.tolist()) == ([True], [False])
    data["annotations"][0].update(difficult=2)
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match="annotation 1: difficult: expected 0 or 1, got 2"):
        load_dataset(tmp_path, "val2017")


def result_set(ids=(5, 9)):
    records = [
        make_record(
            id=k, name=f"{k}.png", path="/x", width=100, height=100, boxes=[[0, 0, 9, 9]], labels=[0], source_id=i
        )
        for k, i in enumerate(ids, 1)
    ]
    return Dataset("/", "coco", "val", ("cat", "dog"), (17, 3), records)


def found(image_id, boxes, scores, labels):
    return ImageDetections(image_id, torch.tensor(boxes), torch.tensor(scores), torch.tensor(labels))


def test_result_entries(tmp_path):
    """The data set's ids, x y w h with two decimals (of differences, not of rounded corners), five of the score."""
    detections = [
        found(2, [[1.004, 2.006, 11.008, 22.0]], [0.123456789], [1]),
        found(1, [[0.0, 0, 9, 9], [1, 1, 2, 3]], [1.0, 0.000001], [0, 1]),
        found(2, [[0.0, 0, 9, 9]], [0.5], [0]),
    ]
    expected = [
        {"image_id": 9, "category_id": 3, "bbox": [1.0, 2.01, 10.0, 19.99], "score": 0.12346},
        {"image_id": 5, "category_id": 17, "bbox": [0.0, 0.0, 9.0, 9.0], "score": 1.0},
        {"image_id": 5, "category_id": 3, "bbox": [1.0, 1.0, 1.0, 2.0], "score": 0.0},
    ]
    assert coco_results(result_set(), detections) == expected
    path = tmp_path / "r.json"
    assert save_coco_results(path, result_set(), detections) == 3
    assert json.loads(path.read_text()) == expected and len(path.read_text().splitlines()) == 3
    assert save_coco_results(path, result_set(), []) == 0 and json.loads(path.read_text()) == []
    assert coco_results(result_set(("a", "b")), detections)[0]["image_id"] == "b"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (found(3, [[0.0, 0, 1, 1]], [0.5], [0]), "image 3: expected an image of split 'val'"),
        (found(1, [[0.0, 0, 1, 1]], [0.5], [2]), r"image 1: labels: expected 0 .. 1, got \[2\]"),
        (found(1, [[0.0, 0, 1, float("nan")]], [0.5], [0]), "boxes, scores: expected finite numbers"),
        (found(1, [[0.0, 0, 1, 1]], [float("inf")], [0]), "boxes, scores: expected finite numbers"),
    ],
)
def test_bad_detections_leave_the_old_file(tmp_path, item, message):
    path = tmp_path / "r.json"
    path.write_text("old")
    with pytest.raises(UsageError, match=message):
        save_coco_results(path, result_set(), [item])
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["r.json"]


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    """A model after two steps, which finds something everywhere."""
    config = preset("retinanet_tiny")
    for key, value in {
        "data.path": tiny_data, "data.image_size": [64, 64], "data.workers": 0, "train.iterations": 2,
        "train.batch_size": 4, "train.eval_every": 0, "train.amp": "off", "train.device": "cpu",
        "loss.calibration_batches": 1, "inference.score_threshold": 0.001, "inference.max_detections": 10,
    }.items():  # fmt: skip
        config.set(key, value)
    folder = tmp_path_factory.mktemp("results") / "run"
    train(config, folder, reporter=Reporter(quiet=True))
    return folder


OPTIONS = ("--device", "cpu", "--amp", "off", "--workers", "0")


def pycocotools_ap(truth, results):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        evaluation = COCOeval(coco, coco.loadRes(str(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


def test_eval_saves_what_pycocotools_reads(ioubal, run, tiny_data, tmp_path):
    path = tmp_path / "r.json"
    code, out, err = ioubal("eval", run, "--data", tiny_data, "--json", "--save-results", path, *OPTIONS)
    assert (code, err) == (0, "")
    metrics = json.loads(out)
    assert metrics["detections"] == len(json.loads(path.read_text())) > 0 and "VOC07" not in metrics
    truth = Path(tiny_data) / "annotations/instances_val.json"
    # Two decimals of a box move IoUs by less than 1e-3.
    assert pycocotools_ap(truth, path) == pytest.approx(metrics["AP"], abs=0.02)
    code, out, _ = ioubal("eval", run, "--data", tiny_data, "--voc07", *OPTIONS)
    assert code == 0 and "Pascal VOC 2007, 11 points" in out and "AP95" in out and "by class" in out


@pytest.mark.parametrize("categories", [True, False])
def test_eval_of_images_without_annotations(ioubal, run, tiny_data, tmp_path, categories):
    """The val images as a test-dev split, with ids and categories of its own or the checkpoint's."""
    root = tmp_path / "set"
    shutil.copytree(Path(tiny_data) / "images/val", root / "test2017")
    data = json.loads((Path(tiny_data) / "annotations/instances_val.json").read_text())
    del data["annotations"]
    for item in data["images"]:
        item["id"] += 1000
    for item in data["categories"]:
        item["id"] *= 11
    if not categories:
        del data["categories"]
    (root / "annotations").mkdir()
    (root / "annotations/image_info_test-dev2017.json").write_text(json.dumps(data))
    arguments = ("eval", run, "--data", root, "--split", "test-dev2017", *OPTIONS)
    code, _, err = ioubal(*arguments)
    assert code == 2 and "--split test-dev2017: it has no annotations" in err and "--save-results FILE.json" in err
    path = tmp_path / "r.json"
    code, out, err = ioubal(*arguments, "--save-results", path)
    results = json.loads(path.read_text())
    assert (code, err) == (0, "") and f"{len(results)} detections on 6 images in" in out and "AP50" not in out
    assert {item["image_id"] for item in results} <= {item["id"] for item in data["images"]}
    ids = {11, 22, 33} if categories else {1, 2, 3}
    assert len(results) > 0 and {item["category_id"] for item in results} <= ids
    code, out, _ = ioubal(*arguments, "--save-results", path, "--json")
    assert json.loads(out) == {"images": 6, "detections": len(results)}
    # With the annotations that the server has, pycocotools takes the file.
    full = json.loads((Path(tiny_data) / "annotations/instances_val.json").read_text())
    for item in full["images"]:
        item["id"] += 1000
    for item in full["annotations"]:
        item["image_id"] += 1000
        item["category_id"] *= 11 if categories else 1
    full["categories"] = [{**c, "id": c["id"] * (11 if categories else 1)} for c in full["categories"]]
    (tmp_path / "truth.json").write_text(json.dumps(full))
    assert 0 <= pycocotools_ap(tmp_path / "truth.json", path) <= 1


def test_eval_fails_early_when_the_file_cannot_be_written(ioubal, run, tiny_data, tmp_path):
    code, _, err = ioubal("eval", run, "--data", tiny_data, "--save-results", tmp_path / "no/r.json", *OPTIONS)
    assert code == 3 and f"the folder {tmp_path / 'no'} does not exist" in err
    code, _, err = ioubal("eval", run, "--data", tiny_data, "--save-results", tmp_path, *OPTIONS)
    assert code == 3 and "it is a folder; expected the name of a JSON file" in err
    for name, content in (("truth.json", '{"images": []}'), ("photo.png", "png"), ("metrics.json", '{"AP": 0.5}')):
        (tmp_path / name).write_text(content)
        code, _, err = ioubal("eval", run, "--data", tiny_data, "--save-results", tmp_path / name, *OPTIONS)
        assert code == 3 and f"{name}: it exists and holds no COCO results" in err
        assert (tmp_path / name).read_text() == content
    assert issubclass(OutputError, OSError)


def test_check_warns_of_suspicious_boxes(tmp_path):
    coco2017(tmp_path)
    path = tmp_path / "annotations/instances_train2017.json"
    data = json.loads(path.read_text())
    boxes = [[0, 0, 16, 12], [1, 1, 0.5, 4], [1, 2, 14, 0.6], [3, 3, 5, 5], [0, 0, 10, 0.5]]
    data["annotations"] = [
        {"id": k, "image_id": 1 + k % 2, "category_id": 3 + 4 * (k % 2), "bbox": box, "iscrowd": int(k == 5)}
        for k, box in enumerate(boxes, 1)
    ]
    path.write_text(json.dumps(data))
    warnings = "\n".join(check_dataset(tmp_path).warnings)
    # The crowd region of 10 x 0.5 is not trained on; 14 : 0.6 is 23.3.
    assert "split train2017: boxes with a side below 1 pixel: 2 (000000000001.jpg, 000000000002.jpg)" in warnings
    assert "split train2017: boxes that are the whole image: 1 (000000000002.jpg)" in warnings
    assert "split train2017: boxes more than 20 times as long as wide: 1 (000000000002.jpg)" in warnings
    assert "split val2017: boxes" not in warnings
