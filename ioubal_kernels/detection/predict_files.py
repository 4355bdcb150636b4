"""`ioubal predict`: a trained model on image files; pictures with boxes, and the detections as JSON."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from .checkpoint import atomic_write, atomic_write_text
from .data import BadImageError, DataError, Dataset, ImageRecord, make_record
from .data.files import decode_rgb, exif_orientation, image_size
from .errors import UsageError
from .evaluate import ImageDetections
from .palette import CLASS_COLORS
from .predict import TrainedModel, detect, open_trained
from .progress import Reporter
from .resources import available_cores, resolve_device
from .rundir import prepare_run_folder

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
JSON_FILE = "predictions.json"
Rectangle = tuple[int, int, int, int]


def predict_files(
    target: str,
    inputs: Sequence[str],
    out: Path,
    *,
    score: float,
    changes: Sequence[tuple[str, Any]],
    reporter: Reporter,
) -> dict[str, Any]:
    """Detect on images, draw them into `out`, write `out`/predictions.json. Returns what that file holds.

    Args:
        target: a run's folder or a checkpoint file.
        inputs: image files, and folders whose images are taken with those of their subfolders, `out` excepted.
        out: gets one picture per image under the image's name (below its input folder).
        score: detections below are left out.
        changes: (key, value) over the checkpoint's configuration.
        reporter: where messages go.

    Raises:
        UsageError, DataError: before anything is written: no such input, unreadable images (all are listed), a picture
            that would replace an input.
        OutputError: `out` cannot be written.
    """
    if not 0.0 <= score <= 1.0:
        raise UsageError(f"--score: expected a number from 0 to 1, got {score}")
    trained = open_trained(target, changes)
    trained.config.set("inference.score_threshold", score)
    # Every image was read before; one that changes while this runs is an error and not left out.
    trained.config.set("data.on_bad_image", "raise")
    device = resolve_device(trained.config.train.device)
    dataset, pictures = _find_images(inputs, out, trained)
    turned = sum(exif_orientation(record.path) != 1 for record in dataset.records)
    if turned:
        reporter.warn(f"orientation tags are not applied: {turned} images are used as their pixels are stored")
    prepare_run_folder(out)
    reporter.info(f"{trained.path}: {trained.config.model.name}, {len(dataset)} images, {device}")
    detections = detect(trained, dataset, device, reporter, "predict")
    found = {item.image_id: item for item in detections}
    result: dict[str, Any] = {"classes": list(trained.classes), "score": score, "images": []}
    for record, picture in zip(dataset.records, pictures, strict=True):
        result["images"].append(_as_json(record, found[record.id], trained.classes))
        _draw(record, found[record.id], trained.classes, picture)
    atomic_write_text(out / JSON_FILE, json.dumps(result, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    count = sum(len(image["detections"]) for image in result["images"])
    reporter.info(f"{count} detections with a score of at least {score:g}; pictures and {JSON_FILE} are in {out}")
    return result


def _find_images(inputs: Sequence[str], out: Path, trained: TrainedModel) -> tuple[Dataset, list[Path]]:
    """The images as a data set without boxes, and the picture that each one becomes."""
    files: list[tuple[Path, Path]] = []  # the image, and its name below `out`
    problems: list[str] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            images = _images_below(path, out)
            files += [(image, image.relative_to(path)) for image in images]
            if not images:
                problems.append(f"{path}: the folder has no images ({', '.join(SUFFIXES)})")
        elif path.is_file():
            files.append((path, Path(path.name)))
        else:
            problems.append(f"{path}: expected an image or a folder of images, found nothing")
    records, pictures, taken = [], [], set()
    sources = {image.resolve() for image, _ in files}
    for number, (image, name) in enumerate(files, start=1):
        try:
            width, height = image_size(str(image))
        except BadImageError as error:
            problems.append(str(error))
            continue
        picture = out / name.with_suffix(".jpg" if name.suffix.lower() in (".jpg", ".jpeg") else ".png")
        copy = 1
        while picture in taken:
            copy += 1
            picture = picture.with_name(f"{name.stem}-{copy}{picture.suffix}")
        taken.add(picture)
        if picture.resolve() in sources:
            problems.append(f"{image}: its picture would replace an input: choose another folder with -o")
        pictures.append(picture)
        path = os.path.abspath(image)
        records.append(
            make_record(id=number, name=str(image), path=path, width=width, height=height, boxes=[], labels=[])
        )
    # A header says nothing of the rest of the file.
    with ThreadPoolExecutor(max_workers=available_cores()) as pool:
        problems += [problem for problem in pool.map(_unreadable, records) if problem]
    if problems:
        raise DataError("predict: images", problems)
    dataset = Dataset("", "images", "images", trained.classes, trained.classes, records)
    return dataset, pictures


def _images_below(folder: Path, out: Path) -> list[Path]:
    """The folder's images, those of its subfolders included; not what an earlier call wrote into `out` below it."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    below, written = folder.resolve(), out.resolve()
    if below not in written.parents:
        return found
    return [p for p in found if written not in p.resolve().parents]


def _unreadable(record: ImageRecord) -> str | None:
    try:
        decode_rgb(record)
    except BadImageError as error:
        return str(error)
    return None


def _as_json(record: ImageRecord, found: ImageDetections, classes: Sequence[str]) -> dict[str, Any]:
    detections = [
        {"class": classes[label], "label": label, "score": round(score, 5), "box": [round(side, 2) for side in box]}
        for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    ]
    return {"image": record.name, "width": record.width, "height": record.height, "detections": detections}


def _draw(record: ImageRecord, found: ImageDetections, classes: Sequence[str], path: Path) -> None:
    """The image in its own size with boxes, class names and scores; the best ones on top."""
    image = Image.fromarray(decode_rgb(record))
    draw = ImageDraw.Draw(image)
    edge = max(record.width, record.height)
    line, font = max(1, round(edge / 350)), ImageFont.truetype(_font_file(), max(11, edge / 50))
    boxes, labels = found.boxes.tolist(), found.labels.tolist()
    colors = [CLASS_COLORS[label % len(CLASS_COLORS)] for label in labels]
    for box, color in reversed(list(zip(boxes, colors, strict=True))):
        # Dark around bright: visible on any background.
        draw.rectangle([box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1], outline="black", width=line + 2)
        draw.rectangle(box, outline=color, width=line)
    texts = [f"{classes[c]} {100 * score:.0f}" for c, score in zip(labels, found.scores.tolist(), strict=True)]
    places: list[Rectangle] = []
    for box, text in zip(boxes, texts, strict=True):
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        size = right - left + 2 * line, bottom - top + 2 * line
        places.append(_place(box, size, (record.width, record.height), places))
    for place, text, color in reversed(list(zip(places, texts, colors, strict=True))):
        left, top, _, _ = draw.textbbox((0, 0), text, font=font)
        draw.rectangle([place[0], place[1], place[2] - 1, place[3] - 1], fill=color)
        draw.text((place[0] + line - left, place[1] + line - top), text, fill="black", font=font)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if path.suffix == ".jpg" else "PNG", quality=95)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: file.write(buffer.getvalue()))


def _place(
    box: Sequence[float], size: tuple[float, float], image: tuple[int, int], taken: Sequence[Rectangle]
) -> Rectangle:
    """Where a label goes: above its box, inside at the top, below, inside at the bottom: the first of these that lies
    in the image and on no other label, else the first that lies in the image.
    """
    width, height = (math.ceil(side) for side in size)
    x = min(max(0, round(box[0])), max(0, image[0] - width))
    inside = []
    for side in (box[1] - height, box[1], box[3], box[3] - height):
        y = round(side)
        if 0 <= y <= image[1] - height:
            inside.append((x, y, x + width, y + height))
    for a in inside:
        if not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in taken):
            return a
    return inside[0] if inside else (x, 0, x + width, height)


def _font_file() -> str:
    """DejaVu Sans, which comes with matplotlib: Pillow's own font has hardly more than ASCII."""
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
