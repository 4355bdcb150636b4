"""The Cityscapes reader on small folders in the exact layout: masks, polygons, crowd regions, malformed files."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ioubal_kernels.detection.data import DataError, check_dataset, describe, load_dataset, load_pair
from ioubal_kernels.detection.data.cityscapes import CLASS_IDS, mask_boxes, read_polygons

WIDTH, HEIGHT = 40, 24
NAME = "aachen_000000_000019"


def mask(*rectangles, width=WIDTH, height=HEIGHT):
    """Ids (height, width): road, and over it (id, x1, y1, x2, y2) in order."""
    ids = np.full((height, width), 7, np.uint16)
    for value, x1, y1, x2, y2 in rectangles:
        ids[y1:y2, x1:x2] = value
    return ids


def polygon(label, x1, y1, x2, y2, **more):
    """A rectangle whose drawn pixels are x1 .. x2 - 1, y1 .. y2 - 1: Pillow draws the outline's last pixels too."""
    return {"label": label, "polygon": [[x1, y1], [x2 - 1, y1], [x2 - 1, y2 - 1], [x1, y2 - 1]], **more}


def write(root: Path, name=NAME, split="train", ids=None, objects=None, width=WIDTH, height=HEIGHT):
    city = name.split("_")[0]
    images, labels = root / "leftImg8bit" / split / city, root / "gtFine" / split / city
    images.mkdir(parents=True, exist_ok=True)
    labels.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(list(root.rglob("*leftImg8bit.png"))))
    Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(images / f"{name}_leftImg8bit.png")
    if ids is not None:
        Image.fromarray(ids).save(labels / f"{name}_gtFine_instanceIds.png")
    if objects is not None:
        data = {"imgWidth": width, "imgHeight": height, "objects": objects}
        (labels / f"{name}_gtFine_polygons.json").write_text(json.dumps(data))
    # What lies beside them on disk and is not read.
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(labels / f"{name}_gtFine_labelIds.png")
    return root


def test_boxes_of_visible_pixels(tmp_path):
    """A person (24) in front of a car (26): the car is seen left and right of it, its box spans both parts."""
    ids = mask((26000, 4, 6, 20, 14), (24003, 10, 4, 13, 24), (33, 30, 0, 40, 5), (29001, 0, 20, 5, 24))
    ids[20, 25] = 32001  # one pixel
    write(tmp_path, ids=ids)
    dataset = load_dataset(tmp_path)
    assert (dataset.format, dataset.split, dataset.labelled) == ("cityscapes", "train", True)
    assert dataset.classes == ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
    assert dataset.category_ids == (24, 25, 26, 27, 28, 31, 32, 33)
    record = dataset.records[0]
    assert (record.name, record.source_id, record.width, record.height) == (NAME, NAME, WIDTH, HEIGHT)
    # Sorted by id: 33 (bicycles as a region), 24003, 26000, 32001; the caravan (29) is no evaluated class.
    assert record.boxes.tolist() == [[30, 0, 40, 5], [10, 4, 13, 24], [4, 6, 20, 14], [25, 20, 26, 21]]
    assert record.labels.tolist() == [7, 0, 2, 6]
    assert record.iscrowd.tolist() == [True, False, False, False]
    # The car's 16 x 8 pixels less the 3 x 8 behind the person.
    assert record.areas.tolist() == [50, 60, 16 * 8 - 3 * 8, 1]
    assert record.boxes.dtype == record.areas.dtype == np.float32 and record.labels.dtype == np.int64


def test_random_masks_against_a_loop():
    rng = np.random.default_rng(0)
    choices = np.array([0, 7, 24, 26, 24000, 24001, 26005, 33999, 29000, 30], np.uint16)
    for _ in range(20):
        height, width = rng.integers(1, 12, 2)
        ids = choices[rng.integers(0, len(choices), (height, width))]
        found = mask_boxes(ids)
        expected = []
        for value in sorted({int(v) for v in ids.flat}):
            class_id = value if value < 1000 else value // 1000
            if class_id in CLASS_IDS.values():
                ys, xs = np.nonzero(ids == value)
                box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
                expected.append((box, list(CLASS_IDS.values()).index(class_id), value < 1000, len(xs)))
        assert found.boxes.tolist() == [item[0] for item in expected]
        assert found.labels.tolist() == [item[1] for item in expected]
        assert found.iscrowd.tolist() == [item[2] for item in expected]
        assert found.areas.tolist() == [item[3] for item in expected]
        assert found.size == (width, height)


def test_a_full_size_mask_is_read_quickly():
    """A street's worth of instances; the best of five, with room for a busy machine."""
    rng = np.random.default_rng(1)
    ids = np.full((1024, 2048), 7, np.uint16)
    for k in range(80):
        y, x = rng.integers(0, 900), rng.integers(0, 1900)
        ids[y : y + rng.integers(5, 200), x : x + rng.integers(5, 300)] = 26000 + k
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        mask_boxes(ids)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.1


def test_polygons_later_ones_lie_over_earlier_ones(tmp_path):
    objects = [
        polygon("road", 0, 0, WIDTH, HEIGHT),
        polygon("car", 4, 6, 20, 14),
        polygon("person", 10, 4, 13, 24),
        polygon("cargroup", 30, 0, 40, 5),
        polygon("car", 22, 6, 28, 14),
        polygon("building", 24, 0, 28, 24),  # hides the second car's right part
        polygon("person", 0, 0, 3, 3, deleted=1),
        polygon("license plate", 5, 7, 6, 8),  # not painted
        polygon("bus", 0, 20, 4, 24),
        polygon("vegetation", 0, 20, 4, 24),  # hides the bus altogether
    ]
    write(tmp_path, objects=objects)
    record = load_dataset(tmp_path).records[0]
    assert record.boxes.tolist() == [[30, 0, 40, 5], [10, 4, 13, 24], [4, 6, 20, 14], [22, 6, 24, 14]]
    assert record.labels.tolist() == [2, 0, 2, 2]
    assert record.iscrowd.tolist() == [True, False, False, False]
    assert record.areas.tolist() == [50, 60, 104, 16]


def test_polygons_only_where_the_mask_is_missing(tmp_path):
    write(tmp_path, ids=mask((26000, 4, 6, 20, 14)), objects=[polygon("person", 0, 0, 9, 9)])
    write(tmp_path, "bonn_000001_000019", objects=[polygon("person", 0, 0, 9, 9)])
    first, second = load_dataset(tmp_path).records
    assert (first.name, first.labels.tolist(), second.name, second.labels.tolist()) == (
        NAME, [2], "bonn_000001_000019", [0],
    )  # fmt: skip


def test_many_instances_of_a_class(tmp_path):
    path = tmp_path / "x.json"
    objects = [polygon("car", k % 40, 0, k % 40 + 1, 1) for k in range(1000)]
    path.write_text(json.dumps({"imgWidth": 40, "imgHeight": 4, "objects": objects}))
    assert len(read_polygons(str(path)).boxes) == 40  # the last of each column is seen
    path.write_text(json.dumps({"imgWidth": 40, "imgHeight": 4, "objects": objects + objects[:1]}))
    with pytest.raises(DataError, match=r"objects\[1000\]: expected at most 1000 objects of a class"):
        read_polygons(str(path))


def test_splits_and_the_unlabelled_test_set(tmp_path):
    write(tmp_path, ids=mask((26000, 4, 6, 20, 14)))
    write(tmp_path, "frankfurt_000000_000294", "val", ids=mask((24000, 0, 0, 5, 9)))
    write(tmp_path, "berlin_000000_000019", "test", objects=[polygon("out of roi", 0, 0, 9, 9)])
    pair = load_pair(tmp_path)
    assert (pair.training.split, pair.evaluation.split) == ("train", "val")
    assert pair.training.splits == ("train", "val", "test")
    test = load_dataset(tmp_path, "test")
    assert (test.labelled, len(test), test.num_boxes) == (False, 1, 0)
    assert (test.records[0].width, test.records[0].height) == (WIDTH, HEIGHT)
    assert "split    test: 1 images without annotations" in describe(test)
    with pytest.raises(DataError, match="split 'test' has no annotations: expected an annotated one to train on"):
        load_pair(tmp_path, "test")
    with pytest.raises(DataError, match="split 'test' has no annotations"):
        load_pair(tmp_path, "train", "test")
    with pytest.raises(DataError, match="split 'demo' does not exist: expected one of train, val, test"):
        load_dataset(tmp_path, "demo")
    # A checkpoint's order of classes.
    classes = tuple(reversed(test.classes))
    assert load_dataset(tmp_path, "val", classes=classes).records[0].labels.tolist() == [7]
    report = check_dataset(tmp_path)
    assert report.ok and report.stats["train"]["boxes_by_class"]["car"] == 1
    assert "split test: it has no annotations and was not checked" in report.warnings
    assert check_dataset(tmp_path, splits=("test",)).ok


def test_leavings_of_macos_archives_are_no_images(tmp_path):
    write(tmp_path, ids=mask((26000, 4, 6, 20, 14)))
    for path in (image(tmp_path), labels(tmp_path)):
        path.with_name("._" + path.name).write_bytes(b"x")
    assert len(load_dataset(tmp_path)) == 1


def test_only_a_test_split_is_no_default(tmp_path):
    write(tmp_path, "berlin_000000_000019", "test")
    for role in ("train", "eval"):
        with pytest.raises(DataError, match=f"no default split for {role}"):
            load_dataset(tmp_path, role=role)


def labels(root: Path, end="instanceIds.png") -> Path:
    return root / "gtFine/train/aachen" / f"{NAME}_gtFine_{end}"


def image(root: Path) -> Path:
    return root / "leftImg8bit/train/aachen" / f"{NAME}_leftImg8bit.png"


def cut(path: Path, count=60):
    path.write_bytes(path.read_bytes()[:count])


def polygons(**changes):
    """A fault that replaces the mask by polygons, good but for `changes`."""

    def apply(root: Path):
        labels(root).unlink()
        data = {"imgWidth": WIDTH, "imgHeight": HEIGHT, "objects": [polygon("car", 4, 6, 20, 14)], **changes}
        labels(root, "polygons.json").write_text(json.dumps(data))

    return apply


def bad_object(**changes):
    return polygons(objects=[{**polygon("car", 4, 6, 20, 14), **changes}])


def link_out(path: Path):
    outside = path.parents[4] / f"outside-{path.name}"
    path.rename(outside)
    path.symlink_to(outside)


def link_city_out(root: Path):
    city = root / "leftImg8bit/train/aachen"
    city.rename(root.parent / "elsewhere")
    city.symlink_to(root.parent / "elsewhere")


def no_images(root: Path):
    image(root).unlink()
    labels(root).unlink()


def save(array, path):
    Image.fromarray(array).save(path)


FAULTS = {
    "8-bit mask": (lambda r: save(np.zeros((HEIGHT, WIDTH), np.uint8), labels(r)), "a 16-bit grey PNG, got mode L"),
    "colour mask": (lambda r: save(np.zeros((HEIGHT, WIDTH, 3), np.uint8), labels(r)), "grey PNG, got mode RGB"),
    "mask of another size": (
        lambda r: save(mask(width=41), labels(r)), "size mismatch: the annotation says 41 x 24, the file has 40 x 24",
    ),
    "truncated mask": (lambda r: cut(labels(r)), "instanceIds.png: it cannot be decoded"),
    "empty mask": (lambda r: labels(r).write_bytes(b""), r"the file is empty \(0 bytes\)"),
    "mask is a text": (lambda r: labels(r).write_text("hello"), "expected a PNG file, got something else"),
    "mask is a JPEG": (
        lambda r: Image.new("L", (WIDTH, HEIGHT)).save(labels(r), format="JPEG"), "expected a PNG file, got something",
    ),
    "mask is a folder": (lambda r: (labels(r).unlink(), labels(r).mkdir()), "it is not a regular file"),
    "unknown class id": (lambda r: save(mask((34, 0, 0, 2, 2)), labels(r)), "expected pixels of 0 .. 33 .*, got 34"),
    "unknown instance id": (lambda r: save(mask((23001, 0, 0, 2, 2)), labels(r)), "expected pixels .*, got 23001"),
    "too large an id": (lambda r: save(mask((65535, 0, 0, 2, 2)), labels(r)), "expected pixels .*, got 65535"),
    "missing label file": (
        lambda r: labels(r).unlink(),
        f"no label file: expected gtFine/train/aachen/{NAME}_gtFine_instanceIds.png or ..._gtFine_polygons.json",
    ),
    "missing image": (lambda r: image(r).unlink(), f"its image leftImg8bit/train/aachen/{NAME}_leftImg8bit.png does"),
    "truncated image header": (lambda r: cut(image(r), 20), "its header cannot be read|expected a JPEG, PNG or WebP"),
    "no gtFine": (lambda r: (r / "gtFine").rename(r / "gtCoarse"), "the folder gtFine/train does not exist"),
    "empty folder": (no_images, "expected images leftImg8bit/train/CITY/.*, got none"),
    "mask linked to outside": (lambda r: link_out(labels(r)), "it is a link to outside the dataset's folder"),
    "image linked to outside": (lambda r: link_out(image(r)), "it is a link to outside the dataset's folder"),
    "city linked to outside": (link_city_out, "it is a link to outside the dataset's folder"),
    "backslash in a name": (
        lambda r: image(r).rename(image(r).parent / r"x\..\y_leftImg8bit.png"), "is refused: it contains a backslash",
    ),
    "polygons are no JSON": (
        lambda r: (labels(r).unlink(), labels(r, "polygons.json").write_text("{")), "polygons.json: not valid JSON",
    ),
    "no objects": (polygons(objects=None), "expected an object with imgWidth, imgHeight and the list objects"),
    "width a word": (polygons(imgWidth="wide"), "imgWidth: expected a positive integer, got 'wide'"),
    "height 0": (polygons(imgHeight=0), "imgHeight: expected a positive integer, got 0"),
    "a size to fill the memory": (polygons(imgWidth=999_999, imgHeight=999_999), "expected at most 100000000 pixels"),
    "polygons of another size": (polygons(imgWidth=41), "size mismatch: the annotation says 41 x 24"),
    "an object a number": (polygons(objects=[3]), r"objects\[0\]: expected an object, got int"),
    "unknown label": (bad_object(label="boat"), r"objects\[0\]: label: expected one of the data set's, got 'boat'"),
    "unknown group": (bad_object(label="boatgroup"), "label: expected one of the data set's, got 'boatgroup'"),
    "no label": (bad_object(label=None), "label: expected one of the data set's, got None"),
    "one point": (bad_object(polygon=[[1, 2]]), "polygon: expected at least two points"),
    "three coordinates": (bad_object(polygon=[[1, 2, 3], [4, 5, 6]]), "polygon: expected at least two points"),
    "a point far out": (bad_object(polygon=[[1, 2], [1e300, 2], [3, 3]]), "polygon: expected at least two points"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_malformed(tmp_path, name):
    apply, message = FAULTS[name]
    root = write(tmp_path / "set", ids=mask((26000, 4, 6, 20, 14)))
    assert len(load_dataset(root)) == 1
    apply(root)
    with pytest.raises(DataError, match=message):
        load_dataset(root, "train", "cityscapes")


def test_all_problems_are_collected(tmp_path):
    for k in range(4):
        write(tmp_path, f"bonn_{k:06}_000019", ids=mask((34 if k < 2 else 7, 0, 0, 2, 2)))
    write(tmp_path, "bonn_000009_000019", objects=[polygon("boat", 0, 0, 2, 2), polygon("x", 0, 0, 2, 2)])
    write(tmp_path, "ulm_000009_000019")
    with pytest.raises(DataError, match="Cityscapes, split 'train': 5 problems") as caught:
        load_dataset(tmp_path)
    assert len(caught.value.problems) == 5


def test_several_formats_need_a_name(tmp_path):
    write(tmp_path, ids=mask((26000, 4, 6, 20, 14)))
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train.json").write_text("{}")
    with pytest.raises(DataError, match="several formats are here, COCO JSON and Cityscapes: name the kind, coco or"):
        load_dataset(tmp_path)
    assert load_dataset(tmp_path, kind="cityscapes").num_boxes == 1
