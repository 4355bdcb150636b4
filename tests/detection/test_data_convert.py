"""Pascal VOC and Cityscapes as COCO JSON: the same boxes, labels, classes and AP; complete or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ioubal_kernels.detection.data import DataError, convert_dataset, load_dataset, load_pair
from ioubal_kernels.detection.evaluate import ImageDetections, evaluate_detections

BCCD = Path(__file__).resolve().parents[3] / "shared" / "data" / "bccd"


def voc_year(folder: Path, splits: dict[str, list[str]], annotated=True):
    rng = np.random.default_rng(len(folder.name) + len(splits))
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for name in sorted({value for ids in splits.values() for value in ids}):
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(folder / f"JPEGImages/{name}.jpg")
        if not annotated and name in splits["test"]:
            continue
        objects = "".join(
            f"<object><name>{label}</name><difficult>{difficult}</difficult><bndbox><xmin>{x}</xmin><ymin>{y}</ymin>"
            f"<xmax>{x + 20}</xmax><ymax>{y + 15.5}</ymax></bndbox></object>"
            for label, difficult, x, y in (("dog", 0, 3, 4), ("cat", 1, 30, 8), ("cat", 0, 50.25, 30))
        )
        (folder / f"Annotations/{name}.xml").write_text(
            f"<annotation><size><width>80</width><height>60</height></size>{objects}</annotation>"
        )
    for split, ids in splits.items():
        (folder / f"ImageSets/Main/{split}.txt").write_text("\n".join(ids) + "\n")


@pytest.fixture
def voc(tmp_path):
    kit = tmp_path / "in/VOCdevkit"
    voc_year(kit / "VOC2007", {"trainval": ["a", "b"], "test": ["c"]})
    voc_year(kit / "VOC2012", {"trainval": ["a"], "test": ["z"]}, annotated=False)
    return tmp_path / "in"


@pytest.fixture
def cityscapes(tmp_path):
    root = tmp_path / "in"
    for split, name in (("train", "ulm_000000_000019"), ("val", "frankfurt_000000_000294"), ("test", "berlin_0_0")):
        city = name.split("_")[0]
        images, labels = root / "leftImg8bit" / split / city, root / "gtFine" / split / city
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        Image.new("RGB", (40, 24), (len(name), 0, 0)).save(images / f"{name}_leftImg8bit.png")
        ids = np.full((24, 40), 7, np.uint16)
        ids[4:20, 3:17] = 26000
        ids[10:20, 10:13] = 24001
        ids[:5, 30:] = 33
        Image.fromarray(ids).save(labels / f"{name}_gtFine_instanceIds.png")
    return root


def same(first, second, sources=False):
    assert (first.classes, first.labelled, len(first)) == (second.classes, second.labelled, len(second))
    for a, b in zip(first.records, second.records):
        assert (a.id, a.width, a.height) == (b.id, b.width, b.height)
        for name in ("boxes", "labels", "iscrowd", "difficult", "areas"):
            assert np.array_equal(getattr(a, name), getattr(b, name)), name
        assert Path(a.path).read_bytes() == Path(b.path).read_bytes()


def detections(dataset):
    """Every box somewhat moved, with a score that depends on it, and a false positive an image."""
    rng = np.random.default_rng(0)
    result = []
    for record in dataset.records:
        boxes = np.concatenate((record.boxes + rng.uniform(-2, 2, record.boxes.shape), [[1, 1, 12, 12]]))
        labels = np.concatenate((record.labels, [0]))
        result.append(
            ImageDetections(
                record.id, torch.from_numpy(boxes).float(), torch.from_numpy(rng.random(len(boxes))).float(),
                torch.from_numpy(labels),
            )
        )  # fmt: skip
    return result


@pytest.mark.parametrize("images", ["copy", "link"])
def test_voc(voc, tmp_path, images):
    out = tmp_path / "out"
    assert convert_dataset(voc, out, "voc", images=images) == {"test": (1, 3), "trainval": (3, 9)}
    assert sorted(p.name for p in (out / "annotations").iterdir()) == ["instances_test.json", "instances_trainval.json"]
    assert sorted(str(p.relative_to(out)) for p in (out / "images").rglob("*.jpg")) == [
        "images/VOC2007/a.jpg", "images/VOC2007/b.jpg", "images/VOC2007/c.jpg", "images/VOC2012/a.jpg",
    ]  # fmt: skip
    inode = os.stat(voc / "VOCdevkit/VOC2007/JPEGImages/a.jpg").st_ino
    assert (os.stat(out / "images/VOC2007/a.jpg").st_ino == inode) == (images == "link")
    before, after = load_pair(voc, kind="voc"), load_pair(out)
    assert (after.training.format, after.training.split, after.evaluation.split) == ("coco", "trainval", "test")
    same(before.training, after.training)
    same(before.evaluation, after.evaluation)
    assert after.training.category_ids == (1, 2) and after.training.classes == ("cat", "dog")
    for split in ("trainval", "test"):
        a, b = load_dataset(voc, split), load_dataset(out, split)
        first, second = (evaluate_detections(d, detections(d), voc07=True) for d in (a, b))
        assert first == second and 0 < first["AP"] < 1
    data = json.loads((out / "annotations/instances_test.json").read_text())
    flags = [(a["iscrowd"], a.get("ignore"), a.get("difficult")) for a in data["annotations"]]
    assert flags == [(0, None, None), (1, 1, 1), (0, None, None)]
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_voc_unlabelled_and_single_years(voc, tmp_path):
    out = tmp_path / "out"
    assert convert_dataset(voc, out, "voc", splits=("VOC2012/test", "VOC2007/trainval")) == {
        "VOC2012/test": (1, 0), "VOC2007/trainval": (2, 6),
    }  # fmt: skip
    test = load_dataset(out, "VOC2012_test")
    assert (test.labelled, test.classes, test.records[0].name) == (False, ("cat", "dog"), "VOC2012/z.jpg")
    assert load_dataset(out, "VOC2007_trainval").num_boxes == 6


@pytest.mark.parametrize("images", ["copy", "link"])
def test_cityscapes(cityscapes, tmp_path, images):
    out = tmp_path / "out"
    assert convert_dataset(cityscapes, out, "cityscapes", images=images) == {
        "train": (1, 3), "val": (1, 3), "test": (1, 0),
    }  # fmt: skip
    for split in ("train", "val", "test"):
        a, b = load_dataset(cityscapes, split), load_dataset(out, split)
        same(a, b)
        assert a.category_ids == b.category_ids
    assert b.format == "coco" and b.records[0].name == "test/berlin/berlin_0_0_leftImg8bit.png"
    pair = load_pair(out)
    assert (pair.training.split, pair.evaluation.split) == ("train", "val")
    first, second = (evaluate_detections(d, detections(d)) for d in (load_dataset(cityscapes, "val"), pair.evaluation))
    assert first == second and first["AP"] is not None


@pytest.mark.parametrize("kind", ["voc", "cityscapes"])
def test_without_images_the_names_are_relative_to_the_folder(kind, request, tmp_path):
    root, out = request.getfixturevalue(kind), tmp_path / "out"
    convert_dataset(root, out, kind, images="none")
    assert os.listdir(out) == ["annotations"]
    split = "trainval" if kind == "voc" else "train"
    before = load_dataset(root, split, kind)
    os.rename(out / "annotations", root / "annotations")
    same(before, load_dataset(root, split, "coco"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "coco"}, "kind: expected one of voc, cityscapes, got 'coco'"),
        ({"images": "symlink"}, "images: expected one of copy, link, none, got 'symlink'"),
        ({"kind": "cityscapes"}, "no dataset found"),
        ({"splits": ("dev",)}, "split 'dev' does not exist"),
    ],
)
def test_refused(voc, tmp_path, arguments, message):
    with pytest.raises(DataError, match=message):
        convert_dataset(voc, tmp_path / "out", **{"kind": "voc", **arguments})
    assert sorted(os.listdir(tmp_path)) == ["in"]


def test_a_folder_in_use_is_refused(voc, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("x")
    with pytest.raises(DataError, match="out: expected a new or an empty folder, .*/out has something in it"):
        convert_dataset(voc, tmp_path / "out", "voc")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="expected a new or an empty folder"):
        convert_dataset(voc, tmp_path / "file", "voc")
    (tmp_path / "empty").mkdir()
    convert_dataset(voc, tmp_path / "empty", "voc")
    assert len(load_dataset(tmp_path / "empty", "trainval")) == 3


def test_nothing_is_left_half_written(voc, tmp_path, monkeypatch):
    import shutil

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(OSError, match="No space left"):
        convert_dataset(voc, tmp_path / "out", "voc", images="copy")
    assert sorted(os.listdir(tmp_path)) == ["in"]
    # Bad data is found before anything is written.
    (voc / "VOCdevkit/VOC2007/Annotations/a.xml").write_text("x")
    with pytest.raises(DataError, match="not valid XML"):
        convert_dataset(voc, tmp_path / "out", "voc")
    assert sorted(os.listdir(tmp_path)) == ["in"]


def test_where_hard_links_fail_images_are_copied(voc, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", fail)
    convert_dataset(voc, tmp_path / "out", "voc", images="link")
    same(load_dataset(voc, "trainval"), load_dataset(tmp_path / "out", "trainval"))


def test_a_linked_image_arrives_as_its_file(voc, tmp_path):
    """A hard link to the symbolic one would point to nothing from its new place."""
    image = voc / "VOCdevkit/VOC2007/JPEGImages/a.jpg"
    file = image.rename(image.parents[1] / "a-file.jpg")
    image.symlink_to("../a-file.jpg")
    convert_dataset(voc, tmp_path / "out", "voc", images="link")
    made = tmp_path / "out/images/VOC2007/a.jpg"
    assert not made.is_symlink() and made.samefile(file)


def test_the_command(ioubal, cityscapes, tmp_path):
    command = ("data", "convert", "cityscapes", cityscapes, "-o")
    code, out, err = ioubal(*command, tmp_path / "out", "--images", "copy")
    assert (code, err) == (0, "") and "train: 1 images, 3 boxes" in out and "test: 1 images, 0 boxes" in out
    for root in (cityscapes, tmp_path / "out"):
        code, out, _ = ioubal("data", "check", root)
        assert code == 0 and "split test: it has no annotations and was not checked" in out
    assert ioubal("data", "check", cityscapes, "--format", "cityscapes", "--split", "val")[0] == 0
    code, _, err = ioubal(*command, tmp_path / "out")
    assert code == 2 and "expected a new or an empty folder" in err
    code, _, err = ioubal("data", "convert", "yolo", cityscapes, "-o", tmp_path / "x")
    assert code == 2 and "kind: expected one of voc, cityscapes, got 'yolo'" in err


@pytest.mark.skipif(not BCCD.is_dir(), reason="the BCCD photographs are not here")
def test_bccd(tmp_path):
    convert_dataset(BCCD, tmp_path / "out", "voc", images="copy", splits=("test",))
    before, after = load_dataset(BCCD, "test"), load_dataset(tmp_path / "out", "test")
    same(before, after)
    first, second = (evaluate_detections(d, detections(d), voc07=True) for d in (before, after))
    assert first == second and first["VOC07"]["AP50"] > 0.3
