"""Pascal VOC and Cityscapes folders as COCO JSON."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from typing import Any

from .detect import find_layout, load_dataset
from .records import DataError, Dataset, ImageRecord

CONVERTIBLE = ("voc", "cityscapes")
IMAGE_MODES = ("copy", "link", "none")


def convert_dataset(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    kind: str,
    *,
    images: str = "link",
    splits: tuple[str, ...] | None = None,
    allow_symlinks: bool = False,
) -> dict[str, tuple[int, int]]:
    """Write OUT/annotations/instances_SPLIT.json and the images, in OUT/images; the COCO reader loads the result.

    Boxes, areas, classes and their order stay as they are, with clean float coordinates of the modern convention (x2 -
    x1 is the width). Category ids are Cityscapes' own, for Pascal VOC 1 .. K. COCO knows no difficult objects: they
    get "iscrowd": 1, which every COCO evaluation ignores, "ignore": 1 and, so that nothing is lost, "difficult": 1,
    which this package's reader understands. Splits without annotations become `image_info_SPLIT.json`. A file name
    keeps the folders below the images', so that cities and years stay apart.

    Args:
        root: the Pascal VOC or Cityscapes folder.
        out: the new folder; it may exist, empty. It appears complete or not at all.
        kind: "voc" or "cityscapes".
        images: "copy", "link" (hard links where the file system can, else copies) or "none": no images, and file names
            relative to `root`; the folder `annotations` then belongs into `root`, to be read with format coco.
        splits: names of splits as `load_dataset` takes them; None: all of them (of several VOC years the joined ones).
        allow_symlinks: as in `load_dataset`.

    Returns:
        (images, boxes) by split.

    Raises:
        DataError: an argument out of range, a folder `out` with something in it, or anything wrong with the dataset.
        OSError: `out` cannot be written.
    """
    for name, value, known in (("kind", kind, CONVERTIBLE), ("images", images, IMAGE_MODES)):
        if value not in known:
            raise DataError(f"convert_dataset: {name}: expected one of {', '.join(known)}, got {value!r}")
    target = os.path.abspath(os.fspath(out))
    if os.path.exists(target) and (not os.path.isdir(target) or os.listdir(target)):
        raise DataError(f"convert_dataset: out: expected a new or an empty folder, {target} has something in it")
    layout = find_layout(root, kind)
    # VOC2007/trainval and the like repeat what the joined splits hold.
    names = splits or tuple(split for split in layout.splits if "/" not in split)
    datasets = [load_dataset(root, split, kind, allow_symlinks=allow_symlinks) for split in names]
    os.makedirs(os.path.dirname(target), exist_ok=True)
    # Beside its place, so that the last step is a rename.
    partial = tempfile.mkdtemp(prefix=f".{os.path.basename(target)}.", dir=os.path.dirname(target))
    try:
        os.mkdir(os.path.join(partial, "annotations"))
        for dataset in datasets:
            prefix = "instances" if dataset.labelled else "image_info"
            name = f"{prefix}_{dataset.split.replace('/', '_')}.json"
            with open(os.path.join(partial, "annotations", name), "w", encoding="utf-8") as file:
                json.dump(_coco_dict(dataset, images == "none"), file, allow_nan=False)
        if images != "none":
            _place_images(datasets, os.path.join(partial, "images"), images == "link")
        # mkdtemp's folder is for its owner alone.
        os.chmod(partial, 0o777 & ~_umask())
        if os.path.isdir(target):
            os.rmdir(target)
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return {dataset.split: (len(dataset), dataset.num_boxes) for dataset in datasets}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _file_name(dataset: Dataset, record: ImageRecord, from_root: bool) -> str:
    path = os.path.relpath(record.path, dataset.root).replace(os.sep, "/")
    if from_root:
        return path
    parts = path.split("/")
    if dataset.format == "cityscapes":
        return "/".join(parts[1:])
    # [VOCdevkit/][VOC2007/]JPEGImages/FILE
    return "/".join([*(part for part in parts[:-1] if part not in ("VOCdevkit", "JPEGImages")), parts[-1]])


def _coco_dict(dataset: Dataset, from_root: bool) -> dict[str, Any]:
    ids = list(dataset.category_ids) if dataset.format == "cityscapes" else list(range(1, dataset.num_classes + 1))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in dataset.records:
        images.append(
            {
                "id": record.id,
                "file_name": _file_name(dataset, record, from_root),
                "width": record.width,
                "height": record.height,
            }
        )
        for g in range(len(record.labels)):
            x1, y1, x2, y2 = (float(value) for value in record.boxes[g])
            difficult, crowd = bool(record.difficult[g]), bool(record.iscrowd[g])
            item: dict[str, Any] = {
                "id": len(annotations) + 1,
                "image_id": record.id,
                "category_id": ids[int(record.labels[g])],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": float(record.areas[g]),
                "iscrowd": int(crowd or difficult),
            }
            if difficult:
                item.update(ignore=1, difficult=1)
            annotations.append(item)
    categories = [{"id": key, "name": name} for key, name in zip(ids, dataset.classes, strict=True)]
    result = {"info": {}, "licenses": [], "images": images, "categories": categories}
    return {**result, "annotations": annotations} if dataset.labelled else result


def _place_images(datasets: list[Dataset], folder: str, link: bool) -> None:
    places = {_file_name(dataset, record, False): record.path for dataset in datasets for record in dataset.records}
    for name, source in places.items():
        target = os.path.join(folder, *name.split("/"))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if link:
            try:
                # Of the file itself, where it is reached through a symbolic link.
                os.link(os.path.realpath(source), target)
                continue
            except OSError:
                # Another file system, or one without hard links: copies from here on, without trying again.
                link = False
        shutil.copyfile(source, target)
