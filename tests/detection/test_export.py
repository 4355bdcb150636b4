"""`ioubal export`: stock torchvision, without this package, builds the model by the documentation's own programs and
finds what our detector finds.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from ioubal_kernels.detection.checkpoint import find_checkpoint, save_checkpoint
from ioubal_kernels.detection.data import make_synthetic
from ioubal_kernels.detection.ema import ModelEma
from ioubal_kernels.detection.export import FORMAT, export_weights
from ioubal_kernels.detection.models import Detector, PreparedImages, build_model
from ioubal_kernels.detection.presets import preset
from ioubal_kernels.detection.state import pack_state

DOCS = Path(__file__).resolve().parents[2] / "docs/detectors.md"
BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ioubal_kernels":
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
"""


def program(heading: str) -> str:
    """The code block of docs/detectors.md below a heading."""
    section = DOCS.read_text(encoding="utf-8").split(f"### {heading}\n", 1)[1].split("\n## ")[0].split("\n### ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


def execute(heading: str, folder: Path, *, blocked: bool) -> tuple[dict[str, torch.Tensor], str]:
    """Run a program in a folder with weights.pt and image.png; what it found, and what it printed."""
    code = (BLOCKED if blocked else "") + program(heading) + "\ntorch.save(found, 'found.pt')\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "found.pt", weights_only=True), done.stdout


class NoLoader:
    """A run whose data are of no interest."""

    def state_dict(self) -> dict:
        return {}


@torch.no_grad()
def liven(network: nn.Module) -> None:
    """Random heads with scores and boxes that differ from place to place, so that a wrong order would show."""
    torch.manual_seed(7)
    for name, module in network.named_modules():
        if isinstance(module, (nn.BatchNorm2d,)) or type(module).__name__ == "FrozenBatchNorm2d":
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.7, 1.3)
        last = name.rsplit(".", 1)[-1]
        if last in ("cls_logits", "bbox_reg", "cls_score", "bbox_pred") or ".module_list." in name:
            for layer in module.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    layer.weight.mul_(3.0)


def write_run(folder: Path, name: str, **changes: object) -> Detector:
    """A run of zero steps: random weights as a checkpoint, three classes. Returns the detector, ready to detect."""
    config = preset(name)
    # One layout on both sides: another order of additions moves the boxes of so lively a network by pixels.
    settings = {
        "train.channels_last": False,
        "model.from_scratch": True,
        "inference.score_threshold": 0.0,
        "inference.max_detections": 50,
        **changes,
    }
    for key, value in settings.items():
        config.set(key, value)
    torch.manual_seed(1)
    detector = build_model(
        config.model.name,
        3,
        size=config.data.image_size,
        smallest=config.model.ssd_smallest,
        norm=config.model.built_norm,
    )
    liven(detector.network)
    ema = ModelEma(detector, 0.0)
    state = pack_state(
        config=config, classes=["ant", "bee", "cat"], category_ids=[1, 2, 3], fingerprints={},
        anchor_scale=SCALES[name], detector=ema.module, ema=ema,
        optimizer=torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), loader=NoLoader(),
        step=0, skipped=0, w_loc=1.0, rpn_w_loc=1.0, processes=1, seconds=0.0,
    )  # fmt: skip
    save_checkpoint(folder / "checkpoints", 0, state)
    detector = ema.module
    detector.set_inference(**{k: v for k, v in vars(config.inference).items() if k != "batch_size"})
    transform = detector.network.transform
    transform.image_mean, transform.image_std = config.data.mean, config.data.std
    return detector


SCALES = {
    "retinanet_r18_fpn": 4.0, "ssd300_vgg16": 1.0, "ssd512_vgg16": 1.0, "faster_rcnn_r50_fpn": 8.0,
    "foveabox_tiny": 2.0, "retinanet_tiny": 4.0, "ssd_tiny": 1.0,
}  # fmt: skip


def ours(detector: Detector, picture: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the trainer's detector finds on one picture (3, H, W) in [0, 1] that needs no resizing."""
    transform = detector.network.transform
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (transform.image_mean, transform.image_std))
    with torch.inference_mode():
        return detector(PreparedImages(((picture - mean) / std)[None], [tuple(picture.shape[1:])]))[0]


def write_image(path: Path, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    small = torch.rand(3, 8, 8, generator=generator)
    large = nn.functional.interpolate(small[None], size=(height, width), mode="bilinear")[0]
    pixels = (large * 255).round().to(torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    return pixels / 255


def assert_same(found: dict, own: dict, first_label: int, least: int = 20) -> None:
    """Boxes to 1e-3 pixels, scores to 1e-5, labels exactly, in order."""
    assert len(own["scores"]) >= least and len(set(own["labels"].tolist())) > 1
    assert torch.equal(found["labels"] - first_label, own["labels"])
    torch.testing.assert_close(found["scores"], own["scores"], rtol=0, atol=1e-5)
    torch.testing.assert_close(found["boxes"], own["boxes"], rtol=0, atol=1e-3)


CASES = [
    ("RetinaNet in torchvision", "retinanet_r18_fpn", (128, 256), {}),
    ("RetinaNet in torchvision", "retinanet_r18_fpn", (128, 256), {"model.init_from": "somewhere"}),
    ("RetinaNet in torchvision", "retinanet_r18_fpn", (128, 256), {"model.norm": "group"}),
    ("RetinaNet in torchvision", "retinanet_r18_fpn", (128, 256), {"data.image_size": [128, 256]}),
    ("SSD in torchvision", "ssd300_vgg16", (300, 300), {}),
    ("SSD in torchvision", "ssd512_vgg16", (512, 512), {"model.ssd_smallest": 15}),
    ("Faster R-CNN in torchvision", "faster_rcnn_r50_fpn", (128, 256), {"model.init_from": "somewhere"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("heading", "name", "size", "changes"), CASES)
def test_stock_torchvision_finds_the_same(tmp_path, heading, name, size, changes):
    sides = {} if "ssd" in name else {"data.short_side": size[0], "data.long_side": size[1]}
    candidates = {"inference.candidates": 100}
    detector = write_run(tmp_path / "run", name, **sides, **candidates, **changes)
    content = export_weights(str(tmp_path / "run"), tmp_path / "weights.pt")
    picture = write_image(tmp_path / "image.png", *size)
    found, printed = execute(heading, tmp_path, blocked=True)
    own = ours(detector, picture)
    assert content["first_label"] == (0 if "retinanet" in name else 1)
    assert_same(found, own, content["first_label"])
    names = [line.split()[0] for line in printed.splitlines()]
    assert names == [content["classes"][label] for label in own["labels"]]
    if "faster" in name:
        weights = torch.load(tmp_path / "weights.pt", weights_only=True)["weights"]
        rows = weights["roi_heads.box_predictor.bbox_pred.weight"].reshape(4, 4, -1)  # classes and background, sides
        assert all(torch.equal(rows[0], rows[k]) for k in range(4)) and not torch.equal(rows[0, 0], rows[0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["foveabox_tiny", "retinanet_tiny", "ssd_tiny"])
def test_the_packages_own_networks_read_it_back(tmp_path, name):
    detector = write_run(tmp_path / "run", name, **{"data.image_size": [128, 256], "inference.candidates": 50})
    content = export_weights(str(tmp_path / "run"), tmp_path / "weights.pt")
    picture = write_image(tmp_path / "image.png", 128, 256)
    found, _ = execute("FoveaBox and the tiny detectors", tmp_path, blocked=False)
    assert_same(found, ours(detector, picture), content["first_label"])


@pytest.mark.slow
def test_one_step_from_scratch_then_export(ioubal, tmp_path):
    """A full-size detector through the commands alone; its file has the weights of the checkpoint."""
    data = make_synthetic(tmp_path / "set", train=2, val=1, size=64, classes=3, seed=1, workers=1)
    sets = {
        "data.image_size": [64, 64], "data.workers": 0, "train.epochs": "null", "train.iterations": 1,
        "train.batch_size": 2, "train.amp": "off", "train.device": "cpu", "loss.w_loc": 2.0,
    }  # fmt: skip
    words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    run = tmp_path / "run"
    code, out, err = ioubal("train", "--data", data, "-c", "retinanet_r18_fpn", "--from-scratch", "-o", run, *words)
    assert code == 0, err
    code, out, err = ioubal("export", run, "-o", tmp_path / "weights.pt")
    assert (code, err) == (0, "") and f"retinanet_r18_fpn, step 1, 3 classes: {tmp_path / 'weights.pt'}" in out
    saved = torch.load(tmp_path / "weights.pt", weights_only=True)
    averaged = find_checkpoint(run)[1]["ema"]["model"]
    assert {f"network.{key}" for key in saved["weights"]} == averaged.keys() and saved["norm"] == "batch"
    for key, value in saved["weights"].items():
        assert torch.equal(value, averaged[f"network.{key}"]) and value.is_contiguous(), key


def test_what_the_file_says(tmp_path):
    run = tmp_path / "run"
    write_run(run, "ssd_tiny", **{"data.image_size": [64, 64]})
    content = export_weights(str(run), tmp_path / "weights.pt")
    saved = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert saved.keys() == content.keys() | {"weights"}
    assert (saved["format"], saved["model"], saved["step"], saved["norm"]) == (FORMAT, "ssd_tiny", 0, "batch")
    assert saved["classes"] == ["ant", "bee", "cat"] and saved["first_label"] == 1
    assert json.loads(saved["config"])["data"]["image_size"] == [64, 64]
    assert saved["anchors"].keys() == {"aspect_ratios", "scales", "steps"} and saved["anchors"]["steps"] == [8, 16, 32]
    run = tmp_path / "fovea"
    write_run(run, "foveabox_tiny", **{"data.image_size": [64, 64], "model.norm": "group"})
    content = export_weights(str(run), tmp_path / "weights.pt")  # replaces the file
    assert (content["anchors"], content["first_label"], content["norm"]) == (None, 0, "group")


def test_no_part_of_a_run_is_replaced(ioubal, tmp_path):
    run = tmp_path / "run"
    write_run(run, "ssd_tiny", **{"data.image_size": [64, 64]})
    (run / "config.yaml").touch()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert len(before) > 2
    for path in before:
        code, _, err = ioubal("export", run, "-o", path)
        assert (code, err) == (3, f"error: cannot write {path}: it is a part of a run\n")
        assert path.read_bytes() == before[path]
    for _ in range(2):  # beside them, and again
        assert ioubal("export", run, "-o", run / "weights.pt")[0] == 0


def test_errors_are_one_line(ioubal, tmp_path):
    code, out, err = ioubal("export", tmp_path / "no", "-o", tmp_path / "weights.pt")
    assert (code, out) == (2, "")
    assert err == f"error: {tmp_path / 'no'} is neither a run's folder nor a checkpoint file\n"
    (tmp_path / "empty").mkdir()
    code, _, err = ioubal("export", tmp_path / "empty", "-o", tmp_path / "weights.pt")
    assert code == 2 and "empty holds no checkpoints" in err and err.count("\n") == 1
    run = tmp_path / "run"
    write_run(run, "retinanet_tiny", **{"data.image_size": [64, 64]})
    for file, why in ((tmp_path / "no/weights.pt", "No such file or directory"), (tmp_path / "empty", "directory")):
        code, out, err = ioubal("export", run, "-o", file)
        assert (code, out) == (3, "")
        assert err.startswith(f"error: cannot write {file}: ") and why in err and err.count("\n") == 1
    assert list((tmp_path / "empty").iterdir()) == [] and not list(tmp_path.glob(".*.tmp"))


def test_a_full_disk_is_one_line_and_leaves_the_earlier_file(ioubal, tmp_path, full_disk):
    run = tmp_path / "run"
    write_run(run, "retinanet_tiny", **{"data.image_size": [64, 64]})
    (tmp_path / "weights.pt").write_bytes(b"earlier")
    with full_disk(1_000_000):
        code, _, err = ioubal("export", run, "-o", tmp_path / "weights.pt")
    assert (code, err) == (3, f"error: cannot write {tmp_path / 'weights.pt'}: No space left on device\n")
    assert (tmp_path / "weights.pt").read_bytes() == b"earlier"
