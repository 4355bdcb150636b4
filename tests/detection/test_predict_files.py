"""`ioubal predict`: pictures, numbers, and inputs that are refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ioubal_kernels.detection import predict as predict_module
from ioubal_kernels.detection import predict_files as module
from ioubal_kernels.detection.evaluate import ImageDetections
from ioubal_kernels.detection.palette import CLASS_COLORS
from ioubal_kernels.detection.presets import preset
from ioubal_kernels.detection.progress import Reporter
from ioubal_kernels.detection.train import train

OPTIONS = ("--device", "cpu", "--amp", "off", "--workers", "0")
STEPS = {
    "data.image_size": [64, 64], "data.workers": 0, "train.iterations": 1, "train.batch_size": 4, "loss.w_loc": 2.0,
    "train.eval_every": 0, "train.amp": "off", "train.device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory) -> Path:
    """A run of one step with the classes of the tiny set."""
    config = preset("retinanet_tiny")
    for key, value in {"data.path": tiny_data, **STEPS}.items():
        config.set(key, value)
    folder = tmp_path_factory.mktemp("predict") / "run"
    train(config, folder, reporter=Reporter(quiet=True))
    return folder


@pytest.fixture
def finds(monkeypatch):
    """`finds((box, score, label), ...)`: what every model then detects on the first image, or `image=n`."""
    known: dict[int, list] = {}

    def predict(model, loader, *rest):
        found = []
        for batch in loader:
            for target in batch.targets:
                rows = known.get(int(target["image_id"]), [])
                boxes, scores, labels = ([row[k] for row in rows] for k in range(3))
                shape = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
                found.append(ImageDetections(target["image_id"], shape, torch.tensor(scores), torch.tensor(labels)))
        return found

    monkeypatch.setattr(predict_module, "predict_dataset", predict)
    return lambda *rows, image=1: known.update({image: list(rows)})


def grey(path: Path, width: int = 200, height: int = 160, value: int = 128) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (value,) * 3).save(path)
    return path


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def rgb(label: int) -> list[int]:
    return [int(CLASS_COLORS[label][k : k + 2], 16) for k in (1, 3, 5)]


def test_boxes_are_drawn_where_they_are(ioubal, run, finds, tmp_path):
    """Line and dark ring at the box's sides, its inside and the rest untouched, the label above its left corner."""
    image = grey(tmp_path / "in.png")
    finds(([40.0, 50.0, 120.0, 140.0], 0.876543, 1))
    code, _, err = ioubal("predict", run, image, "-o", tmp_path / "out", *OPTIONS)
    assert (code, err) == (0, "")
    got = pixels(tmp_path / "out/in.png")
    assert got.shape == (160, 200, 3)
    for x, y in ((40, 100), (120, 100), (80, 140), (100, 50)):
        assert got[y, x].tolist() == rgb(1), (x, y)
    for x, y in ((39, 100), (121, 100), (80, 141)):
        assert got[y, x].tolist() == [0, 0, 0], (x, y)
    assert (got[53:138, 43:118] == 128).all()
    outside = np.ones((160, 200), bool)
    outside[20:143, 37:124] = False
    assert (got[outside] == 128).all()
    # The label's colour begins at the box's corner and goes up, with text of another colour in it.
    label = got[30:48, 40:110]
    assert (label == rgb(1)).all(2).sum() > 300 and (label.sum(2) < 100).sum() > 50
    assert label[:, 0].tolist()[-6:] == [rgb(1)] * 6


def test_labels_do_not_cover_each_other():
    """Above, inside, below, inside at the bottom; kept in the picture; where none is free, above."""
    box, size, image, taken = [10.0, 30.0, 90.0, 80.0], (50.0, 12.0), (100, 100), []
    for y in (18, 30, 80, 68, 18):
        taken.append(module._place(box, size, image, taken))
        assert taken[-1] == (10, y, 60, y + 12)
    assert module._place([70.0, 5.0, 100.0, 99.0], size, image, []) == (50, 5, 100, 17)
    assert module._place([0.0, 0.0, 9.0, 9.0], (120.0, 12.0), (100, 10), []) == (0, 0, 120, 12)


@pytest.mark.parametrize("label", range(len(CLASS_COLORS)))
def test_black_on_every_colour_is_readable(label):
    """WCAG's contrast of normal text, 4.5."""
    linear = [(v / 255 + 0.055) ** 2.4 / 1.055**2.4 if v > 10 else v / 255 / 12.92 for v in rgb(label)]
    assert (sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear)) + 0.05) / 0.05 > 4.5


@pytest.mark.parametrize("box", [[0.0, 0.0, 60.0, 50.0], [170.0, 1.0, 200.0, 60.0], [150.0, 150.0, 200.0, 160.0]])
def test_a_label_stays_inside_the_picture(ioubal, run, finds, tmp_path, box):
    """Its area is what it is for a box in the middle, at every border."""
    image, areas = grey(tmp_path / "in.png"), []
    for place in ([60.0, 60.0, 120.0, 120.0], box):
        finds((place, 0.5, 2))
        assert ioubal("predict", run, image, "-o", tmp_path / "out", *OPTIONS)[0] == 0
        got = pixels(tmp_path / "out/in.png")
        x1, y1, x2, y2 = (int(side) for side in place)
        got[y1 : y2 + 1, [x1, min(x2, 199)]] = got[[y1, min(y2, 159)], x1 : x2 + 1] = 128  # without the box's lines
        areas.append(((got == rgb(2)).all(2)).sum())
    # Where the label lies over the box's own lines, these were taken out of it.
    assert areas[1] == pytest.approx(areas[0], rel=0.25)


def test_the_json_file_says_what_was_drawn(ioubal, run, finds, tmp_path):
    a, b = grey(tmp_path / "a.png"), grey(tmp_path / "b.png", 64, 48)
    finds(([1.004, 2.0, 30.0, 40.25], 0.75, 2), ([0.0, 0.0, 5.0, 6.0], 0.5, 0))
    code, out, err = ioubal("predict", run, a, b, "-o", tmp_path / "out", "--score", "0.4", "--json", *OPTIONS)
    assert (code, err) == (0, "")
    want = {
        "classes": ["ellipse", "rectangle", "triangle"], "score": 0.4,
        "images": [
            {"image": str(a), "width": 200, "height": 160, "detections": [
                {"class": "triangle", "label": 2, "score": 0.75, "box": [1.0, 2.0, 30.0, 40.25]},
                {"class": "ellipse", "label": 0, "score": 0.5, "box": [0.0, 0.0, 5.0, 6.0]},
            ]},
            {"image": str(b), "width": 64, "height": 48, "detections": []},
        ],
    }  # fmt: skip
    want["classes"] = json.loads(out)["classes"]
    for item in want["images"][0]["detections"]:
        item["class"] = want["classes"][item["label"]]
    assert len(set(want["classes"])) == 3
    assert json.loads(out) == want  # and nothing else on stdout
    assert json.loads((tmp_path / "out/predictions.json").read_text()) == want
    assert (pixels(tmp_path / "out/b.png") == 128).all()


def test_folders_keep_their_tree_and_equal_names_get_numbers(ioubal, run, finds, tmp_path):
    grey(tmp_path / "one/a.png", 64, 64, 10)
    grey(tmp_path / "one/sub/b.jpg", 80, 64, 20)
    grey(tmp_path / "one/sub/c.PNG", 64, 64, 30)
    grey(tmp_path / "two/a.webp", 64, 64, 40)
    grey(tmp_path / "two/a.png", 64, 64, 50)
    (tmp_path / "two/notes.txt").write_text("no image")
    words = ("predict", run, tmp_path / "one", tmp_path / "two", tmp_path / "one/a.png", "-o", tmp_path / "out")
    code, out, err = ioubal(*words, *OPTIONS)
    assert (code, err) == (0, "") and "0 detections with a score of at least 0.3" in out
    values = {
        str(p.relative_to(tmp_path / "out")): round(pixels(p)[5, 5].mean())
        for p in (tmp_path / "out").rglob("*.*")
        if p.suffix != ".json"
    }
    assert values == {"a.png": 10, "sub/b.jpg": 20, "sub/c.png": 30, "a-2.png": 50, "a-3.png": 40, "a-4.png": 10}
    images = json.loads((tmp_path / "out/predictions.json").read_text())["images"]
    assert [Path(i["image"]).name for i in images] == ["a.png", "b.jpg", "c.PNG", "a.png", "a.webp", "a.png"]
    assert images[1]["width"] == 80
    # Two forms of the same call: an output folder below the input is not an input.
    inside = ("predict", run, tmp_path / "one", "-o", tmp_path / "one/out", *OPTIONS)
    assert [ioubal(*inside)[0], ioubal(*inside)[0]] == [0, 0]
    assert len(json.loads((tmp_path / "one/out/predictions.json").read_text())["images"]) == 3


def test_all_unreadable_images_are_listed_and_nothing_is_written(ioubal, run, tmp_path):
    good = grey(tmp_path / "in/good.png")
    (tmp_path / "in/text.jpg").write_text("no image")
    (tmp_path / "in/cut.png").write_bytes(good.read_bytes()[:-30])  # its header is fine
    words = ("predict", run, tmp_path / "in", tmp_path / "missing.png", "-o", tmp_path / "out")
    for more in ((), ("--set", "data.on_bad_image=skip")):
        code, out, err = ioubal(*words, *more, *OPTIONS)
        assert (code, out) == (2, "")
        assert "text.jpg: expected a JPEG, PNG or WebP file" in err and "cut.png: it cannot be decoded" in err
        assert f"{tmp_path / 'missing.png'}: expected an image or a folder of images, found nothing" in err
        assert "good.png" not in err
    assert not (tmp_path / "out").exists()


def test_an_input_is_never_replaced(ioubal, run, tmp_path):
    image = grey(tmp_path / "in/a.png")
    before = image.read_bytes()
    for given in (tmp_path / "in", image):
        code, _, err = ioubal("predict", run, given, "-o", tmp_path / "in", *OPTIONS)
        assert code == 2 and f"{image}: its picture would replace an input: choose another folder with -o" in err
    assert image.read_bytes() == before and list((tmp_path / "in").iterdir()) == [image]


def test_wrong_calls(ioubal, run, tmp_path):
    (tmp_path / "empty").mkdir()
    image, out = grey(tmp_path / "a.png"), tmp_path / "out"
    code, _, err = ioubal("predict", run, tmp_path / "empty", "-o", out, *OPTIONS)
    assert code == 2 and f"{tmp_path / 'empty'}: the folder has no images (.jpg, .jpeg, .png, .webp)" in err
    code, text, err = ioubal("predict", run, "-o", out, *OPTIONS)
    assert code == 2 and "IMAGE|DIR" in text + err and "Traceback" not in text + err
    for score in ("1.5", "-0.1", "nan"):
        code, _, err = ioubal("predict", run, image, "-o", out, f"--score={score}", *OPTIONS)
        assert (code, err) == (2, f"error: --score: expected a number from 0 to 1, got {float(score)}\n")
    code, _, err = ioubal("predict", tmp_path / "no", image, "-o", out, *OPTIONS)
    assert (code, err) == (2, f"error: {tmp_path / 'no'} is neither a run's folder nor a checkpoint file\n")
    (tmp_path / "file").write_text("")
    code, _, err = ioubal("predict", run, image, "-o", tmp_path / "file/out", *OPTIONS)
    assert code == 3 and err.startswith("error: cannot write") and err.count("\n") == 1
    assert not out.exists()


def test_orientation_tags_are_named_beside_the_json(ioubal, run, finds, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg", exif=exif)
    code, out, err = ioubal("predict", run, tmp_path / "a.jpg", "-o", tmp_path / "out", "--json", *OPTIONS)
    assert code == 0 and json.loads(out)["images"][0]["width"] == 64
    assert err == "warning: orientation tags are not applied: 1 images are used as their pixels are stored\n"


def test_the_detections_are_those_of_eval(ioubal, run, tiny_data, tmp_path):
    """Image by image what `ioubal eval --save-results` writes of the same files."""
    folder, results = Path(tiny_data) / "images/val", tmp_path / "results.json"
    limit = ("--set", "inference.max_detections=20")
    words = ("predict", run, folder, "-o", tmp_path / "out", "--score", "0.001", "--json", *limit, *OPTIONS)
    code, out, err = ioubal(*words)
    assert (code, err) == (0, "")
    words = ("eval", run, "--data", tiny_data, "--save-results", results, *limit, *OPTIONS)
    assert ioubal(*words, "--set", "inference.score_threshold=0.001")[0] == 0
    truth = json.loads((Path(tiny_data) / "annotations/instances_val.json").read_text())
    ids = {Path(image["file_name"]).name: image["id"] for image in truth["images"]}
    images = json.loads(out)["images"]
    assert len(images) == 6
    want = json.loads(results.read_text())
    total = 0
    for image in images:
        own = [r for r in want if r["image_id"] == ids[Path(image["image"]).name]]
        total += len(own)
        assert [d["score"] for d in image["detections"]] == [r["score"] for r in own]
        assert [d["label"] + 1 for d in image["detections"]] == [r["category_id"] for r in own]
        for detection, result in zip(image["detections"], own, strict=True):
            x, y, w, h = result["bbox"]
            # Each side is rounded to two decimals, there as corners and here as sizes.
            assert detection["box"] == pytest.approx([x, y, x + w, y + h], abs=0.0151)
    assert total == len(want) == 6 * 20


@pytest.mark.parametrize("name", ["retinanet_tiny", "foveabox_tiny", "ssd_tiny", "faster_rcnn_tiny"])
def test_every_detector(ioubal, tiny_data, tmp_path, name):
    """Trained, used on a folder and exported by commands alone."""
    sets = [word for key, value in STEPS.items() for word in ("--set", f"{key}={value}")]
    run, score = tmp_path / "run", "0.001"
    assert ioubal("train", "--data", tiny_data, "-c", name, "-o", run, *sets)[0] == 0
    words = ("predict", run, Path(tiny_data) / "images/val", "-o", tmp_path / "out", "--score", score, "--json")
    code, out, err = ioubal(*words, *OPTIONS)
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert len(result["images"]) == len(list((tmp_path / "out").glob("*.[pj][np]g"))) == 6
    found = [d for image in result["images"] for d in image["detections"]]
    assert found and {d["label"] for d in found} <= {0, 1, 2}
    for detection in found:
        x1, y1, x2, y2 = detection["box"]
        assert -0.01 <= x1 <= x2 <= 64.01 and -0.01 <= y1 <= y2 <= 64.01 and 0.001 <= detection["score"] <= 1
    code, out, err = ioubal("export", run, "-o", tmp_path / "weights.pt")
    assert (code, err) == (0, "") and f"{name}, step 1, 3 classes: {tmp_path / 'weights.pt'}" in out
