"""Image files: what is decoded and how, a corpus of bad files, and the full check of a dataset."""

import json
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ioubal_kernels.detection.data import (
    BadImageError,
    DataError,
    TrainLoader,
    TransformConfig,
    check_dataset,
    describe,
    load_dataset,
    make_record,
)
from ioubal_kernels.detection.data.files import decode_rgb, file_problems, image_size
from ioubal_kernels.detection.data.records import TURNED, Notes

GREY = np.linspace(0, 255, 16 * 12).reshape(12, 16).astype(np.uint8)
RGB = np.stack([GREY, GREY[::-1], 255 - GREY], axis=2)


def record(path, width=16, height=12):
    return make_record(id=5, name=path.name, path=str(path), width=width, height=height, boxes=[], labels=[])


def decode(path, image, **options):
    image.save(path, **options)
    return decode_rgb(record(path))


def test_modes_become_rgb(tmp_path):
    grey_rgb = np.repeat(GREY[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(decode(tmp_path / "rgb.png", Image.fromarray(RGB)), RGB)
    np.testing.assert_array_equal(decode(tmp_path / "grey.png", Image.fromarray(GREY)), grey_rgb)
    # 16 bits: 65535 is white, and 257 steps of 16 bits are one of 8.
    sixteen = Image.fromarray(GREY.astype(np.uint16) * 257)
    np.testing.assert_array_equal(decode(tmp_path / "sixteen.png", sixteen), grey_rgb)
    between = np.arange(12 * 16, dtype=np.uint16).reshape(12, 16) * 340
    decoded = decode(tmp_path / "between.png", Image.fromarray(between))
    np.testing.assert_array_equal(decoded[:, :, 0], np.rint(between / 257))
    alpha = Image.fromarray(np.dstack([RGB, 255 - GREY]))
    np.testing.assert_array_equal(decode(tmp_path / "alpha.png", alpha), RGB)
    np.testing.assert_array_equal(
        decode(tmp_path / "grey_alpha.png", Image.fromarray(np.dstack([GREY, GREY]), "LA")), grey_rgb
    )
    two = Image.fromarray((GREY > 100).astype(np.uint8) * 255).convert("1")
    np.testing.assert_array_equal(decode(tmp_path / "bits.png", two)[:, :, 0], (GREY > 100) * np.uint8(255))
    palette = Image.fromarray(RGB).quantize(8)
    np.testing.assert_array_equal(decode(tmp_path / "palette.png", palette), np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(
        decode(tmp_path / "transparent.png", palette, transparency=0), np.asarray(palette.convert("RGB"))
    )
    cmyk = decode(tmp_path / "cmyk.jpg", Image.fromarray(RGB).convert("CMYK"), quality=100)
    assert cmyk.shape == (12, 16, 3) and np.abs(cmyk.astype(int) - RGB).mean() < 12
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    np.testing.assert_array_equal(
        decode(tmp_path / "animated.png", frames[0], save_all=True, append_images=frames[1:]), RGB
    )
    np.testing.assert_array_equal(decode(tmp_path / "a.webp", Image.fromarray(RGB), lossless=True), RGB)


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1)])
def test_extreme_shapes(tmp_path, size):
    path = tmp_path / "a.png"
    Image.new("RGB", size, (9, 8, 7)).save(path)
    assert decode_rgb(record(path, *size)).shape == (size[1], size[0], 3)


def png(width, height, data=b""):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def good(tmp_path, suffix):
    path = tmp_path / ("good" + suffix)
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path.read_bytes()


def turned(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "exif.jpg"
    Image.new("RGB", (12, 16)).save(path, exif=exif)
    return path.read_bytes()


FAULTS = {
    "missing": (None, "the file does not exist"),
    "empty": (lambda tmp: b"", "(0 bytes|expected a JPEG, PNG or WebP file)"),
    "html": (lambda tmp: b"<html><body>404</body></html>", "expected a JPEG, PNG or WebP file, got something else"),
    "random bytes": (lambda tmp: random.Random(0).randbytes(500), "expected a JPEG, PNG or WebP file"),
    "truncated jpeg": (lambda tmp: good(tmp, ".jpg")[:-100], "it cannot be decoded: .*truncated"),
    "truncated png": (lambda tmp: good(tmp, ".png")[:300], "it cannot be decoded: "),
    "jpeg header only": (lambda tmp: good(tmp, ".jpg")[:12], "(its header cannot be read|expected a JPEG)"),
    "truncated webp": (lambda tmp: good(tmp, ".webp")[:60], "(cannot be decoded|cannot be read|expected a JPEG)"),
    "png with a flipped byte": (
        lambda tmp: (lambda b: b[:200] + bytes([b[200] ^ 255]) + b[201:])(good(tmp, ".png")),
        "it cannot be decoded: ",
    ),
    "gif": (lambda tmp: good(tmp, ".gif"), "expected a JPEG, PNG or WebP file"),
    "tiff": (lambda tmp: good(tmp, ".tiff"), "expected a JPEG, PNG or WebP file"),
    "svg": (lambda tmp: b"<svg xmlns='http://www.w3.org/2000/svg' width='16' height='12'/>", "expected a JPEG, PNG"),
    "postscript": (lambda tmp: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 12\n", "expected a JPEG, PNG"),
    "large bomb": (lambda tmp: png(30_000, 30_000), "expected at most 100000000 pixels"),
    "small bomb": (lambda tmp: png(10_001, 10_000), "expected at most 100000000 pixels, got 10001 x 10000"),
    "lying header": (lambda tmp: png(16, 12, b"\0" * 20), "it cannot be decoded: "),
    "header without a size": (
        lambda tmp: png(0, 12),
        "(expected at least one pixel|header cannot be read|expected a JPEG)",
    ),
    "another size": (lambda tmp: png(12, 16), "size mismatch: the annotation says 16 x 12, the file has 12 x 16"),
    "orientation tag": (
        lambda tmp: turned(tmp, 6),
        "the file has 12 x 16 and EXIF orientation 6: store the image upright",
    ),
    "a folder": ("folder", "it is not a regular file"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_file(tmp_path, name):
    make, message = FAULTS[name]
    path = tmp_path / "a.jpg"
    if make == "folder":
        path.mkdir()
    elif make is not None:
        path.write_bytes(make(tmp_path))
    with pytest.raises(BadImageError, match=message) as caught:
        decode_rgb(record(path))
    assert str(path) in str(caught.value)


def test_fuzzed_files_give_only_the_documented_error(tmp_path):
    rng = random.Random(1)
    sources = [good(tmp_path, suffix) for suffix in (".jpg", ".png", ".webp")]
    path, refused = tmp_path / "a.img", 0
    for k in range(300):
        data = bytearray(sources[k % 3])
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
        try:
            assert decode_rgb(record(path)).shape == (12, 16, 3)
        except BadImageError:
            refused += 1
    assert refused > 100


def test_own_pixel_limit_is_checked_from_the_header(tmp_path):
    Image.new("RGB", (16, 12)).save(tmp_path / "a.png")
    assert image_size(str(tmp_path / "a.png"), 192) == (16, 12)
    with pytest.raises(BadImageError, match="expected at most 191 pixels, got 16 x 12 = 192"):
        image_size(str(tmp_path / "a.png"), 191)


def coco(root, count=6, split="train", start=0):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir()
    rng = np.random.default_rng(start)
    for k in range(count):
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(root / split / f"{k}.png")
    data = {
        "images": [{"id": k + 1, "file_name": f"{k}.png", "width": 16, "height": 12} for k in range(count)],
        "annotations": [{"id": k + 1, "image_id": k + 1, "category_id": 1, "bbox": [1, 2, 8, 6]} for k in range(count)],
        "categories": [{"id": 1, "name": "thing"}, {"id": 2, "name": "other"}],
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))
    return root


def loader(root, **options):
    dataset = load_dataset(root, "train", check_files=False)
    return TrainLoader(dataset, TransformConfig(size=(32, 32)), 2, **options)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("cache", ["none", "ram"])
def test_a_bad_image_at_run_time_names_path_and_id(tmp_path, workers, cache):
    coco(tmp_path)
    (tmp_path / "train/3.png").write_bytes(b"")
    stream = iter(loader(tmp_path, workers=workers, cache=cache))
    with pytest.raises(BadImageError, match=r"(?s)train/3.png: .*\(image id 4, 3.png\)"):
        for _ in range(3):
            next(stream)


def test_skipping_replaces_counts_and_is_deterministic(tmp_path):
    coco(tmp_path)
    (tmp_path / "train/3.png").unlink()

    def three(**options):
        train = loader(tmp_path, on_bad_image="skip", **options)
        stream = iter(train)
        ids = [[target["image_id"] for target in next(stream).targets] for _ in range(6)]
        return ids, train.bad_images

    ids, bad = three()
    assert all(4 not in batch and len(batch) == 2 for batch in ids)
    assert list(bad) == [str(tmp_path / "train/3.png")] and "does not exist" in next(iter(bad.values()))
    assert three(workers=2)[0] == three(cache="ram")[0] == ids


def test_too_many_bad_images_stop_the_run(tmp_path):
    coco(tmp_path)
    for k in (1, 3):
        (tmp_path / f"train/{k}.png").unlink()
    stream = iter(loader(tmp_path, on_bad_image="skip", bad_image_limit=0.2))
    with pytest.raises(BadImageError, match="at most 1 bad images with on_bad_image='skip': 2 problems"):
        for _ in range(3):
            next(stream)
    stream = iter(loader(tmp_path, on_bad_image="skip", bad_image_limit=0.4))
    assert len([next(stream) for _ in range(6)]) == 6


def test_the_share_of_bad_images_is_not_rounded_up(tmp_path):
    """39 % of five images is one image; one may always be missing."""
    dataset = load_dataset(coco(tmp_path, 5), "train")
    assert [dataset.most_bad_images(share) for share in (0, 0.39, 0.4)] == [1, 1, 2]


def test_no_image_left_is_an_error(tmp_path):
    train = loader(coco(tmp_path), on_bad_image="skip", bad_image_limit=1.0)
    for k in range(6):
        (tmp_path / f"train/{k}.png").unlink()
    with pytest.raises(BadImageError, match="no readable image found as a replacement"):
        next(iter(train))
    # At the start it is said before anything else is done.
    with pytest.raises(DataError, match="none of its images was found"):
        load_dataset(tmp_path, "train")


def test_full_check_lists_problems_of_images_and_annotations(tmp_path):
    coco(tmp_path, 30)
    for k in range(25):
        (tmp_path / f"train/{k}.png").write_bytes(b"x")
    (tmp_path / "annotations/instances_val.json").write_text("{}")
    report = check_dataset(tmp_path)
    assert not report.ok and len(report.problems) == 25 + 3
    assert "instances_val.json: the key 'images' is missing" in report.text
    assert "28 problems" in report.text and "... and 8 more (28 in total)" in report.text
    with pytest.raises(DataError, match="splits: expected some of train, val, got test"):
        check_dataset(tmp_path, splits=("test",))


def test_full_check_warns(tmp_path):
    coco(tmp_path, 4)
    coco(tmp_path, 3, "val", start=1)
    (tmp_path / "val/2.png").write_bytes((tmp_path / "train/1.png").read_bytes())
    (tmp_path / "train/3.png").write_bytes((tmp_path / "train/0.png").read_bytes())
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(tmp_path / "train/2.png").save(tmp_path / "train/2.png", exif=exif)
    path = tmp_path / "annotations/instances_train.json"
    data = json.loads(path.read_text())
    data["annotations"].append({"id": 99, "image_id": 1, "category_id": 1, "bbox": [1, 2, 8, 6.5]})
    data["annotations"].append({"id": 100, "image_id": 1, "category_id": 1, "bbox": [1, 2, 0, 6]})
    path.write_text(json.dumps(data))
    report = check_dataset(tmp_path)
    assert report.ok
    text = "\n".join(report.warnings)
    assert "pictures in two splits that should have none in common: 1 (train: 1.png = val: 2.png)" in text
    assert "pictures that occur more than once in a split: 1 (train: 0.png = 3.png)" in text
    assert "split train: near-duplicate box pairs: 1 (0.png)" in text
    assert "split train: empty boxes dropped: 1 (0.png)" in text
    assert "split val: classes without boxes: other" in text
    # Upside down, so its size tells nothing.
    assert "images with an EXIF orientation tag, which is not applied: 1 (2.png)" in text
    assert f"{TURNED}: 1 (2.png)" in describe(load_dataset(tmp_path, "train"))
    assert report.stats["train"]["train_boxes"] == 5 and report.stats["val"]["images"] == 3
    # Square roots of the areas 48 (six-pixel-high boxes) and 52.
    assert report.stats["train"]["box_side"]["0.5"] == pytest.approx(48**0.5, abs=0.01)
    json.dumps(report.stats, allow_nan=False)


@pytest.mark.parametrize(("suffix", "plugin"), [("jpg", JpegImageFile), ("png", PngImageFile), ("webp", WebPImageFile)])
@pytest.mark.parametrize("orientation", [1, 3])
def test_orientation_tags_are_noted_without_decoding(tmp_path, monkeypatch, suffix, plugin, orientation):
    path, exif, notes = tmp_path / f"a.{suffix}", Image.Exif(), Notes()
    exif[0x0112] = orientation
    Image.new("RGB", (12, 16)).save(path, exif=exif)
    monkeypatch.setattr(plugin, "load", lambda image: pytest.fail("it was decoded"))
    record = make_record(id=1, name="a", path=str(path), width=12, height=16, boxes=[], labels=[])
    assert file_problems([record], str(tmp_path), notes=notes) == []
    assert notes.items == ({} if orientation == 1 else {TURNED: ["a"]})
