"""Exported weights: docs/detectors.md's own code builds stock torchvision models of them, without this package."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ioubal_kernels.detection.architectures import MODELS
from ioubal_kernels.detection.checkpoint import save_checkpoint
from ioubal_kernels.detection.models import Detector, PreparedImages
from ioubal_kernels.detection.presets import preset
from ioubal_kernels.detection.weights import new_detector

DOCS = (Path(__file__).parents[2] / "docs/detectors.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", DOCS, flags=re.MULTILINE | re.DOTALL)
CLASSES = ["cat", "dog", "owl"]
STOCK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ioubal_kernels":
            raise ImportError("this package is not here")
sys.meta_path.insert(0, Refuse())
FILE = sys.argv[1]
{block}
picture = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(model([picture])[0], sys.argv[3])
"""


def checkpoint(folder: Path, name: str, **changes: object) -> tuple[Path, Detector]:
    """A run whose weights were never trained, and its detector."""
    config = preset(name)
    for key, value in {"inference.score_threshold": 0.005, **changes}.items():
        config.set(key, value)
    torch.manual_seed(0)
    scale = MODELS[name].anchor_scale or 4.0
    detector = new_detector(config, len(CLASSES), scale)
    for key, value in detector.named_buffers():
        if key.endswith("bn3.weight"):  # random branches with fixed statistics would add up to infinity
            value.fill_(0.2)
    with torch.no_grad():
        for key, value in detector.named_parameters():
            if re.search(r"(cls_logits|cls_score|bbox_reg|bbox_pred|module_list\.\d+)\.weight$", key):
                value.normal_(std=0.05)  # scores and boxes that differ from place to place
    state = {
        "config": config.to_json(), "classes": CLASSES, "category_ids": [1, 2, 3], "anchor_scale": scale, "step": 7,
        "ema": {"model": detector.state_dict()},
    }  # fmt: skip
    save_checkpoint(folder / "run/checkpoints", 7, state)
    inference = config.inference
    detector.set_inference(
        score_threshold=inference.score_threshold,
        nms_threshold=inference.nms_threshold,
        candidates=inference.candidates,
        max_detections=inference.max_detections,
    )
    detector.network.transform.image_mean, detector.network.transform.image_std = config.data.mean, config.data.std
    return folder / "run", detector.eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "block", "edge", "changes"),
    [
        ("retinanet_r50_fpn", 0, 128, {"model.norm": "frozen"}),
        ("retinanet_r50_fpn", 0, 128, {"model.from_scratch": True}),
        ("ssd300_vgg16", 1, 300, {"model.from_scratch": True}),
        ("ssd300_vgg16", 1, 300, {"model.from_scratch": True, "model.ssd_smallest": 20}),
        ("faster_rcnn_r50_fpn", 2, 128, {"model.norm": "frozen"}),
    ],
)
def test_stock_torchvision_finds_the_same(name, block, edge, changes, ioubal, tmp_path):
    """In a process that cannot import this package; boxes to a thousandth of a pixel, classes exactly."""
    if edge == 128:
        changes = {**changes, "data.short_side": 128, "data.long_side": 128}
    run, detector = checkpoint(tmp_path, name, **changes)
    code, out, err = ioubal("export", run, "-o", tmp_path / "w.pth")
    assert code == 0, err
    assert f"{name}, step 7, 3 classes" in out
    torch.manual_seed(1)
    picture = torch.rand(3, edge, edge)
    torch.save(picture, tmp_path / "picture.pt")
    program = STOCK.format(block=BLOCKS[block])
    files = [str(tmp_path / n) for n in ("w.pth", "picture.pt", "found.pt")]
    done = subprocess.run([sys.executable, "-c", program, *files], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    got = torch.load(tmp_path / "found.pt", weights_only=True)
    transform = detector.network.transform
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (transform.image_mean, transform.image_std))
    with torch.no_grad():
        want = detector(PreparedImages(((picture - mean) / std)[None], [(edge, edge)]))[0]
    assert len(want["scores"]) > 10
    torch.testing.assert_close(got["scores"], want["scores"], rtol=0.0, atol=1e-5)
    torch.testing.assert_close(got["boxes"], want["boxes"], rtol=0.0, atol=1e-3)
    assert torch.equal(got["labels"] - detector.offset, want["labels"])


def test_what_the_file_holds(ioubal, tmp_path):
    """Plain values; the averaged weights under torchvision's names; class-agnostic boxes repeated for every class."""
    run, detector = checkpoint(tmp_path, "faster_rcnn_tiny", **{"data.image_size": [64, 64]})
    assert ioubal("export", run, "-o", tmp_path / "w.pth")[0] == 0
    file = torch.load(tmp_path / "w.pth", weights_only=True)
    assert (file["model"], file["classes"], file["first_label"], file["step"]) == ("faster_rcnn_tiny", CLASSES, 1, 7)
    own = detector.network.state_dict()
    assert file["weights"].keys() == own.keys()
    box = own["roi_heads.box_predictor.bbox_pred.weight"]
    assert torch.equal(file["weights"]["roi_heads.box_predictor.bbox_pred.weight"], torch.cat([box] * 4))
    rest = [key for key in own if "bbox_pred" not in key or "rpn" in key]
    assert all(torch.equal(file["weights"][key], own[key]) for key in rest)


@pytest.mark.parametrize(
    ("out", "code", "message"),
    [("no/such/folder/w.pth", 3, "cannot write"), ("w.pth", 2, "neither a run's folder nor a checkpoint")],
)
def test_mistakes(out, code, message, ioubal, tmp_path):
    run, _ = checkpoint(tmp_path, "ssd_tiny", **{"data.image_size": [64, 64]})
    source = run if code == 3 else tmp_path / "nothing"
    got, _, err = ioubal("export", source, "-o", tmp_path / out)
    assert got == code and message in err and err.count("\n") == 1
