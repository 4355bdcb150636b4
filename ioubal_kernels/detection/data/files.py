"""Image files named by untrusted annotations: path safety, header checks before decoding, and decoding to RGB."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from PIL import Image, UnidentifiedImageError

from .records import TURNED, BadImageError, ImageRecord, Notes

MAX_PIXELS = 100_000_000
"""Images with more pixels are refused before they are decoded."""

MAX_FILE_BYTES = 512 * 1024 * 1024

_FORMATS = ("JPEG", "PNG", "WEBP")
_EXIF_ORIENTATION = 0x0112
_DRIVE = re.compile(r"^[A-Za-z]:")


def unsafe_name(name: object) -> str | None:
    """Why `name` may not be used as a path inside the dataset; None when it may."""
    if not isinstance(name, str):
        return f"expected a string, got {type(name).__name__}"
    if not name or name.isspace():
        return "it is empty"
    if "\x00" in name:
        return "it contains a NUL character"
    if "\\" in name:
        return "it contains a backslash"
    if name.startswith(("/", "~")):
        return "it is an absolute path"
    if _DRIVE.match(name):
        return "it starts with a drive letter"
    if any(part == ".." for part in name.split("/")):
        return "it contains '..'"
    if len(name) > 1024 or any(len(part.encode("utf-8", "surrogatepass")) > 255 for part in name.split("/")):
        return "it is too long"
    if any("\ud800" <= char <= "\udfff" for char in name):
        return "it is not valid Unicode"
    return None


class FileGuard:
    """Accepts only regular files that really lie inside the dataset's folder.

    Args:
        root: the dataset's folder; it may itself be reached through links.
        allow_symlinks: accept links that lead outside.
    """

    def __init__(self, root: str | os.PathLike[str], allow_symlinks: bool = False) -> None:
        self.root = os.path.realpath(root)
        self.allow_symlinks = allow_symlinks
        self._inside: dict[str, bool] = {}

    def problem(self, path: str) -> str | None:
        """Why the file cannot be used; None when it can. Never opens it (a FIFO would block)."""
        try:
            info = os.lstat(path)
            if stat.S_ISLNK(info.st_mode):
                info = os.stat(path)
                outside = not self._contains(os.path.realpath(path))
            else:
                outside = not self._folder_inside(os.path.dirname(path))
        except FileNotFoundError:
            return "the file does not exist"
        except OSError as error:
            return f"the file cannot be looked at: {error.strerror or error}"
        if outside and not self.allow_symlinks:
            return "it is a link to outside the dataset's folder (allow_symlinks=True accepts such links)"
        if not stat.S_ISREG(info.st_mode):
            return "it is not a regular file"
        if info.st_size == 0:
            return "the file is empty (0 bytes)"
        if info.st_size > MAX_FILE_BYTES:
            return f"the file has {info.st_size} bytes, the limit is {MAX_FILE_BYTES}"
        return None

    def _folder_inside(self, folder: str) -> bool:
        if folder not in self._inside:
            self._inside[folder] = self._contains(os.path.realpath(folder))
        return self._inside[folder]

    def _contains(self, real: str) -> bool:
        return real == self.root or real.startswith(self.root.rstrip(os.sep) + os.sep)


def _open(path: str, max_pixels: int) -> Image.Image:
    """The opened image with only its header read; its pixel count is within the limit."""
    try:
        image = Image.open(path, formats=_FORMATS)
    except UnidentifiedImageError:
        raise BadImageError(f"image {path}: expected a JPEG, PNG or WebP file, got something else") from None
    except Image.DecompressionBombError:
        raise BadImageError(f"image {path}: expected at most {max_pixels} pixels, got far more") from None
    except FileNotFoundError:
        raise BadImageError(f"image {path}: the file does not exist") from None
    except Exception as error:
        # Pillow's header parsers raise many types (OSError, SyntaxError, struct.error, ValueError) for broken files.
        raise BadImageError(f"image {path}: its header cannot be read: {error}") from None
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise BadImageError(
            f"image {path}: expected at most {max_pixels} pixels, got {width} x {height} = {width * height}"
        )
    if width < 1 or height < 1:
        image.close()
        raise BadImageError(f"image {path}: expected at least one pixel, got {width} x {height}")
    return image


def image_size(path: str, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels from the file's header, as stored (EXIF orientation is not applied).

    Raises:
        BadImageError: not a readable JPEG, PNG or WebP header, or more than `max_pixels` pixels.
    """
    with _open(path, max_pixels) as image:
        return image.size


def exif_orientation(path: str, max_pixels: int = MAX_PIXELS) -> int:
    """The EXIF orientation tag, 1 (upright) when there is none."""
    with _open(path, max_pixels) as image:
        return _orientation(image.getexif)


def _orientation(getexif: Callable[[], Image.Exif]) -> int:
    try:
        return int(getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        return 1


def size_problem(record: ImageRecord, size: tuple[int, int], max_pixels: int = MAX_PIXELS) -> str | None:
    """Tells how the annotated and the stored size differ, with the EXIF orientation where that explains it."""
    if size == (record.width, record.height):
        return None
    text = (
        f"image {record.path}: size mismatch: the annotation says {record.width} x {record.height}, "
        f"the file has {size[0]} x {size[1]}"
    )
    if size == (record.height, record.width):
        orientation = exif_orientation(record.path, max_pixels)
        if orientation in (5, 6, 7, 8):
            text += f" and EXIF orientation {orientation}: store the image upright, orientation tags are not applied"
    return text


def decode_rgb(record: ImageRecord, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The image's pixels, uint8 (H, W, 3).

    Grey, palette, CMYK and 16-bit images are converted, alpha is dropped, of an animation the first frame is taken.

    Raises:
        BadImageError: missing, truncated or broken file, too many pixels, or another size than annotated.
    """
    path = record.path
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadImageError(f"image {path}: it is not a regular file")
    except FileNotFoundError:
        raise BadImageError(f"image {path}: the file does not exist") from None
    except OSError as error:
        raise BadImageError(f"image {path}: the file cannot be looked at: {error.strerror or error}") from None
    with _open(path, max_pixels) as image:
        problem = size_problem(record, image.size, max_pixels)
        if problem:
            raise BadImageError(problem)
        try:
            image.load()
            return _to_rgb(image)
        except Exception as error:
            raise BadImageError(f"image {path}: it cannot be decoded: {error}") from None


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling.
        grey = np.asarray(image).astype(np.uint32)
        eight = np.clip((grey + 128) // 257, 0, 255).astype(np.uint8)
        return np.repeat(eight[:, :, None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"), dtype=np.uint8)


def file_problems(
    records: Sequence[ImageRecord],
    root: str,
    *,
    max_pixels: int = MAX_PIXELS,
    allow_symlinks: bool = False,
    notes: Notes | None = None,
) -> list[str]:
    """Everything wrong with the records' files that shows without decoding: existence, type, place, header, size.
    Images with an orientation tag in their header are added to `notes`.
    """
    guard = FileGuard(root, allow_symlinks)

    def one(record: ImageRecord) -> tuple[str | None, int]:
        problem = guard.problem(record.path)
        if problem:
            return f"image {record.path}: {problem}", 1
        try:
            with _open(record.path, max_pixels) as image:
                # Not PNG's own getexif: it decodes the picture, to find what stands behind the pixels.
                turned = _orientation(partial(Image.Image.getexif, image))
                return size_problem(record, image.size, max_pixels), turned
        except BadImageError as error:
            return str(error), 1

    with ThreadPoolExecutor(max_workers=min(16, (os.cpu_count() or 1) + 2)) as pool:
        found = list(pool.map(one, records))
    for record, (_, orientation) in zip(records, found, strict=True):
        if orientation != 1 and notes is not None:
            notes.add(TURNED, record.name)
    return [problem for problem, _ in found if problem]
