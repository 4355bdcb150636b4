"""The built-in synthetic detection set: textured backgrounds, overlapping rotated sprites, occlusion, noise and blur.

Image files plus COCO JSON, so it is read by the same code as real data. The shape of a sprite decides its class, its
hue is only a hint. Each image is made from (seed, split, index), so the files are the same for any number of worker
processes.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from ..limits import SYNTHETIC_EDGE
from .records import DataError
from .shapes import SHAPES, background, colour, paint, sprite_mask, texture

FORMAT_VERSION = 3
"""Raised whenever the same parameters would give other pictures."""

PARAMETER_FILE = "synthetic.json"
MIN_VISIBLE = 0.35
_CHUNK = 25
_SPLIT_NUMBER = {"train": 0, "val": 1}


def render(seed: int, split: str, index: int, size: int, classes: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """One picture and its objects.

    Sprites are laid over each other. A sprite that would hide an earlier one so far that less than 35 % of it stays
    visible is moved, and left out if that does not help. Boxes enclose the visible pixels.

    Returns:
        uint8 (size, size, 3), and one dict per object: `label`, `bbox` [x, y, w, h] and `area` (visible pixels).
    """
    rng = np.random.default_rng([seed, _SPLIT_NUMBER[split], index, size, classes])
    canvas = background(rng, size)
    owner = np.full((size, size), -1, dtype=np.int16)
    labels: list[int] = []
    full: list[int] = []
    for _ in range(int(rng.integers(3, 9))):
        label = int(rng.integers(classes))
        # Radii are log-uniform: small objects are as frequent as large ones.
        radius = size * float(np.exp(rng.uniform(np.log(0.08), np.log(0.25))))
        mask = sprite_mask(SHAPES[label], radius, float(rng.uniform(0.65, 1.0)), float(rng.uniform(0, 2 * np.pi)))
        look = _appearance(rng, label, classes, mask.shape[0])
        shade = float(rng.uniform(0.85, 1.0))
        for _attempt in range(4):
            placed = _place(rng, mask, owner, full)
            if placed is not None:
                window, part = placed
                alpha = part[:, :, None] * shade
                rows, columns = window
                source = look[rows[1] : rows[1] + part.shape[0], columns[1] : columns[1] + part.shape[1]]
                area = (slice(rows[0], rows[0] + part.shape[0]), slice(columns[0], columns[0] + part.shape[1]))
                canvas[area] += alpha * (source - canvas[area])
                owner[area][part > 0.5] = len(labels)
                labels.append(label)
                full.append(int((mask > 0.5).sum()))
                break
    return _finish(rng, canvas), _objects(owner, labels)


def _appearance(rng: np.random.Generator, label: int, classes: int, side: int) -> np.ndarray:
    """The sprite's texture: its hue is the class's in seven of ten sprites, and anything in the others."""
    hue = label / classes + rng.normal(0, 0.06) if rng.random() < 0.7 else rng.uniform(0, 1)
    first = colour(hue, rng.uniform(0.3, 0.9), rng.uniform(0.35, 1.0))
    second = first * rng.uniform(0.45, 0.9) + rng.normal(0, 14, 3)
    return paint(texture(rng, side, side), first, second.astype(np.float32))


def _place(
    rng: np.random.Generator, mask: np.ndarray, owner: np.ndarray, full: list[int]
) -> tuple[tuple[tuple[int, int], tuple[int, int]], np.ndarray] | None:
    """A random place: ((row, row in the mask), the same for columns) and the part of the mask inside the picture.

    None when too little of this sprite would be inside or an earlier one would be hidden too far.
    """
    size, side = owner.shape[0], mask.shape[0]
    middle = rng.uniform(0.02 * size, 0.98 * size, 2)
    top, left = (int(round(float(value))) - side // 2 for value in middle)
    row, column = max(top, 0), max(left, 0)
    part = mask[row - top : min(side, size - top), column - left : min(side, size - left)]
    solid = part > 0.5
    if solid.sum() < 0.5 * (mask > 0.5).sum():
        return None
    below = owner[row : row + part.shape[0], column : column + part.shape[1]]
    for k in np.unique(below[solid]):
        if k >= 0:
            left_over = int((owner == k).sum()) - int((below[solid] == k).sum())
            if left_over < MIN_VISIBLE * full[k]:
                return None
    return ((row, row - top), (column, column - left)), part


def _finish(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Blur, lighting and sensor noise."""
    size = canvas.shape[0]
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    if rng.random() < 0.6:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.1))))
    result = np.asarray(image, dtype=np.float32) * np.float32(rng.uniform(0.8, 1.15))
    result += rng.standard_normal((size, size, 3), dtype=np.float32) * np.float32(rng.uniform(2, 12))
    return result.clip(0, 255).astype(np.uint8)


def _objects(owner: np.ndarray, labels: list[int]) -> list[dict[str, Any]]:
    result = []
    for k, label in enumerate(labels):
        ys, xs = np.nonzero(owner == k)
        x1, y1, x2, y2 = int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1
        result.append({"label": label, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": int(len(xs))})
    return result


def make_synthetic(
    out_dir: str | os.PathLike[str],
    train: int = 1500,
    val: int = 300,
    size: int = 128,
    classes: int = 4,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Make the set in `out_dir`, or reuse it when it was made with the same parameters.

    The folder appears only when it is complete: everything is written to a sibling first, which an interrupted call
    leaves behind and the next one continues.

    Args:
        out_dir: the folder; it must not exist, be empty, or hold this very set.
        train, val: number of images.
        size: pixels of the square images, 32 to 2048.
        classes: 1 to 8.
        seed: a non-negative integer.
        workers: processes; None takes the CPUs this process may use, at most 16; 1 works in this process.
        progress: called in this process as `progress(done, total)`.

    Returns:
        The absolute path.

    Raises:
        DataError: a parameter out of range, or `out_dir` holds something else.
        OSError: the folder cannot be written.
    """
    wanted = {"train": train, "val": val, "size": size, "classes": classes, "seed": seed}
    limits = {
        "train": (1, 10_000_000),
        "val": (0, 10_000_000),
        "size": SYNTHETIC_EDGE,
        "classes": (1, len(SHAPES)),
        "seed": (0, 2**63),
    }
    for name, (low, high) in limits.items():
        value = wanted[name]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise DataError(f"make_synthetic: {name}: expected an integer from {low} to {high}, got {value!r}")
    parameters = {"format": FORMAT_VERSION, **wanted}
    target = os.path.abspath(os.fspath(out_dir))
    parent, name = os.path.split(target)
    os.makedirs(parent, exist_ok=True)
    total = train + val
    with _locked(os.path.join(parent, f".{name}.lock")):
        if _is_made(target, parameters):
            if progress is not None:
                progress(total, total)
            return target
        partial = os.path.join(parent, f".{name}.partial")
        _prepare(partial, parameters)
        _make_chunks(partial, wanted, workers, progress)
        _write_annotations(partial, wanted)
        shutil.rmtree(os.path.join(partial, "chunks"))
        if os.path.isdir(target):
            os.rmdir(target)
        os.rename(partial, target)
    return target


def _is_made(target: str, parameters: dict[str, int]) -> bool:
    """Whether the set is there; an error when something else is."""
    if not os.path.lexists(target) or (os.path.isdir(target) and not os.listdir(target)):
        return False
    try:
        with open(os.path.join(target, PARAMETER_FILE), encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        raise DataError(
            f"make_synthetic: out_dir {target}: expected a new folder or a synthetic set, found something else"
        ) from None
    if found != parameters:
        raise DataError(
            f"make_synthetic: out_dir {target}: holds a set made with other parameters: "
            f"expected {parameters}, found {found}"
        )
    return True


def _prepare(partial: str, parameters: dict[str, int]) -> None:
    """An empty working folder, or the one an interrupted call with the same parameters left."""
    path = os.path.join(partial, PARAMETER_FILE)
    if os.path.isdir(partial):
        try:
            with open(path, encoding="utf-8") as file:
                if json.load(file) == parameters:
                    os.makedirs(os.path.join(partial, "chunks"), exist_ok=True)
                    return
        except (OSError, ValueError):
            pass
        shutil.rmtree(partial)
    for folder in ("annotations", "chunks", "images/train", "images/val"):
        os.makedirs(os.path.join(partial, folder))
    _write_json(path, parameters)


def _make_chunks(
    partial: str, wanted: dict[str, int], workers: int | None, progress: Callable[[int, int], None] | None
) -> None:
    jobs, done = [], 0
    for split in ("train", "val"):
        for start in range(0, wanted[split], _CHUNK):
            stop = min(start + _CHUNK, wanted[split])
            if os.path.exists(_chunk_path(partial, split, start)):
                done += stop - start
            else:
                jobs.append((partial, split, start, stop, wanted["seed"], wanted["size"], wanted["classes"]))
    total = wanted["train"] + wanted["val"]
    if progress is not None:
        progress(done, total)
    if workers is None:
        workers = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for count in _run(jobs, min(max(workers, 1), len(jobs))):
        done += count
        if progress is not None:
            progress(done, total)


def _run(jobs: list[tuple[Any, ...]], workers: int) -> Iterator[int]:
    if workers <= 1:
        for job in jobs:
            yield _make_chunk(job)
        return
    # The children import NumPy and Pillow only through this package; forking spares them importing torch again.
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_ignore_interrupt)
    try:
        for future in as_completed([pool.submit(_make_chunk, job) for job in jobs]):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupt() -> None:
    # Ctrl-C reaches the whole group; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _chunk_path(partial: str, split: str, start: int) -> str:
    return os.path.join(partial, "chunks", f"{split}-{start:08d}.json")


def _make_chunk(job: tuple[str, str, int, int, int, int, int]) -> int:
    """Writes the images from `start` to `stop`, then, as the sign of completion, their annotations."""
    partial, split, start, stop, seed, size, classes = job
    objects = []
    for index in range(start, stop):
        pixels, found = render(seed, split, index, size, classes)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
        with open(os.path.join(partial, "images", split, _file_name(index)), "wb") as file:
            file.write(buffer.getvalue())
        objects.append(found)
    _write_json(_chunk_path(partial, split, start), objects)
    return stop - start


def _file_name(index: int) -> str:
    return f"{index + 1:07d}.jpg"


def _write_annotations(partial: str, wanted: dict[str, int]) -> None:
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(SHAPES[: wanted["classes"]])]
    size = wanted["size"]
    for split in ("train", "val"):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for start in range(0, wanted[split], _CHUNK):
            with open(_chunk_path(partial, split, start), encoding="utf-8") as file:
                chunk = json.load(file)
            for objects in chunk:
                image_id = len(images) + 1
                images.append({"id": image_id, "file_name": _file_name(image_id - 1), "width": size, "height": size})
                for item in objects:
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": image_id,
                            "category_id": item["label"] + 1,
                            "bbox": item["bbox"],
                            "area": item["area"],
                            "iscrowd": 0,
                        }
                    )
        if images:
            data = {"images": images, "annotations": annotations, "categories": categories}
            _write_json(os.path.join(partial, "annotations", f"instances_{split}.json"), data)


def _write_json(path: str, data: Any) -> None:
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(data, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Only one process makes a set at a time; where the system has no flock, nothing is locked."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    while True:
        with open(path, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                # The process that held it before has removed it: lock the new file instead.
                if os.fstat(file.fileno()).st_ino != os.stat(path).st_ino:
                    continue
            except FileNotFoundError:
                continue
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            return
