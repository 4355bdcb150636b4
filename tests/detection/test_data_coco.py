"""The COCO reader: what it accepts, and a corpus of malformed files with the message each one gets."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ioubal_kernels.detection.data import DataError, describe, load_dataset, load_pair, quick_check, to_coco_dict


def annotation(**changes):
    return {"id": 1, "image_id": 1, "category_id": 3, "bbox": [2, 3, 5, 4], "area": 18.0, "iscrowd": 0, **changes}


def base():
    return {
        "images": [
            {"id": 1, "file_name": "a.png", "width": 16, "height": 12},
            {"id": 2, "file_name": "b.png", "width": 16, "height": 12},
        ],
        "annotations": [annotation()],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
    }


def write(root: Path, data, split="train", names=("a.png", "b.png")):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", (16, 12)).save(root / split / name)
    text = data if isinstance(data, (str, bytes)) else json.dumps(data)
    path = root / "annotations" / f"instances_{split}.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return root


def edit(**changes):
    data = base()
    data.update(changes)
    return data


def with_annotation(drop=None, **changes):
    item = annotation(**changes)
    if drop:
        del item[drop]
    return edit(annotations=[item])


def with_image(drop=None, **changes):
    data = base()
    data["images"][1].update(changes)
    if drop:
        del data["images"][1][drop]
    return data


def raw(old, new):
    text = json.dumps(base())
    assert old in text
    return text.replace(old, new, 1)


FAULTS = {
    "empty file": ("", "the file is empty"),
    "truncated": (json.dumps(base())[:-40], "not valid JSON: .* line 1, column"),
    "not json": ("<html>", "not valid JSON: Expecting value at line 1, column 1"),
    "trailing text": (json.dumps(base()) + " x", "Extra data"),
    "a list at the top": ("[]", "expected a JSON object at the top, got list"),
    "a number at the top": ("3", "expected a JSON object at the top, got int"),
    "invalid utf-8": (b'{"images": "\xff"}', "expected UTF-8 text, got byte 0xff"),
    "nested deeply": ("[" * 100_000, "nested too deeply"),
    "duplicate key": (raw('"images":', '"images": [], "images":'), "the key 'images' occurs twice"),
    "duplicate key inside": (raw('"area":', '"area": 1, "area":'), "the key 'area' occurs twice"),
    "NaN": (raw("18.0", "NaN"), "finite, got NaN"),
    "Infinity": (raw("18.0", "Infinity"), "finite, got Infinity"),
    "-Infinity": (raw("18.0", "-Infinity"), "finite, got -Infinity"),
    "overflow to infinity": (
        raw("[2, 3, 5, 4]", "[2, 3, 1e999, 4]"),
        "annotation 1: bbox: expected four finite numbers",
    ),
    "5000 digits": (raw("18.0", "1" * 5000), "not usable: Exceeds the limit"),
    "no images key": ({k: v for k, v in base().items() if k != "images"}, "the key 'images' is missing"),
    "no annotations key": ({k: v for k, v in base().items() if k != "annotations"}, "the key 'annotations' is missing"),
    "no categories key": ({k: v for k, v in base().items() if k != "categories"}, "the key 'categories' is missing"),
    "images an object": (edit(images={}), "'images': expected a list, got dict"),
    "annotations null": (edit(annotations=None), "'annotations': expected a list, got NoneType"),
    "annotation a string": (edit(annotations=["x"]), r"annotations\[0\]: expected an object, got 'x'"),
    "no images": (edit(images=[], annotations=[]), "'images': expected at least one, got none"),
    "no categories": (edit(categories=[], annotations=[]), "'categories': expected at least one, got none"),
    "category twice": (edit(categories=[{"id": 3, "name": "a"}] * 2), r"categories\[1\]: id 3 is used twice"),
    "category name twice": (
        edit(categories=[{"id": 3, "name": "a"}, {"id": 4, "name": "a"}]),
        "category 4: the name 'a' is already that of category 3",
    ),
    "category without a name": (edit(categories=[{"id": 3}]), "category 3: name: expected a string, got None"),
    "category id a float": (
        edit(categories=[{"id": 3.5, "name": "a"}]),
        "id: expected an integer or a string, got 3.5",
    ),
    "category ids mixed": (
        edit(categories=[{"id": 3, "name": "a"}, {"id": "4", "name": "b"}]),
        "category ids: expected all integers or all strings",
    ),
    "image id twice": (with_image(id=1), "image 1: the id is used twice"),
    "image without an id": (with_image(drop="id"), r"images\[1\]: id: expected an integer or a string, got None"),
    "image id a bool": (with_image(id=True), r"images\[1\]: id: expected an integer or a string, got True"),
    "image id beyond 64 bits": (with_image(id=2**63), r"images\[1\]: id: expected an integer or a string, got 9223"),
    "and below": (with_image(id=-(2**63) - 1), r"images\[1\]: id: expected an integer or a string, got -9223"),
    "image without a name": (with_image(drop="file_name"), "image 2: file_name None is refused: expected a string"),
    "image without a width": (with_image(drop="width"), "image 2: width: expected a positive integer, got None"),
    "image height 0": (with_image(height=0), "image 2: height: expected a positive integer, got 0"),
    "image width a float": (with_image(width=16.5), "image 2: width: expected a positive integer, got 16.5"),
    "annotation id twice": (edit(annotations=[annotation(), annotation()]), "annotation 1: the id is used twice"),
    "annotation id a list": (with_annotation(id=[1]), r"annotations\[0\]: id: expected an integer or a string"),
    "no image_id": (with_annotation(drop="image_id"), "annotation 1: image_id is missing"),
    "unknown image_id": (with_annotation(image_id=99), "annotation 1: image_id 99 is unknown"),
    "no category_id": (with_annotation(drop="category_id"), "annotation 1: category_id is missing"),
    "unknown category_id": (with_annotation(category_id=99), "annotation 1: category_id 99 is unknown"),
    "category_id a string": (with_annotation(category_id="3"), "annotation 1: category_id '3' is unknown"),
    "no bbox": (with_annotation(drop="bbox"), "annotation 1: bbox is missing"),
    "bbox of three": (with_annotation(bbox=[1, 2, 3]), r"bbox: expected \[x, y, width, height\], got \[1, 2, 3\]"),
    "bbox a string": (with_annotation(bbox="1234"), r"bbox: expected \[x, y, width, height\], got '1234'"),
    "bbox of strings": (with_annotation(bbox=["1", "2", "3", "4"]), "bbox: expected four finite numbers"),
    "bbox with null": (with_annotation(bbox=[1, None, 3, 4]), "bbox: expected four finite numbers"),
    "bbox with a huge integer": (with_annotation(bbox=[1, 2, 10**400, 4]), "bbox: expected four finite numbers"),
    "negative width": (with_annotation(bbox=[1, 2, -3, 4]), "bbox: expected width and height >= 0, got -3 x 4"),
    "iscrowd 2": (with_annotation(iscrowd=2), "annotation 1: iscrowd: expected 0 or 1, got 2"),
    "negative area": (with_annotation(area=-1), "annotation 1: area: expected a number >= 0, got -1"),
    "area a string": (with_annotation(area="big"), "annotation 1: area: expected a number >= 0, got 'big'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_malformed_file(tmp_path, name):
    data, message = FAULTS[name]
    write(tmp_path, data)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(tmp_path, "train")
    assert "instances_train.json" in str(caught.value)


TRAVERSAL = {
    "parent": "../a.png",
    "parent inside": "x/../../../a.png",
    "parent at the end": "x/..",
    "absolute": "/etc/hostname",
    "home": "~/a.png",
    "drive": "C:a.png",
    "drive with slash": "c:/a.png",
    "backslash": "..\\a.png",
    "unc": "\\\\host\\a.png",
    "NUL": "a.png\x00.jpg",
    "empty": "",
    "blank": "  ",
    "very long": "a" * 300 + ".png",
    "very deep": "a/" * 600 + "a.png",
    "half a surrogate pair": "\ud800.png",
}


@pytest.mark.parametrize("name", TRAVERSAL)
def test_unsafe_file_name(tmp_path, name):
    write(tmp_path, with_image(file_name=TRAVERSAL[name]))
    with pytest.raises(DataError, match="image 2: file_name .* is refused: "):
        load_dataset(tmp_path, "train")


def test_link_to_outside_is_refused_unless_allowed(tmp_path):
    write(tmp_path / "set", base(), names=("a.png",))
    Image.new("RGB", (16, 12)).save(tmp_path / "secret.png")
    (tmp_path / "set/train/b.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match="b.png: it is a link to outside the dataset's folder"):
        load_dataset(tmp_path / "set", "train")
    assert len(load_dataset(tmp_path / "set", "train", allow_symlinks=True)) == 2


def test_linked_folder_to_outside_is_refused(tmp_path):
    write(tmp_path / "set", base())
    os.rename(tmp_path / "set/train", tmp_path / "elsewhere")
    (tmp_path / "set/train").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="2 problems(.|\n)*a.png: it is a link to outside"):
        load_dataset(tmp_path / "set", "train")


def test_link_inside_and_linked_root_are_fine(tmp_path):
    write(tmp_path / "set", base(), names=("a.png",))
    (tmp_path / "set/train/b.png").symlink_to("a.png")
    (tmp_path / "alias").symlink_to(tmp_path / "set")
    assert len(load_dataset(tmp_path / "alias", "train")) == 2


def test_fifo_and_folder_are_not_opened(tmp_path):
    write(tmp_path, base(), names=())
    os.mkfifo(tmp_path / "train/a.png")
    (tmp_path / "train/b.png").mkdir()
    with pytest.raises(DataError, match="a.png: it is not a regular file(.|\n)*b.png: it is not a regular file"):
        load_dataset(tmp_path, "train")


def test_all_problems_are_counted_and_twenty_shown(tmp_path):
    write(tmp_path, edit(annotations=[annotation(id=k, category_id=99) for k in range(1, 34)]))
    with pytest.raises(DataError) as caught:
        load_dataset(tmp_path, "train")
    text = str(caught.value)
    assert len(caught.value.problems) == 33
    assert "33 problems" in text and "annotation 20: category_id 99" in text and "annotation 21:" not in text
    assert "... and 13 more (33 in total)" in text


def test_values_labels_and_defaults(tmp_path):
    crowd = annotation(id=2, iscrowd=1, category_id=7, bbox=[0, 0, 16, 12], area=100.0)
    plain = {"id": 3, "image_id": 2, "category_id": 7, "bbox": [1.5, 2, 3, 4]}
    write(tmp_path, edit(annotations=[annotation(), crowd, plain]))
    dataset = load_dataset(tmp_path, "train")
    # Category ids 3 (dog) and 7 (cat), sorted, become labels 0 and 1.
    assert dataset.classes == ("dog", "cat") and dataset.category_ids == (3, 7)
    first, second = dataset.records
    np.testing.assert_array_equal(first.boxes, np.array([[2, 3, 7, 7], [0, 0, 16, 12]], np.float32))
    np.testing.assert_array_equal(first.labels, [0, 1])
    np.testing.assert_array_equal(first.iscrowd, [False, True])
    np.testing.assert_array_equal(first.areas, [18, 100])
    # Crowd regions are kept for evaluation and not trained on.
    np.testing.assert_array_equal(first.train_boxes, [[2, 3, 7, 7]])
    np.testing.assert_array_equal(second.boxes, [[1.5, 2, 4.5, 6]])
    assert second.areas.tolist() == [12.0] and not second.iscrowd.any()
    assert (dataset.num_boxes, dataset.num_train_boxes) == (3, 2)
    assert "1 of them crowd or difficult" in describe(dataset)
    assert first.boxes.dtype == np.float32 and first.labels.dtype == np.int64


def test_boxes_are_clipped_and_empty_ones_dropped(tmp_path):
    boxes = [[-2, 3, 5, 4], [1, 1, 0, 5], [20, 1, 3, 3], [10, 10, 10, 10], [3, 3, 2, 2]]
    write(tmp_path, edit(annotations=[annotation(id=k + 1, bbox=box) for k, box in enumerate(boxes)]))
    dataset = load_dataset(tmp_path, "train")
    np.testing.assert_array_equal(dataset.records[0].boxes, [[0, 3, 3, 7], [10, 10, 16, 12], [3, 3, 5, 5]])
    assert dataset.notes.counts() == {
        "empty boxes dropped": 1,
        "boxes outside the image dropped": 1,
        "boxes clipped to the image": 2,
    }
    assert "empty boxes dropped: 1 (a.png)" in describe(dataset)


@pytest.mark.parametrize(
    ("bbox", "areas", "notes"),
    [
        ([-10, 2, 15, 4], [5 * 4], {"boxes clipped to the image": 1}),
        ([10, 3, 1e-9, 4], [], {"boxes outside the image dropped": 1}),  # no width in float32
    ],
)
def test_what_is_left_of_a_box_counts(tmp_path, bbox, areas, notes):
    """A file without areas: the size class of a box (APs, APm, APl) is that of the part inside the image."""
    dataset = load_dataset(write(tmp_path, with_annotation(drop="area", bbox=bbox)), "train")
    assert dataset.records[0].areas.tolist() == areas and dataset.notes.counts() == notes


def test_string_ids_large_ids_and_order_do_not_matter(tmp_path):
    data = base()
    data["images"] = [{**data["images"][1], "id": "b"}, {**data["images"][0], "id": "a"}]
    data["categories"] = [{"id": "z", "name": "late"}, {"id": "k", "name": "early"}]
    data["annotations"] = [annotation(id="x", image_id="a", category_id="z")]
    dataset = load_dataset(write(tmp_path / "strings", data), "train")
    assert [(r.id, r.source_id, r.name) for r in dataset.records] == [(1, "a", "a.png"), (2, "b", "b.png")]
    assert dataset.classes == ("early", "late") and dataset.records[0].labels.tolist() == [1]

    data = base()
    data["images"][0]["id"] = 2**40
    data["annotations"][0].update(id=0, image_id=2**40, category_id=0)
    data["categories"].append({"id": 0, "name": "zero"})
    dataset = load_dataset(write(tmp_path / "large", data), "train")
    assert [r.id for r in dataset.records] == [2, 2**40] and dataset.classes == ("zero", "dog", "cat")
    assert dataset.records[1].labels.tolist() == [0]


def test_byte_order_mark_and_unicode_names(tmp_path):
    data = base()
    data["images"][0]["file_name"] = "ä b.png"
    write(tmp_path, b"\xef\xbb\xbf" + json.dumps(data, ensure_ascii=False).encode(), names=("ä b.png", "b.png"))
    assert load_dataset(tmp_path, "train").records[0].name == "ä b.png"


@pytest.mark.parametrize("folder", ["train2017", "images/train2017", "images", "."])
def test_image_folders(tmp_path, folder):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps(base()))
    (tmp_path / "annotations/captions_train2017.json").write_text("not read")
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (16, 12)).save(tmp_path / folder / name)
    dataset = load_dataset(tmp_path)
    assert dataset.split == "train2017" and dataset.splits == ("train2017",)
    assert Path(dataset.records[0].path) == (tmp_path / folder / "a.png").resolve()


def test_files_of_other_tasks_are_no_splits(tmp_path):
    write(tmp_path, base())
    (tmp_path / "annotations/instances_train.json").rename(tmp_path / "annotations/train.json")
    for task in ("captions", "person_keypoints", "stuff", "panoptic"):
        (tmp_path / f"annotations/{task}_train.json").write_text("not read")
    assert load_dataset(tmp_path).splits == ("train",)


def test_annotations_beside_the_images(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(base()))
        for name in ("a.png", "b.png"):
            Image.new("RGB", (16, 12)).save(tmp_path / split / name)
    pair = load_pair(tmp_path)
    assert (pair.training.split, pair.evaluation.split) == ("train", "test")


def test_no_image_found_names_the_places(tmp_path):
    write(tmp_path, base(), names=())
    with pytest.raises(DataError, match="expected 'a.png' in one of train/, images/train/, images/, ./"):
        load_dataset(tmp_path, "train")
    # One missing image does not hide the folder of the others.
    write(tmp_path, base(), names=("b.png",))
    with pytest.raises(DataError, match="train/a.png: the file does not exist"):
        load_dataset(tmp_path, "train")


def test_default_splits_and_same_classes(tmp_path):
    write(tmp_path, base(), "train2017")
    other = base()
    other["categories"] = [{"id": 3, "name": "dog"}, {"id": 2, "name": "cat"}]
    write(tmp_path, other, "val2017")
    pair = load_pair(tmp_path)
    assert (pair.training.split, pair.evaluation.split) == ("train2017", "val2017")
    # Sorted by id the second file would have cat first; the training split decides.
    assert pair.training.classes == pair.evaluation.classes == ("dog", "cat")
    assert pair.evaluation.category_ids == (3, 2)
    assert pair.evaluation.records[0].labels.tolist() == [0]
    with pytest.raises(DataError, match="split 'test' does not exist: expected one of train2017, val2017"):
        load_dataset(tmp_path, "test")
    with pytest.raises(DataError, match="training and evaluation split are the same: 'val2017'"):
        load_pair(tmp_path, "val2017", "val2017")


def test_splits_of_which_none_is_taken_by_itself(tmp_path):
    """The only split is not measured on as well; of two years one has to be named."""
    pair = load_pair(write(tmp_path / "one", base(), "val"))
    assert pair.training.split == "val" and pair.evaluation is None
    for year in (2014, 2017):
        write(tmp_path / "two", base(), f"train{year}")
    with pytest.raises(DataError, match="no default split for train: name one of train2014, train2017"):
        load_dataset(tmp_path / "two")


def test_a_test_split_without_annotations_is_not_evaluated_on(tmp_path):
    for split in ("train", "val", "test"):
        data = base()
        if split == "test":
            del data["annotations"]
        write(tmp_path, data, split)
    pair = load_pair(tmp_path)
    assert (pair.training.split, pair.evaluation.split) == ("train", "val")


def test_classes_of_a_checkpoint(tmp_path):
    write(tmp_path, base())
    dataset = load_dataset(tmp_path, "train", classes=("bird", "cat", "dog"))
    assert dataset.records[0].labels.tolist() == [2] and dataset.num_classes == 3
    # Result files take the checkpoint's id for a class that the file lacks, never that of another class.
    for bird, expected in ((5, 5), (3, "bird")):
        ids = load_dataset(tmp_path, "train", classes=("bird", "cat", "dog"), category_ids=(bird, 1, 2)).category_ids
        assert ids == (expected, 7, 3)
    with pytest.raises(DataError, match="classes: expected only bird, dog; got also cat"):
        load_dataset(tmp_path, "train", classes=("bird", "dog"))


def test_ground_truth_for_pycocotools(tmp_path):
    write(tmp_path, edit(annotations=[annotation(id=0), annotation(id=9, iscrowd=1, category_id=7)]))
    truth = to_coco_dict(load_dataset(tmp_path, "train"))
    assert truth["annotations"] == [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 3, 5, 4], "area": 18.0, "iscrowd": 0, "ignore": 0},
        {"id": 2, "image_id": 1, "category_id": 2, "bbox": [2, 3, 5, 4], "area": 18.0, "iscrowd": 1, "ignore": 1},
    ]
    assert truth["categories"] == [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    assert [image["id"] for image in truth["images"]] == [1, 2]
    json.dumps(truth, allow_nan=False)


def test_perfect_detections_get_ap_one(tmp_path, capsys):
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    write(tmp_path, edit(annotations=[annotation(), annotation(id=2, image_id=2, bbox=[1, 1, 9, 9])]))
    truth = coco.COCO()
    truth.dataset = to_coco_dict(load_dataset(tmp_path, "train"))
    truth.createIndex()
    found = [{**a, "score": 0.9} for a in truth.dataset["annotations"]]
    evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_fingerprint_follows_the_content(tmp_path):
    first = load_dataset(write(tmp_path / "a", base()), "train")
    same = load_dataset(write(tmp_path / "b", base()), "train")
    other = load_dataset(write(tmp_path / "c", with_annotation(bbox=[2, 3, 5, 5])), "train")
    assert first.fingerprint() == same.fingerprint() != other.fingerprint()


def test_folder_errors(tmp_path):
    with pytest.raises(DataError, match="expected a folder, found nothing"):
        load_dataset(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="expected a folder, found a file"):
        load_dataset(tmp_path / "notes.txt")
    with pytest.raises(DataError, match="no dataset found: .*; the folder has notes.txt"):
        load_dataset(tmp_path)
    with pytest.raises(DataError, match="kind: expected one of auto, coco, voc, cityscapes, got 'yolo'"):
        load_dataset(tmp_path, kind="yolo")
    write(tmp_path, base())
    (tmp_path / "Annotations").mkdir(exist_ok=True)
    (tmp_path / "JPEGImages").mkdir()
    with pytest.raises(DataError, match="name the kind, coco or voc"):
        load_dataset(tmp_path)
    assert load_dataset(tmp_path, kind="coco").format == "coco"


def test_quick_check_lists_every_file(tmp_path):
    write(tmp_path, base(), names=("a.png",))
    dataset = load_dataset(tmp_path, "train", check_files=False)
    Image.new("RGB", (16, 13)).save(tmp_path / "train/a.png")
    with pytest.raises(DataError) as caught:
        quick_check(dataset)
    assert len(caught.value.problems) == 2
    assert "a.png: size mismatch: the annotation says 16 x 12, the file has 16 x 13" in str(caught.value)
    assert "b.png: the file does not exist" in str(caught.value)


def mutate(rng, text):
    """One to four random edits of the text: bytes replaced, removed, repeated, or a token put in."""
    data = bytearray(text)
    tokens = b'null -1 1e400 NaN [] {} "" true \xff \\ud800 99999999999999999999'.split()
    for _ in range(rng.randrange(1, 5)):
        start = rng.randrange(len(data))
        stop = min(len(data), start + rng.choice((1, 1, 2, 5, 30)))
        kind = rng.randrange(4)
        if kind == 0:
            data[start] = rng.randrange(256)
        elif kind == 1:
            del data[start:stop]
        elif kind == 2:
            data[start:start] = data[start:stop]
        else:
            data[start:stop] = rng.choice(tokens)
        data = data or bytearray(b" ")
    return bytes(data)


def test_mutated_files_give_only_the_documented_error(tmp_path):
    write(tmp_path, base())
    path = tmp_path / "annotations/instances_train.json"
    original = path.read_bytes()
    rng, refused = random.Random(7), 0
    for _ in range(1000):
        path.write_bytes(mutate(rng, original))
        try:
            dataset = load_dataset(tmp_path, "train", check_files=False)
        except DataError:
            refused += 1
            continue
        for record in dataset.records:
            boxes = record.boxes
            assert np.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
            assert ((record.labels >= 0) & (record.labels < dataset.num_classes)).all()
            assert record.path.startswith(str(tmp_path))
    assert 300 < refused < 1000


@pytest.mark.parametrize(
    ("boxes", "text"),
    [
        ([[4, 4, 12, 10]] * 12, "most boxes reach out of their image: are they x, y, width, height, in pixels"),
        ([[40, 4, 12, 10]] * 12, "most boxes reach out of their image"),
        ([[0.2, 0.2, 0.5, 0.6]] * 12, "most boxes are smaller than a pixel: are the coordinates shares of the image"),
        ([[4, 4, 6, 5]] * 7 + [[4, 4, 12, 10]] * 5, None),
        ([[4, 4, 12, 10]] * 9, None),  # too few to say
    ],
)
def test_boxes_in_another_convention_are_pointed_out(tmp_path, boxes, text):
    items = [annotation(id=k, bbox=box) for k, box in enumerate(boxes, 1)]
    shown = describe(load_dataset(write(tmp_path, edit(annotations=items))))
    assert ("warning: " in shown) == (text is not None) and (text or "") in shown
