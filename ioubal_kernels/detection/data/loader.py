"""Batches for training and evaluation: deterministic for any number of workers, resumable at any batch."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from .file_augment import augment_file
from .files import MAX_PIXELS, decode_rgb
from .records import BadImageError, DataError, Dataset
from .sampling import BatchStream, Key
from .transforms import TransformConfig, prepare, resize, resize_image, sample_random

BAD_IMAGE_POLICIES = ("raise", "skip")
CACHES = ("none", "ram")

_MAX_REPLACEMENTS = 20


@dataclass
class Batch:
    """A batch of images and their targets.

    Attributes:
        images: float32 (N, 3, H, W), normalised, zero-padded right and below to a common multiple of `size_divisor`.
        targets: N dicts: `boxes` float32 (G, 4) x1 y1 x2 y2 in pixels of `images` (boxes to train on only), `labels`
            int64 (G,), `image_id` int, `orig_size` (height, width) of the file, `size` (height, width) before
            padding, `scale` (sx, sy): network pixels per file pixel, without augmentation (see `boxes_to_original`;
            with `zoom_out` or `iou_crop` per pixel of the enlarged or cropped image).
        epoch: the epoch of these samples.
        bad: (path, message) of images replaced because `on_bad_image="skip"`.
        position: samples of the epoch used up after this batch, over all ranks.
    """

    images: torch.Tensor
    targets: list[dict[str, Any]]
    epoch: int = 0
    bad: tuple[tuple[str, str], ...] = ()
    position: int = 0

    def pin_memory(self) -> Batch:
        """The batch with its tensors in pinned memory."""
        targets = [
            {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in t.items()} for t in self.targets
        ]
        return Batch(self.images.pin_memory(), targets, self.epoch, self.bad, self.position)


def boxes_to_original(boxes: torch.Tensor, target: dict[str, Any]) -> torch.Tensor:
    """Detections of an unaugmented image, (D, 4) in network pixels, as pixels of the file, clipped to it."""
    sx, sy = target["scale"]
    height, width = target["orig_size"]
    result = boxes / boxes.new_tensor([sx, sy, sx, sy])
    return torch.minimum(result.clamp(min=0), result.new_tensor([width, height, width, height]))


@dataclass
class _Sample:
    image: torch.Tensor | None
    target: dict[str, Any]
    key: Key
    bad: list[tuple[str, str]]


class _Images(TorchDataset):  # type: ignore[type-arg]
    """Samples by `Key`: decoded (or cached), resized, augmented when `seed` is given.

    Training with `TransformConfig.changes_file` caches images as they are in their files, anything else resized ones.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: TransformConfig,
        seed: int | None,
        on_bad_image: str,
        cache: str,
        max_pixels: int,
    ) -> None:
        if on_bad_image not in BAD_IMAGE_POLICIES:
            raise DataError(
                f"loader: on_bad_image: expected one of {', '.join(BAD_IMAGE_POLICIES)}, got {on_bad_image!r}"
            )
        if cache not in CACHES:
            raise DataError(f"loader: cache: expected one of {', '.join(CACHES)}, got {cache!r}")
        self.records = dataset.records
        self.config = config
        self.seed = seed
        self.changes_file = seed is not None and config.changes_file
        self.skip = on_bad_image == "skip"
        self.max_pixels = max_pixels
        self.cache: list[torch.Tensor | BadImageError] | None = None
        self.wants_cache = cache == "ram"

    def fill_cache(self) -> None:
        """Decodes everything once; before workers are forked, so that they share the memory."""
        if self.wants_cache and self.cache is None:
            threads = max(1, torch.get_num_threads())
            with ThreadPoolExecutor(threads) as pool:
                self.cache = list(pool.map(self._try_load, range(len(self.records))))

    def _try_load(self, index: int) -> torch.Tensor | BadImageError:
        try:
            return self._load(index)
        except BadImageError as error:
            return error

    def _load(self, index: int) -> torch.Tensor:
        pixels = decode_rgb(self.records[index], self.max_pixels)
        if self.changes_file:
            return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        return resize(pixels, self.config)

    def image(self, index: int) -> torch.Tensor:
        """uint8 (3, H, W) of network size; as in the file with `changes_file`.

        Raises:
            BadImageError: with the file's path.
        """
        if self.cache is None:
            return self._load(index)
        cached = self.cache[index]
        if isinstance(cached, BadImageError):
            raise cached
        return cached

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: Key) -> _Sample:
        bad: list[tuple[str, str]] = []
        index = key.index
        while True:
            record = self.records[index]
            try:
                image = self.image(index)
                break
            except BadImageError as error:
                if not self.skip:
                    raise BadImageError(f"{error} (image id {record.id}, {record.name})") from None
                bad.append((record.path, str(error)))
                if self.seed is None:
                    return _Sample(None, {}, key, bad)
                if len(bad) > _MAX_REPLACEMENTS:
                    raise BadImageError(
                        "loader: no readable image found as a replacement", [text for _, text in bad]
                    ) from None
                # The same replacement in every run, whichever worker meets the bad image.
                index = sample_random(self.seed, key.epoch, key.index + len(self.records) * len(bad)).randrange(
                    len(self.records)
                )
        rng = None if self.seed is None else sample_random(self.seed, key.epoch, index)
        if not self.changes_file:
            network_input, target = prepare(image, record, self.config, rng)
            return _Sample(network_input, target, key, bad)
        drawn = sample_random(self.seed, key.epoch, index, "/file")
        config = self.config
        if config.short_side_range is not None:
            config = replace(config, short_side=drawn.randint(*config.short_side_range), short_side_range=None)
        image, changed = augment_file(image, record, config, drawn)
        network_input, target = prepare(resize_image(image, config), changed, config, rng)
        target["orig_size"] = (record.height, record.width)
        return _Sample(network_input, target, key, bad)


@dataclass(frozen=True)
class _Collate:
    """Pads the samples to a common size, a multiple of `divisor`."""

    divisor: int

    def __call__(self, samples: list[_Sample]) -> Batch:
        bad = tuple(entry for sample in samples for entry in sample.bad)
        kept = [sample for sample in samples if sample.image is not None]
        images = [sample.image for sample in kept if sample.image is not None]
        height, width = (max((image.shape[axis] for image in images), default=0) for axis in (1, 2))
        height, width = (-(-side // self.divisor) * self.divisor for side in (height, width))
        result = torch.zeros((len(images), 3, height, width), dtype=torch.float32)
        for k, image in enumerate(images):
            result[k, :, : image.shape[1], : image.shape[2]] = image
        key = samples[0].key
        return Batch(result, [sample.target for sample in kept], key.epoch, bad, key.position)


def _data_loader(images: _Images, batches: Any, workers: int, timeout: float) -> DataLoader[Any]:
    if workers < 0 or timeout <= 0:
        raise DataError(f"loader: workers, timeout: expected workers >= 0 and timeout > 0, got {workers}, {timeout}")
    images.fill_cache()
    return DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_Collate(images.config.size_divisor),
        worker_init_fn=_leave_signals_to_the_parent,
        timeout=timeout if workers else 0,
        # For the workers' base seed, which nothing here uses: the global generator stays as it is.
        generator=torch.Generator().manual_seed(0),
    )


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C, a lost terminal and a scheduler's SIGTERM reach all processes of a job: what to do about them is for the
    training alone to decide, which still needs its batches. Its own SIGTERM does end a worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # only it tells who sent one
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent, args=(os.getppid(),), daemon=True).start()


def _end_by_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _batches(loader: DataLoader[Any], workers: int) -> Iterator[Batch]:
    """The loader's batches; what a dead or hanging worker raises says what to do."""
    iterator = iter(loader)
    try:
        yield from iterator
    except DataError:
        raise
    except RuntimeError as error:
        text = str(error)
        if "shared memory" in text or "</torch_" in text or "/dev/shm" in text or "bus error" in text.lower():
            hint = "too little shared memory: enlarge /dev/shm or use workers=0"
        elif "timed out" in text:
            hint = "a worker gave no batch in time: raise the timeout, or use workers=0 to see where it hangs"
        elif "exited unexpectedly" in text or "killed by signal" in text:
            hint = "a worker process died (out of memory?): use fewer workers, or workers=0"
        else:
            raise
        raise RuntimeError(f"loader: workers={workers}: {hint}. {text}") from error
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        if workers == 0:
            raise
        # Killed between announcing a batch and handing over its memory.
        hint = "a worker process died (out of memory?): use fewer workers, or workers=0"
        raise RuntimeError(f"loader: workers={workers}: {hint}. {error}") from error
    finally:
        # An exception's traceback keeps the iterator alive; collected later, it waits five seconds for each worker.
        shutdown = getattr(iterator, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()


class TrainLoader:
    """An endless stream of training batches over epochs; `state_dict` says where it is.

    `for batch in loader` continues from the current state, for ever (the caller breaks after its number of steps).
    The order is a permutation from (seed, epoch); an epoch's incomplete last batch is left out. The state counts the
    batches handed out, not those prefetched by workers, so a resumed loader goes on with exactly the next batch, for
    any number of workers.

    Args:
        dataset: the split.
        transform: sizes and augmentation.
        batch_size: images per batch and rank.
        seed: of order and augmentation.
        workers: processes; 0 loads in this one.
        rank, world_size: this process takes its slice of each global batch.
        on_bad_image: "raise", or "skip": replace by another sample (the same one every time), counted in `bad_images`.
        bad_image_limit: with "skip": the share of the dataset's images that may be bad (always at least one).
        cache: "none" or "ram": keep decoded images in memory (uint8): resized ones, those of the files where
            `transform.changes_file`.
        timeout: seconds to wait for a worker before giving up.
        max_pixels: refuse larger images before decoding.

    Attributes:
        bad_images: path -> message of the bad images met so far.

    Raises:
        DataError: empty dataset, or fewer images than batch_size * world_size.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: TransformConfig,
        batch_size: int,
        *,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        on_bad_image: str = "raise",
        bad_image_limit: float = 0.001,
        cache: str = "none",
        timeout: float = 120.0,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.stream = BatchStream(len(dataset), batch_size, seed, rank, world_size)
        self.images = _Images(dataset, transform, seed, on_bad_image, cache, max_pixels)
        self.workers = workers
        self.timeout = timeout
        self.max_bad_images = dataset.most_bad_images(bad_image_limit)
        self.bad_images: dict[str, str] = {}

    @property
    def batches_per_epoch(self) -> int:
        """Complete batches of an epoch."""
        return self.stream.batches_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current state on.

        Raises:
            BadImageError: a bad image with on_bad_image="raise", or more of them than the limit with "skip".
            RuntimeError: a worker died or gave nothing within the timeout.
        """
        for batch in _batches(_data_loader(self.images, self.stream, self.workers, self.timeout), self.workers):
            self.bad_images.update(batch.bad)
            if len(self.bad_images) > self.max_bad_images:
                raise BadImageError(
                    f"loader: expected at most {self.max_bad_images} bad images with on_bad_image='skip'",
                    list(self.bad_images.values()),
                )
            self.stream.epoch, self.stream.position = batch.epoch, batch.position
            yield batch

    def state_dict(self) -> dict[str, int]:
        """{"epoch", "position" (samples of the epoch already used, all ranks), "seed", "num_samples"}: plain ints."""
        stream = self.stream
        return {
            "epoch": stream.epoch,
            "position": stream.position,
            "seed": stream.seed,
            "num_samples": stream.num_samples,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where the state was taken; iterators made before are not affected.

        Raises:
            DataError: the state is of another seed or another number of images.
        """
        own = self.state_dict()
        for name in ("seed", "num_samples"):
            if state.get(name) != own[name]:
                raise DataError(f"TrainLoader: state: {name}: expected {own[name]}, got {state.get(name)}")
        epoch, position = state.get("epoch", -1), state.get("position", -1)
        if epoch < 0 or not 0 <= position <= own["num_samples"]:
            raise DataError(
                f"TrainLoader: state: expected epoch >= 0 and position in [0, {own['num_samples']}], "
                f"got {epoch}, {position}"
            )
        self.stream.epoch, self.stream.position = epoch, position


class _EvalLoader:
    def __init__(self, images: _Images, batches: list[list[Key]], workers: int, timeout: float) -> None:
        self.images = images
        self.batches = batches
        self.workers = workers
        self.timeout = timeout
        self.bad_images: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        loader = _data_loader(self.images, self.batches, self.workers, self.timeout)
        for batch in _batches(loader, self.workers):
            self.bad_images.update(batch.bad)
            # A batch of bad images alone has nothing to evaluate.
            if batch.targets:
                yield batch


def eval_loader(
    dataset: Dataset,
    transform: TransformConfig,
    batch_size: int,
    *,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    on_bad_image: str = "raise",
    cache: str = "none",
    timeout: float = 120.0,
    max_pixels: int = MAX_PIXELS,
) -> Any:
    """Every image once, by name, without augmentation: an iterable of `Batch` with `len()`, any number of times.

    Batches are cut once from the images sorted by name, and rank r gets batches r, r + world_size and so on: an image
    is in the same batch, padded to the same size, for any number of processes, and nothing is repeated.

    With `on_bad_image="skip"` a bad image is
    left out and kept in the result's `bad_images` (path -> message); a batch of bad images alone is not yielded.

    Raises:
        DataError: an argument out of range.
    """
    if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
        raise DataError(
            "eval_loader: batch_size, rank, world_size: expected batch_size >= 1 and 0 <= rank < world_size, "
            f"got {batch_size}, {rank}, {world_size}"
        )
    order = sorted(range(len(dataset)), key=lambda index: (dataset.records[index].name, index))
    keys = [Key(0, index, position) for position, index in enumerate(order, start=1)]
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)][rank::world_size]
    images = _Images(dataset, transform, None, on_bad_image, cache, max_pixels)
    return _EvalLoader(images, batches, workers, timeout)
