"""Order, resuming, augmentation and batching: functions of (seed, epoch, sample) for any number of workers."""

import itertools
import multiprocessing
import random
import time

import numpy as np
import pytest
import torch
from PIL import Image

from ioubal_kernels.detection.data import (
    BadImageError,
    DataError,
    Dataset,
    TrainLoader,
    TransformConfig,
    boxes_to_original,
    eval_loader,
    make_record,
)
from ioubal_kernels.detection.data.sampling import BatchStream, epoch_order
from ioubal_kernels.detection.data.transforms import augment, prepare, resize, resized_shape, sample_random

ALL = TransformConfig(size=(48, 64), hflip=0.5, vflip=0.5, zoom=0.25, jitter=0.3)


def dataset(folder, count=10, sizes=((64, 48),)):
    rng = np.random.default_rng(0)
    records = []
    for k in range(count):
        width, height = sizes[k % len(sizes)]
        path = folder / f"{k}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        boxes = [[4, 6, 24, 30], [30, 10, 60, 44]] if k % 5 else []
        labels = [0, 1] if k % 5 else []
        records.append(
            make_record(
                id=100 + k, name=path.name, path=str(path), width=width, height=height, boxes=boxes, labels=labels
            )
        )
    return Dataset(str(folder), "coco", "train", ("a", "b"), (1, 2), records)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("images"))


def take(loader, count):
    iterator = iter(loader)
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert torch.equal(a.images, b.images) and (a.epoch, a.position) == (b.epoch, b.position)
        for s, t in zip(a.targets, b.targets):
            assert torch.equal(s["boxes"], t["boxes"]) and torch.equal(s["labels"], t["labels"])
            assert s["image_id"] == t["image_id"]


def test_any_number_of_workers_and_the_cache_give_the_same_batches(data):
    expected = take(TrainLoader(data, ALL, 3, seed=5), 7)
    for options in ({"workers": 1}, {"workers": 2}, {"cache": "ram"}, {"workers": 2, "cache": "ram"}):
        same(take(TrainLoader(data, ALL, 3, seed=5, **options), 7), expected)
    other = take(TrainLoader(data, ALL, 3, seed=6), 7)
    assert any(not torch.equal(a.images, b.images) for a, b in zip(other, expected))


def test_threads_do_not_change_a_large_augmented_image():
    # A worker has one thread, the main process several: a float mean over 350,000 pixels would tell them apart.
    image = torch.randint(0, 256, (3, 500, 700), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    config = TransformConfig(size=None, zoom=0.3, jitter=0.5)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(augment(image, torch.zeros(0, 4), config, random.Random(4))[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_every_epoch_uses_each_image_at_most_once_in_a_new_order(data):
    loader = TrainLoader(data, ALL, 3, seed=1)
    assert loader.batches_per_epoch == 3
    batches = take(loader, 9)
    assert [batch.epoch for batch in batches] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    orders = [[t["image_id"] for b in batches[k : k + 3] for t in b.targets] for k in (0, 3, 6)]
    assert all(len(set(order)) == 9 for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert [100 + k for k in epoch_order(10, 1, 0)[:9]] == orders[0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_resume_goes_on_with_the_next_batch(data, workers, stop):
    expected = take(TrainLoader(data, ALL, 3, seed=5), 8)
    first = TrainLoader(data, ALL, 3, seed=5, workers=workers)
    begun = take(first, stop)
    state = first.state_dict()
    assert all(type(value) is int for value in state.values())
    second = TrainLoader(data, ALL, 3, seed=5, workers=2 - workers)
    second.load_state_dict(state)
    same(begun + take(second, 8 - stop), expected)
    # The same loader goes on as well, from what was handed out, not from what was prefetched.
    same(begun + take(first, 8 - stop), expected)


def test_seeds_do_not_share_orders():
    """Runs of two seeds would not be independent if one's second epoch were the other's first."""
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16


def test_resume_refuses_another_dataset_or_seed(data):
    state = TrainLoader(data, ALL, 3, seed=5).state_dict()
    with pytest.raises(DataError, match="state: seed: expected 6, got 5"):
        TrainLoader(data, ALL, 3, seed=6).load_state_dict(state)
    with pytest.raises(DataError, match="state: num_samples: expected 10, got 11"):
        TrainLoader(data, ALL, 3, seed=5).load_state_dict({**state, "num_samples": 11})
    with pytest.raises(DataError, match=r"position in \[0, 10\], got 0, 11"):
        TrainLoader(data, ALL, 3, seed=5).load_state_dict({**state, "position": 11})


def test_ranks_share_each_global_batch(data):
    whole = take(TrainLoader(data, ALL, 4, seed=2), 4)
    halves = [take(TrainLoader(data, ALL, 2, seed=2, rank=rank, world_size=2), 4) for rank in (0, 1)]
    for k, batch in enumerate(whole):
        assert torch.equal(torch.cat([halves[0][k].images, halves[1][k].images]), batch.images)
    # A stream stopped with two ranks goes on with one: no sample is skipped or used twice.
    stream = BatchStream(10, 2, 2, rank=1, world_size=2)
    used = next(iter(stream))[0].position
    alone = BatchStream(10, 4, 2)
    alone.position = used
    assert [key.index for key in next(iter(alone))] == epoch_order(10, 2, 0)[4:8]


def test_augmentation_depends_on_seed_epoch_and_sample_only(data):
    alone = TrainLoader(data, ALL, 1, seed=3)
    by_id = {b.targets[0]["image_id"]: b.images[0] for b in take(alone, 10)}
    random.seed(0)
    torch.manual_seed(1)
    np.random.seed(2)
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    for batch in take(TrainLoader(data, ALL, 5, seed=3), 2):
        for image, target in zip(batch.images, batch.targets):
            assert torch.equal(image, by_id[target["image_id"]])
    # Nobody else's random numbers were used up.
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert np.random.get_state()[1].tolist() == states[2]
    second = {b.targets[0]["image_id"]: b.images[0] for b in take(alone, 10)}
    assert all(not torch.equal(second[key], by_id[key]) for key in by_id)


def checkered(height=48, width=64):
    """A black image with a white rectangle, and its box, which must enclose the white pixels after any geometry."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, 12:30, 20:44] = 255
    return image, torch.tensor([[20.0, 12.0, 44.0, 30.0]])


@pytest.mark.parametrize("seed", range(40))
def test_boxes_follow_the_pixels(seed):
    image, boxes = checkered()
    config = TransformConfig(size=(48, 64), hflip=0.5, vflip=0.5, zoom=0.25, min_visible=0.0)
    moved, after, keep = augment(image, boxes, config, sample_random(seed, 0, 0))
    assert moved.shape == image.shape and moved.dtype == torch.uint8 and keep.tolist() == [True]
    # The padding is grey (124, 116, 104), the rectangle white, with a blurred edge: half of 255 marks it.
    ys, xs = torch.nonzero(moved.min(dim=0).values > 140, as_tuple=True)
    found = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], dtype=torch.float32)
    assert (found - after[0]).abs().max() <= 1.0


def test_flips_are_exact():
    image, boxes = checkered()
    for flips, expected in (
        ((1.0, 0.0), [20, 12, 44, 30]),
        ((0.0, 1.0), [20, 18, 44, 36]),
        ((1.0, 1.0), [20, 18, 44, 36]),
    ):
        config = TransformConfig(size=(48, 64), hflip=flips[0], vflip=flips[1])
        _, after, _ = augment(image, boxes, config, random.Random(0))
        assert after.tolist() == [expected]
    moved, after, _ = augment(
        image, torch.tensor([[1.0, 2, 5, 9]]), TransformConfig(size=(48, 64), hflip=1.0), random.Random(0)
    )
    assert after.tolist() == [[59, 2, 63, 9]] and torch.equal(moved, image.flip(2))


def test_boxes_with_little_left_are_removed_with_their_labels(data):
    config = TransformConfig(size=(48, 64), hflip=0, zoom=0.9, min_visible=0.6)
    seen = set()
    for seed in range(60):
        boxes = torch.tensor([[0.0, 0, 8, 8], [56, 40, 64, 48], [20, 12, 44, 30]])
        image = torch.zeros(3, 48, 64, dtype=torch.uint8)
        _, after, keep = augment(image, boxes, config, sample_random(seed, 0, 0))
        assert len(after) == int(keep.sum())
        assert (
            (after[:, 2:] > after[:, :2]).all()
            and (after >= 0).all()
            and (after[:, 2:] <= torch.tensor([64, 48])).all()
        )
        seen.add(tuple(keep.tolist()))
    assert (True, True, True) in seen and len(seen) > 2


def test_switching_one_augmentation_off_leaves_the_others():
    image, boxes = checkered()
    config = TransformConfig(size=(48, 64), hflip=0.5, vflip=0.5, zoom=0.25, jitter=0.2)
    quiet = TransformConfig(size=(48, 64), hflip=0.5, vflip=0.5, zoom=0.25)
    for seed in range(5):
        first, second = (augment(image, boxes, c, sample_random(seed, 0, 0)) for c in (config, quiet))
        assert torch.equal(first[1], second[1])


def test_colours():
    grey = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    image, _, _ = augment(grey, torch.zeros(0, 4), TransformConfig(size=(8, 8), hflip=0, jitter=0.4), random.Random(3))
    numbers = random.Random(3)
    draws = [numbers.random() for _ in range(6)]
    # A uniform grey image has no contrast, saturation or hue to change: only its brightness moves.
    expected = round(100 * (1 + 0.4 * (2 * draws[5] - 1)))
    assert image.unique().tolist() == [expected]


@pytest.mark.parametrize(
    ("config", "width", "height", "expected"),
    [
        (TransformConfig(size=(48, 64)), 640, 480, (48, 64)),
        (TransformConfig(size=(48, 64)), 100, 100, (48, 64)),
        (TransformConfig(size=(48, 64), keep_ratio=True), 100, 100, (48, 48)),
        (TransformConfig(size=(48, 64), keep_ratio=True), 200, 100, (32, 64)),
        (TransformConfig(size=None, short_side=60, long_side=100), 640, 480, (60, 80)),
        (TransformConfig(size=None, short_side=60, long_side=100), 1000, 200, (20, 100)),
        (TransformConfig(size=None, short_side=60, long_side=100), 1, 10_000, (100, 1)),
    ],
)
def test_resized_shape(config, width, height, expected):
    assert resized_shape(width, height, config) == expected
    if height <= 1000:
        pixels = np.zeros((height, width, 3), np.uint8)
        assert tuple(resize(pixels, config).shape[1:]) == expected


@pytest.mark.parametrize("size", [(31, 53), (300, 300), (127, 255)])
def test_a_resized_image_is_never_larger_than_the_input(size):
    config = TransformConfig(size=size, keep_ratio=True)
    shapes = [resized_shape(w, h, config) for w in range(1, 400, 3) for h in (7, 13, 33, 100, 331)]
    assert all(height <= size[0] and width <= size[1] for height, width in shapes)


def test_evaluation_batches_in_order_and_back_to_the_file(tmp_path):
    source = dataset(tmp_path, 5, sizes=((64, 48), (90, 45), (64, 96)))
    config = TransformConfig(size=None, short_side=96, long_side=160, size_divisor=32)
    loader = eval_loader(source, config, 2)
    assert len(loader) == 3
    for _ in range(2):
        batches = list(loader)
        assert [t["image_id"] for b in batches for t in b.targets] == [100, 101, 102, 103, 104]
    for batch in batches:
        assert batch.images.shape[2] % 32 == 0 and batch.images.shape[3] % 32 == 0
        for image, target in zip(batch.images, batch.targets):
            record = source.records[target["image_id"] - 100]
            height, width = target["size"]
            assert target["orig_size"] == (record.height, record.width)
            assert not image[:, height:].any() and not image[:, :, width:].any()
            assert image[:, :height, :width].abs().min(dim=0).values.max() > 0
            back = boxes_to_original(target["boxes"], target)
            torch.testing.assert_close(back, torch.from_numpy(record.boxes).reshape(-1, 4), rtol=1e-5, atol=1e-4)
    huge = boxes_to_original(torch.tensor([[-50.0, -1, 1e6, 1e6]]), batches[0].targets[0])
    assert huge.tolist() == [[0, 0, 64, 48]]
    shares = [
        [t["image_id"] for b in eval_loader(source, config, 2, rank=r, world_size=3) for t in b.targets]
        for r in range(3)
    ]
    assert shares == [[100, 101], [102, 103], [104]]


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_evaluation_batches_do_not_depend_on_the_number_of_processes(tmp_path, world_size):
    """Names in another order than the records; sizes that differ, so that a batch decides its images' padding."""
    source = dataset(tmp_path, 11, sizes=((64, 48), (90, 45), (64, 96)))
    source.records.reverse()
    source.records[3], source.records[7] = source.records[7], source.records[3]
    config = TransformConfig(size=None, short_side=32, long_side=80, size_divisor=1)
    alone = list(eval_loader(source, config, 2))
    names = {record.id: record.name for record in source.records}
    order = [names[t["image_id"]] for b in alone for t in b.targets]
    assert order == sorted(names.values()) and order[:3] == ["0.png", "1.png", "10.png"]
    loaders = [eval_loader(source, config, 2, rank=r, world_size=world_size) for r in range(world_size)]
    shares = [list(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(share) for share in shares]
    for number, batch in enumerate(alone):
        other = shares[number % world_size][number // world_size]
        assert torch.equal(batch.images, other.images) and batch.position == other.position
        assert [t["image_id"] for t in batch.targets] == [t["image_id"] for t in other.targets]
        assert all(torch.equal(s["boxes"], t["boxes"]) for s, t in zip(batch.targets, other.targets))
    assert sum(len(share) for share in shares) == len(alone) == 6


def test_evaluation_leaves_bad_images_out(tmp_path):
    source = dataset(tmp_path, 4)
    (tmp_path / "1.png").unlink()
    batches = list(eval_loader(source, TransformConfig(size=(48, 64)), 2, on_bad_image="skip", workers=1))
    assert [[t["image_id"] for t in b.targets] for b in batches] == [[100], [102, 103]]
    assert batches[0].bad[0][0].endswith("1.png") and batches[1].bad == ()
    (tmp_path / "0.png").unlink()
    loader = eval_loader(source, TransformConfig(size=(48, 64)), 2, on_bad_image="skip")
    assert [[t["image_id"] for t in b.targets] for b in loader] == [[102, 103]]
    assert sorted(loader.bad_images) == [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    with pytest.raises(BadImageError, match="0.png: the file does not exist"):
        list(eval_loader(source, TransformConfig(size=(48, 64)), 2))


def test_normalised_values_and_targets(data):
    config = TransformConfig(size=(48, 64), mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1).expand(3, 48, 64)
    result, target = prepare(image, data.records[1], config, None)
    # (0/255 - .5)/.5, (51/255 - .25)/.25, (255/255 - 0)/1
    assert result[:, 0, 0].tolist() == pytest.approx([-1.0, -0.2, 1.0])
    assert target["boxes"].tolist() == [[4, 6, 24, 30], [30, 10, 60, 44]] and target["labels"].tolist() == [0, 1]
    assert target["boxes"].dtype == torch.float32 and target["labels"].dtype == torch.int64
    _, empty = prepare(image, data.records[0], config, random.Random(0))
    assert empty["boxes"].shape == (0, 4) and empty["labels"].shape == (0,)


def test_a_batch_and_an_epoch_without_boxes(tmp_path):
    source = dataset(tmp_path, 1)
    batch = take(TrainLoader(source, ALL, 1), 2)[1]
    assert batch.epoch == 1 and batch.targets[0]["boxes"].shape == (0, 4)


def test_arguments_are_checked(data):
    config = TransformConfig(size=(48, 64))
    with pytest.raises(
        DataError, match="expected at least one batch of 11 images for each of 1 process = 11 images, got 10"
    ):
        TrainLoader(data, config, 11)
    with pytest.raises(DataError, match="6 images for each of 2 processes = 12 images, got 10"):
        TrainLoader(data, config, 6, world_size=2)
    with pytest.raises(DataError, match="expected batch_size >= 1 and 0 <= rank < world_size, got 2, 2, 2"):
        TrainLoader(data, config, 2, rank=2, world_size=2)
    with pytest.raises(DataError, match="on_bad_image: expected one of raise, skip, got 'ignore'"):
        TrainLoader(data, config, 2, on_bad_image="ignore")
    with pytest.raises(DataError, match="cache: expected one of none, ram, got 'disk'"):
        eval_loader(data, config, 2, cache="disk")
    with pytest.raises(DataError, match="workers, timeout: expected workers >= 0 and timeout > 0, got -1"):
        next(iter(TrainLoader(data, config, 2, workers=-1)))
    for bad in ({"hflip": 1.5}, {"zoom": -0.1}, {"jitter": float("nan")}, {"size": (0, 4)}, {"size": (4, 4, 4)},
                {"size": None, "short_side": 9, "long_side": 8}, {"std": (0.0, 1.0, 1.0)}):  # fmt: skip
        with pytest.raises(
            DataError, match=f"TransformConfig: .*{'short_side' if 'short_side' in bad else next(iter(bad))}"
        ):
            TransformConfig(**bad)


def test_a_killed_worker_is_reported_at_once(data):
    stream = iter(TrainLoader(data, ALL, 2, workers=1))
    next(stream)
    started = time.monotonic()
    # torch raises its own message from a signal handler, also in code outside of the loader.
    with pytest.raises(RuntimeError, match="a worker process died|worker .* is killed by signal"):
        for child in multiprocessing.active_children():
            child.kill()
        for _ in range(50):
            next(stream)
    assert time.monotonic() - started < 20


def test_a_hanging_worker_times_out(data, monkeypatch):
    monkeypatch.setattr("ioubal_kernels.detection.data.loader.decode_rgb", lambda *_: time.sleep(2))
    stream = iter(TrainLoader(data, ALL, 2, workers=1, timeout=0.5))
    with pytest.raises(RuntimeError, match="loader: workers=1: a worker gave no batch in time"):
        next(stream)


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. Workers are out of shared memory.",
            "enlarge /dev/shm",
        ),
        ("unable to write to file </torch_12_345_0>: No space left on device (28)", "enlarge /dev/shm"),
        ("DataLoader worker (pid 7) is killed by signal: Killed.", "a worker process died"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", "a worker process died"),
        ("DataLoader timed out after 3 seconds", "raise the timeout"),
    ],
)
def test_what_a_failing_worker_says(data, monkeypatch, message, hint):
    def fail(self):
        raise RuntimeError(message)
        yield

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", fail)
    with pytest.raises(RuntimeError, match=f"loader: workers=1: .*{hint}") as caught:
        next(iter(TrainLoader(data, ALL, 2, workers=1)))
    assert message in str(caught.value)


def test_other_errors_are_not_renamed(data, monkeypatch):
    def fail(self):
        raise RuntimeError("something else")
        yield

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", fail)
    with pytest.raises(RuntimeError, match="^something else$"):
        next(iter(TrainLoader(data, ALL, 2, workers=1)))
