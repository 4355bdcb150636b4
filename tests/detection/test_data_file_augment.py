"""Augmentation of the image file: drawn short sides, SSD's distortion, canvas and crop; boxes follow the pixels."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image

from ioubal_kernels.detection.anchors import network_boxes
from ioubal_kernels.detection.config import Config
from ioubal_kernels.detection.data import DataError, Dataset, TrainLoader, TransformConfig, eval_loader, make_record
from ioubal_kernels.detection.data.file_augment import MAX_CANVAS_PIXELS, augment_file
from ioubal_kernels.detection.data.transforms import mean_colour, sample_random
from ioubal_kernels.detection.errors import UsageError
from ioubal_kernels.detection.predict import transform_config
from ioubal_kernels.detection.presets import preset
from ioubal_kernels.detection.resources import choose_cache

SSD = {"zoom_out": 0.5, "iou_crop": 1.0, "photometric": 0.5}


def scene(width=90, height=60, boxes=((20, 12, 44, 30), (50, 25, 80, 55))):
    """A black image, the k-th rectangle of channel k white; and its record, with a crowd region besides."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for k, (x1, y1, x2, y2) in enumerate(boxes):
        image[k, y1:y2, x1:x2] = 255
    record = make_record(
        id=7, name="7.png", path="/7.png", width=width, height=height, boxes=[*boxes, (0, 0, width, height)],
        labels=[*range(len(boxes)), 0], iscrowd=[False] * len(boxes) + [True],
    )  # fmt: skip
    return image, record


def painted(channel, level=128):
    """The box of a channel's bright pixels; None when there are none."""
    ys, xs = torch.nonzero(channel >= level, as_tuple=True)
    return None if len(xs) == 0 else [xs.min().item(), ys.min().item(), xs.max().item() + 1, ys.max().item() + 1]


@pytest.mark.parametrize("seed", range(30))
def test_canvas_and_crop_move_boxes_with_the_pixels_exactly(seed):
    image, record = scene()
    # A black mean: what is bright is a rectangle.
    config = TransformConfig(size=(32, 32), zoom_out=0.7, iou_crop=1.0, mean=(0.0, 0.0, 0.0))
    before = image.clone()
    moved, after = augment_file(image, record, config, sample_random(seed, 0, 0))
    assert torch.equal(image, before) and moved.dtype == torch.uint8
    assert moved.shape == (3, after.height, after.width)
    assert after.boxes.dtype == np.float32 and after.labels.dtype == np.int64 and after.areas.dtype == np.float32
    assert not after.iscrowd.any() and len(after.iscrowd) == len(after.difficult) == len(after.boxes)
    for box, label in zip(after.boxes.tolist(), after.labels.tolist()):
        assert box == painted(moved[label])
    assert (after.id, after.name, after.path) == (7, "7.png", "/7.png")


def test_a_crop_keeps_the_boxes_whose_centre_it_holds():
    kept = set()
    for seed in range(60):
        image, record = scene()
        # The centres of the two boxes, marked in the third channel.
        image[2, 21, 32], image[2, 40, 65] = 1, 2
        moved, after = augment_file(
            image, record, TransformConfig(size=(8, 8), iou_crop=1.0), sample_random(seed, 0, 0)
        )
        inside = [label for label, mark in ((0, 1), (1, 2)) if (moved[2] == mark).any()]
        # The pixel at the centre belongs to the crop from its left edge on, the centre itself from beyond that.
        assert set(after.labels.tolist()) <= set(inside) and len(after.labels) >= 1
        kept.add(tuple(after.labels.tolist()))
    assert kept == {(0,), (1,), (0, 1)}


def test_canvas_is_of_the_mean_colour_and_one_to_four_times_as_large():
    image, record = scene()
    image[:] = 255
    config = TransformConfig(size=(32, 32), zoom_out=1.0)
    factors = []
    for seed in range(40):
        moved, after = augment_file(image, record, config, sample_random(seed, 0, 0))
        factors.append(after.width / record.width)
        white = (moved == 255).all(dim=0)
        assert int(white.sum()) == 90 * 60
        assert (moved[:, ~white] == torch.tensor([[124], [116], [104]])).all()
    assert 1 <= min(factors) < 1.3 and 3.7 < max(factors) <= 4
    assert mean_colour(TransformConfig(mean=(0.48235, 0.45882, 0.40784))) == [123, 117, 104]


def test_the_canvas_has_a_limit():
    side = 6000
    image = torch.zeros(3, side, side, dtype=torch.uint8)
    record = make_record(id=1, name="x", path="/x", width=side, height=side, boxes=[], labels=[])
    config = TransformConfig(size=(8, 8), zoom_out=1.0)
    moved, _ = augment_file(image, record, config, sample_random(0, 0, 0))
    assert side * side < moved.shape[1] * moved.shape[2] <= MAX_CANVAS_PIXELS


def test_colours_are_distorted_and_boxes_are_not():
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (3, 60, 90), dtype=np.uint8))
    _, record = scene()
    results = []
    for seed in range(10):
        moved, after = augment_file(
            image, record, TransformConfig(size=(8, 8), photometric=0.5), sample_random(seed, 0, 0)
        )
        assert after.boxes.tolist() == record.train_boxes.tolist() and moved.shape == image.shape
        results.append(moved)
    assert sum(torch.equal(moved, image) for moved in results) <= 2
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(results[:4]))


def test_contrast_is_torchvisions_up_to_its_rounding_of_the_mean():
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional as F

    from ioubal_kernels.detection.data.file_augment import _Distort

    image = tv_tensors.Image(torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 50), dtype=np.uint8)))
    for factor in (0.5, 0.9, 1.5):
        own = _Distort()._call_kernel(F.adjust_contrast, image, contrast_factor=factor)
        other = F.adjust_contrast(image, contrast_factor=factor)
        assert type(own) is tv_tensors.Image
        # Equal but for a pixel that a last bit of the mean moves over an integer.
        assert (own.to(torch.int16) - other.to(torch.int16)).abs().max() <= 1
        assert (own != other).float().mean() < 0.02


def test_the_number_of_threads_changes_nothing():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 480, 640), dtype=np.uint8))
    record = make_record(id=1, name="x", path="/x", width=640, height=480, boxes=[[10, 10, 300, 300]], labels=[0])
    config = TransformConfig(size=(8, 8), photometric=1.0, zoom_out=0.3, iou_crop=1.0)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([augment_file(image, record, config, sample_random(seed, 0, 0))[0] for seed in range(6)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results))


def test_images_without_boxes_and_tiny_ones():
    image = torch.zeros(3, 60, 90, dtype=torch.uint8)
    record = make_record(id=1, name="x", path="/x", width=90, height=60, boxes=[], labels=[])
    moved, after = augment_file(image, record, TransformConfig(size=(8, 8), iou_crop=1.0), random.Random(0))
    assert moved.shape == image.shape and after.boxes.shape == (0, 4) and after.labels.shape == (0,)
    image, record = scene(3, 2, ((0, 0, 1, 1),))
    for seed in range(20):
        moved, after = augment_file(image, record, TransformConfig(size=(8, 8), **SSD), sample_random(seed, 0, 0))
        assert after.labels.tolist() == [0] and min(moved.shape[1:]) >= 2


def test_one_switch_leaves_the_others_alone():
    image, record = scene()
    first = {"size": (8, 8), "iou_crop": 1.0}
    for seed in range(10):
        plain = augment_file(image, record, TransformConfig(**first), sample_random(seed, 0, 0))[1]
        with_colours = augment_file(
            image, record, TransformConfig(**first, photometric=0.5), sample_random(seed, 0, 0)
        )[1]
        assert plain.boxes.tolist() == with_colours.boxes.tolist()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, records = tmp_path_factory.mktemp("images"), []
    for k in range(6):
        width, height = ((90, 60), (60, 90), (100, 50))[k % 3]
        image, _ = scene(width, height, ((10, 12, 34, 30),))
        path = folder / f"{k}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        records.append(
            make_record(
                id=k, name=path.name, path=str(path), width=width, height=height, boxes=[[10, 12, 34, 30]], labels=[0]
            )
        )
    return Dataset(str(folder), "coco", "train", ("a",), (1,), records)


def take(loader, count):
    iterator = iter(loader)
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


ALL = TransformConfig(
    size=None,
    short_side=64,
    short_side_range=(48, 80),
    long_side=120,
    hflip=0.5,
    jitter=0.1,
    **SSD,
    mean=(0.0, 0.0, 0.0),
    std=(1, 1, 1),
)


@pytest.mark.parametrize(("workers", "cache"), [(0, "ram"), (2, "none"), (2, "ram")])
def test_workers_and_cache_give_the_same_batches(data, workers, cache):
    expected = take(TrainLoader(data, ALL, 2, seed=1), 6)
    torch.manual_seed(99)
    state = torch.get_rng_state(), random.getstate()
    for a, b in zip(expected, take(TrainLoader(data, ALL, 2, seed=1, workers=workers, cache=cache), 6)):
        assert torch.equal(a.images, b.images)
        for s, t in zip(a.targets, b.targets):
            assert (
                torch.equal(s["boxes"], t["boxes"]) and torch.equal(s["labels"], t["labels"]) and s["size"] == t["size"]
            )
    # Nobody else's random numbers were used up.
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]


def test_samples_depend_on_seed_epoch_and_index_only(data):
    alone = {t["image_id"]: b.images for b in take(TrainLoader(data, ALL, 1, seed=2), 6) for t in b.targets}
    torch.manual_seed(5)
    for batch in take(TrainLoader(data, ALL, 3, seed=2), 2):
        for image, target in zip(batch.images, batch.targets):
            height, width = target["size"]
            own = alone[target["image_id"]][0]
            assert torch.equal(image[:, :height, :width], own[:, :height, :width])
    later = {t["image_id"]: b.images for b in take(TrainLoader(data, ALL, 1, seed=2), 12)[6:] for t in b.targets}
    assert any(later[k].shape != alone[k].shape or not torch.equal(later[k], alone[k]) for k in alone)


@pytest.mark.parametrize("size", [None, (64, 96)])
def test_boxes_follow_the_pixels_to_the_network(data, size):
    more = {"short_side": 64, "short_side_range": (48, 80), "long_side": 120} if size is None else {"keep_ratio": True}
    config = TransformConfig(
        size=size, hflip=0.5, vflip=0.5, zoom_out=0.5, iou_crop=1.0, mean=(0, 0, 0), std=(1, 1, 1), **more
    )
    checked = 0
    for batch in take(TrainLoader(data, config, 2, seed=3), 15):
        for image, target in zip(batch.images, batch.targets):
            height, width = target["size"]
            assert target["orig_size"] in ((60, 90), (90, 60), (50, 100))
            assert len(target["boxes"]) == 1 and target["labels"].tolist() == [0]
            found = painted(image[0, :height, :width], 0.5)
            # Half of 1 marks the edge, which resizing blurs, by less than a pixel.
            assert (torch.tensor(found) - target["boxes"][0]).abs().max() <= 1.0
            checked += 1
    assert checked == 30


def test_short_sides_are_drawn_in_training_only(data):
    config = TransformConfig(size=None, short_side=64, short_side_range=(48, 80), long_side=400, hflip=0.0)
    sides = [min(t["size"]) for b in take(TrainLoader(data, config, 1, seed=0), 150) for t in b.targets]
    assert min(sides) == 48 and max(sides) == 80 and len(set(sides)) > 25
    assert abs(np.mean(sides) - 64) < 3  # standard error 9.5 / sqrt(150) = 0.8
    for target in (t for b in eval_loader(data, config, 2) for t in b.targets):
        assert min(target["size"]) == 64
    # One value is a fixed size, the same as without a range.
    fixed = TransformConfig(size=None, short_side=64, short_side_range=(56, 56), long_side=400, hflip=0.0)
    plain = TransformConfig(size=None, short_side=56, long_side=400, hflip=0.0)
    for a, b in zip(take(TrainLoader(data, fixed, 2), 3), take(TrainLoader(data, plain, 2), 3)):
        assert torch.equal(a.images, b.images) and torch.equal(a.targets[0]["boxes"], b.targets[0]["boxes"])


def test_evaluation_is_untouched(data):
    plain = TransformConfig(size=(64, 96))
    for a, b in zip(eval_loader(data, plain, 3), eval_loader(data, TransformConfig(size=(64, 96), **SSD), 3)):
        assert torch.equal(a.images, b.images)


def test_anchors_see_the_middle_of_the_range(data):
    drawn = TransformConfig(size=None, short_side=64, short_side_range=(40, 60), long_side=400)
    boxes, sizes = network_boxes(data, drawn)
    assert torch.equal(boxes, network_boxes(data, TransformConfig(size=None, short_side=50, long_side=400))[0])
    assert sizes[0].tolist() == [50, 75]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zoom_out": 1.5}, "zoom_out: expected a number from 0 to 1, got 1.5"),
        ({"iou_crop": -0.1}, "iou_crop: expected a number from 0 to 1, got -0.1"),
        ({"photometric": 2}, "photometric: expected a number from 0 to 1, got 2"),
        ({"short_side_range": (10, 20)}, "short_side_range: expected integers .* with size None"),
        ({"size": None, "short_side_range": (30, 20)}, r"low <= high <= long_side = 1333 .*, got \(30, 20\)"),
        ({"size": None, "short_side_range": (30, 2000)}, r"got \(30, 2000\)"),
        ({"size": None, "short_side_range": (30.0, 40)}, r"expected integers"),
        ({"size": None, "short_side_range": (30,)}, r"expected integers"),
        ({"std": (1.0, 0.0, 1.0)}, "mean, std: expected three numbers, std > 0"),
    ],
)
def test_wrong_values(change, message):
    with pytest.raises(DataError, match=message):
        TransformConfig(**change)


def test_configuration():
    config = preset("retinanet_r50_fpn")
    config.update(
        {"data": {"short_side_range": [600, 800], "zoom_out": 0.5, "iou_crop": 1, "photometric": 0.5}}, "file"
    )
    config.set("data.mean", [0.48235, 0.45882, 0.40784])
    config.set("data.std", [1 / 255] * 3)
    config.validate()
    again = Config()
    import yaml

    again.update(yaml.safe_load(config.to_yaml()), "file")
    transform = transform_config(again)
    assert transform.short_side_range == (600, 800) and transform.changes_file
    assert (transform.zoom_out, transform.iou_crop, transform.photometric) == (0.5, 1.0, 0.5)
    assert transform.mean == (0.48235, 0.45882, 0.40784) and transform.std == (1 / 255,) * 3
    assert not transform_config(preset("retinanet_tiny")).changes_file
    for key, value, message in (
        ("data.short_side_range", [800, 600], "data.short_side_range: expected low <= high <= data.long_side = 1333"),
        ("data.short_side_range", [800, 2000], "expected low <= high <= data.long_side = 1333, got"),
        ("data.image_size", [300, 300], r"data.short_side_range: expected null with data.image_size = \[300, 300\]"),
    ):
        wrong = Config()
        wrong.update(yaml.safe_load(config.to_yaml()), "file")
        wrong.set(key, value)
        with pytest.raises(UsageError, match=message):
            wrong.validate()
    for key, value in (
        ("data.std", [0, 1, 1]),
        ("data.mean", [0.5, 0.5]),
        ("data.mean", [2, 0, 0]),
        ("data.zoom_out", 2),
    ):
        with pytest.raises(UsageError, match=f"{key}: expected"):
            config.set(key, value)


def test_the_automatic_cache_counts_what_is_kept(data):
    config = preset("retinanet_tiny")
    assert choose_cache("auto", data, config) == "ram"
    large = [make_record(id=k, name=str(k), path="/x", width=4000, height=3000, boxes=[], labels=[]) for k in range(20)]
    big = Dataset("/", "coco", "train", ("a",), (1,), large)
    assert choose_cache("auto", big, config) == "ram"  # 192 x 256 each
    config.set("data.zoom_out", 0.5)
    assert choose_cache("auto", big, config) == "none"  # 36 MB each
    assert choose_cache("auto", data, config) == "ram"
