"""The synthetic set: the same files whoever makes them, read by the COCO reader, complete or not there at all."""

import hashlib
import json
import multiprocessing
import os

import numpy as np
import pytest

from ioubal_kernels.detection.data import DataError, check_dataset, load_pair, make_synthetic, synth
from ioubal_kernels.detection.data.shapes import SHAPES, sprite_mask

SMALL = {"train": 60, "val": 10, "size": 64, "classes": 4, "seed": 3}


def digest(folder):
    result = hashlib.sha256()
    for path, folders, names in sorted(os.walk(folder)):
        folders.sort()
        for name in sorted(names):
            result.update(os.path.relpath(os.path.join(path, name), folder).encode())
            with open(os.path.join(path, name), "rb") as file:
                result.update(file.read())
    return result.hexdigest()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_synthetic(tmp_path_factory.mktemp("synth") / "set", workers=1, **SMALL)


def test_any_number_of_workers_makes_identical_files(small, tmp_path):
    assert digest(make_synthetic(tmp_path / "two", workers=2, **SMALL)) == digest(small)
    other = make_synthetic(tmp_path / "other", workers=1, **{**SMALL, "seed": 4, "train": 25})
    name = "images/train/0000001.jpg"
    with open(os.path.join(other, name), "rb") as first, open(os.path.join(small, name), "rb") as second:
        assert first.read() != second.read()


def test_an_image_does_not_depend_on_how_many_there_are():
    first, second = (synth.render(3, "train", 17, 64, 4) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    assert first[1] == second[1]
    assert (synth.render(3, "val", 17, 64, 4)[0] != first[0]).any()


def test_the_usual_reader_reads_it(small):
    pair = load_pair(small)
    assert (len(pair.training), len(pair.evaluation)) == (60, 10)
    assert pair.training.classes == SHAPES[:4] == pair.evaluation.classes
    counts = np.bincount(np.concatenate([r.labels for r in pair.training.records]), minlength=4)
    assert counts.min() > 40 and counts.sum() == pair.training.num_train_boxes
    assert pair.training.notes.counts() == {}
    report = check_dataset(small)
    assert report.ok and report.stats["train"]["images_without_boxes"] == 0


def test_boxes_enclose_the_visible_pixels_and_objects_overlap():
    overlapping = hidden = total = 0
    for index in range(30):
        pixels, objects = synth.render(0, "train", index, 128, 4)
        assert pixels.shape == (128, 128, 3) and pixels.dtype == np.uint8
        for k, item in enumerate(objects):
            x, y, w, h = item["bbox"]
            assert 0 <= x < x + w <= 128 and 0 <= y < y + h <= 128
            assert 0 < item["area"] <= w * h
            total += 1
            hidden += item["area"] < 0.35 * w * h
            for x2, y2, w2, h2 in (other["bbox"] for other in objects[k + 1 :]):
                overlapping += min(x + w, x2 + w2) > max(x, x2) and min(y + h, y2 + h2) > max(y, y2)
    assert total > 120 and overlapping > 30 and hidden > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_sprites_are_distinct_and_inside_their_mask(shape):
    mask = sprite_mask(shape, 20.0, 1.0, 0.3)
    assert mask.shape[0] == mask.shape[1] and mask.shape[0] % 2 == 1
    assert mask.min() == 0 and mask.max() == 1
    assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
    others = [sprite_mask(other, 20.0, 1.0, 0.3) for other in SHAPES if other != shape]
    assert min(np.abs(mask - other).sum() for other in others) > 60


def test_made_once_and_reused(small):
    before = os.stat(os.path.join(small, "images/train/0000001.jpg")).st_mtime_ns
    seen = []
    assert make_synthetic(small, progress=lambda done, total: seen.append((done, total)), **SMALL) == small
    assert seen == [(70, 70)]
    assert os.stat(os.path.join(small, "images/train/0000001.jpg")).st_mtime_ns == before
    with pytest.raises(
        DataError, match="holds a set made with other parameters: expected .*'seed': 4.*found .*'seed': 3"
    ):
        make_synthetic(small, **{**SMALL, "seed": 4})


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_call_leaves_nothing_half_made_and_is_continued(small, tmp_path, workers):
    target = tmp_path / "set"

    def interrupt(done, total):
        if done >= 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_synthetic(target, workers=workers, progress=interrupt, **SMALL)
    assert not target.exists()
    seen = []
    make_synthetic(target, workers=1, progress=lambda done, total: seen.append(done), **SMALL)
    assert seen[0] >= 25 and seen[-1] == 70
    assert digest(target) == digest(small)
    assert sorted(os.listdir(tmp_path)) == ["set"]


def test_two_processes_at_once_make_one_set(small, tmp_path):
    context = multiprocessing.get_context("fork")
    target = tmp_path / "set"
    both = [context.Process(target=make_synthetic, args=(target,), kwargs={"workers": 1, **SMALL}) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert digest(target) == digest(small) and sorted(os.listdir(tmp_path)) == ["set"]


def test_the_rest_of_other_parameters_is_not_used(small, tmp_path):
    partial = tmp_path / ".set.partial"
    partial.mkdir()
    (partial / "synthetic.json").write_text(json.dumps({"seed": 99}))
    (partial / "stray").write_text("x")
    assert digest(make_synthetic(tmp_path / "set", workers=1, **SMALL)) == digest(small)


def test_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/mine.jpg").write_text("x")
    with pytest.raises(DataError, match="photos: expected a new folder or a synthetic set, found something else"):
        make_synthetic(tmp_path / "photos", **SMALL)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="file: expected a new folder or a synthetic set"):
        make_synthetic(tmp_path / "file", **SMALL)
    assert (tmp_path / "photos/mine.jpg").read_text() == "x"
    (tmp_path / "empty").mkdir()
    assert os.listdir(make_synthetic(tmp_path / "empty", workers=1, **{**SMALL, "train": 2, "val": 0}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train", 0),
        ("val", -1),
        ("size", 8),
        ("size", 4096),
        ("classes", 9),
        ("classes", 0),
        ("seed", -1),
        ("train", 2.0),
    ],
)
def test_parameters_are_checked_before_anything_is_written(tmp_path, name, value):
    with pytest.raises(DataError, match=f"make_synthetic: {name}: expected an integer from .*, got {value}"):
        make_synthetic(tmp_path / "set", **{**SMALL, name: value})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("size", "limit"), [(31, 32), (2049, 2048)])
def test_the_command_has_the_makers_limits(ioubal, tmp_path, size, limit):
    code, _, err = ioubal("data", "synth", "-o", tmp_path / "set", "--size", size)
    assert code == 2 and "--size" in err and str(limit) in err
    with pytest.raises(DataError, match=f"size: expected an integer from 32 to 2048, got {size}"):
        make_synthetic(tmp_path / "set", size=size)
    assert os.listdir(tmp_path) == []
