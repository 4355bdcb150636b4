"""Images with their ground truth and the detections of several models side by side, as one SVG."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

from PIL import Image

from ..detection.data import Dataset, ImageRecord
from ..detection.evaluate import ImageDetections
from ..detection.palette import CLASS_COLORS

EDGE = 300  # of a panel, in the picture's units
PIXELS = 420  # longest edge of an embedded photograph
_GAP, _TITLE, _LEGEND = 10, 26, 30


def choose_images(dataset: Dataset, count: int) -> list[int]:
    """Ids of images to draw: spread evenly over the split, each the one with the most boxes (up to 8) of its part."""
    filled = [r for r in dataset.records if len(r.labels)] or dataset.records
    step = max(1, len(filled) // count)
    groups = [filled[i : i + step] for i in range(0, step * min(count, len(filled)), step)]
    return [max(group, key=lambda r: min(len(r.labels), 8)).id for group in groups]


def detections_svg(
    dataset: Dataset,
    detections: Mapping[str, Sequence[ImageDetections]],
    image_ids: Sequence[int],
    score_threshold: float,
) -> str:
    """Rows of images: ground truth, then each model's detections from `score_threshold` on, scores in per cent.

    Args:
        dataset: where the images and their boxes are.
        detections: by model.
        image_ids: which images, one a row.
        score_threshold: detections below are not drawn.
    """
    records = {r.id: r for r in dataset.records}
    found = {name: {item.image_id: item for item in items} for name, items in detections.items()}
    titles = ["ground truth", *detections]
    width = len(titles) * (EDGE + _GAP) - _GAP
    parts: list[str] = []
    top = _TITLE
    for column, title in enumerate(titles):
        parts.append(f'<text x="{column * (EDGE + _GAP)}" y="17" class="title">{html.escape(title)}</text>')
    for number, image_id in enumerate(image_ids):
        record = records[image_id]
        scale = EDGE / record.width
        height = record.height * scale
        parts.append(
            f'<defs><image id="photo{number}" width="{EDGE}" height="{height:.1f}" preserveAspectRatio="none" '
            f'href="{_data_uri(record)}"/></defs>'
        )
        for column in range(len(titles)):
            if column == 0:
                boxes = _truth(record, dataset)
            else:
                boxes = _found(found[titles[column]].get(image_id), dataset, score_threshold)
            shift = f'transform="translate({column * (EDGE + _GAP)} {top:.1f})"'
            # A nested svg cuts off what reaches beyond the image.
            parts.append(
                f'<g {shift}><svg width="{EDGE}" height="{height:.1f}"><use href="#photo{number}"/>'
                f"{''.join(_box(*box, scale, height) for box in boxes)}</svg></g>"
            )
        top += height + _GAP
    for number, name in enumerate(dataset.classes[: len(CLASS_COLORS)]):
        x = number * 110
        parts.append(
            f'<rect x="{x}" y="{top + 4:.1f}" width="14" height="14" fill="{CLASS_COLORS[number]}"/>'
            f'<text x="{x + 20}" y="{top + 16:.1f}" class="legend">{html.escape(name[:14])}</text>'
        )
    width = max(width, 110 * min(len(dataset.classes), len(CLASS_COLORS)))
    size = f'width="{width}" height="{top + _LEGEND:.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top + _LEGEND:.0f}" {size}>'
        "<style>text{font-family:system-ui,'Segoe UI',Helvetica,Arial,sans-serif}.title{font-size:15px;fill:#1f2a33}"
        ".legend{font-size:12px;fill:#5f6b76}.score{font-size:11px;fill:#000}</style>"
        f"{''.join(parts)}</svg>"
    )


def _data_uri(record: ImageRecord) -> str:
    with Image.open(record.path) as image:
        photo = image.convert("RGB")
    scale = PIXELS / max(photo.size)
    if scale < 1:
        photo = photo.resize((max(1, round(photo.width * scale)), max(1, round(photo.height * scale))))
    stream = io.BytesIO()
    photo.save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


_Box = tuple[list[float], str, str, str]  # x1 y1 x2 y2, colour, what a pointer shows, text in the picture


def _color(label: int) -> str:
    return CLASS_COLORS[label % len(CLASS_COLORS)]


def _truth(record: ImageRecord, dataset: Dataset) -> list[_Box]:
    return [
        (box, _color(label), dataset.classes[label] + ("" if trained else " (not evaluated)"), "")
        for box, label, trained in zip(record.boxes.tolist(), record.labels.tolist(), record.trainable.tolist())
    ]


def _found(item: ImageDetections | None, dataset: Dataset, score_threshold: float) -> list[_Box]:
    if item is None:
        return []
    return [
        (box, _color(label), f"{dataset.classes[label]}, score {score:.2f}", f"{100 * score:.0f}")
        for box, score, label in zip(item.boxes.tolist(), item.scores.tolist(), item.labels.tolist())
        if score >= score_threshold
    ]


def _box(box: list[float], color: str, title: str, text: str, scale: float, height: float) -> str:
    x1, y1, x2, y2 = (scale * value for value in box)
    frame = f'x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}" fill="none"'
    # Dark below bright: visible on any background.
    drawn = (
        f"<g><title>{html.escape(title)}</title>"
        f'<rect {frame} stroke="#000" stroke-opacity=".6" stroke-width="3.4"/>'
        f'<rect {frame} stroke="{color}" stroke-width="1.8"/>'
    )
    if text:
        x, y = min(max(x1, 0), EDGE - 18), min(max(y1 - 12, 0), height - 12)
        drawn += (
            f'<rect x="{x:.1f}" y="{y:.1f}" width="17" height="12" fill="{color}" fill-opacity=".9"/>'
            f'<text x="{x + 2:.1f}" y="{y + 10:.1f}" class="score">{text}</text>'
        )
    return drawn + "</g>"
