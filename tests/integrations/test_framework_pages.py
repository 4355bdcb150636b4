"""docs/mmdetection.md and docs/detectron2.md: their Python blocks run in order, page by page, in one namespace."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import mmdet_env
import pytest
import torch

DOCS = Path(__file__).resolve().parents[2] / "docs"


def blocks(page: str) -> list[tuple[int, str]]:
    """(line, code) of each Python block."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def run(page: str) -> int:
    torch.manual_seed(0)
    names = {"__name__": "__main__"}
    for line, code in blocks(page):
        exec(compile("\n" * line + code, str(DOCS / page), "exec"), names)
    return len(blocks(page))


def test_mmdetection_blocks_run():
    mmdet_env.load()
    from mmdet.registry import MODELS

    added = ("IoUBalancedRetinaSepBNHead", "IoUBalancedShared4Conv1FCBBoxHead")
    try:
        assert run("mmdetection.md") == 8
        assert all(name in MODELS.module_dict for name in added)
    finally:
        for name in added:
            MODELS.module_dict.pop(name, None)


HEADS = {
    "retinanet": ("IoUBalancedRetinaHead", "IoUBalancedFocalLoss", 80),
    "ssd": ("IoUBalancedSSDHead", "IoUBalancedCrossEntropyLoss", 81),
    "foveabox": ("IoUBalancedFoveaHead", "IoUBalancedFocalLoss", 80),
    "faster_rcnn": ("IoUBalancedShared2FCBBoxHead", "IoUBalancedCrossEntropyLoss", None),
    "gfl": ("GFLHead", "IoUBalancedFocalLoss", 80),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_mmdetection_configs_build(name, tmp_path):
    """The configs of the page on top of mmdet's own files, as mmdet's train.py reads them."""
    mmdet_env.load()
    from mmdet.registry import MODELS
    from mmengine.config import Config

    (code,) = [code for _, code in blocks("mmdetection.md") if f'_base_ = "mmdet::{name}/' in code]
    path = tmp_path / "config.py"
    path.write_text(code)
    cfg = Config.fromfile(path)
    cfg.model.pop("init_cfg", None)
    model = MODELS.build(cfg.model)
    head = model.roi_head.bbox_head if name == "faster_rcnn" else model.bbox_head
    kind, loss, columns = HEADS[name]
    assert (type(head).__name__, type(head.loss_cls).__name__) == (kind, loss)
    assert columns is None or head.cls_out_channels == columns
    if name == "retinanet":
        assert (head.loss_bbox.beta, head.loss_bbox.lambda_, head.loss_bbox.loss_weight) == (0.11, 1.5, 3.049)
    if name == "foveabox":  # what the page does not name is inherited
        assert (head.loss_cls.gamma, head.loss_cls.alpha, head.loss_bbox.box_coder) == (1.5, 0.4, "fovea")
    if name in ("ssd", "faster_rcnn"):
        assert head.loss_bbox.target_stds == (0.1, 0.1, 0.2, 0.2)


def test_detectron2_blocks_run():
    try:
        import detectron2  # noqa: F401
    except ImportError:
        import detectron2_stand_in

        if "detectron2" not in sys.modules:
            detectron2_stand_in.install()
    assert run("detectron2.md") == 2


@pytest.mark.parametrize("page", ["mmdetection.md", "detectron2.md"])
def test_every_option_is_in_the_table(page):
    """Each argument of a registered loss, and each key of the config node, has a row."""
    text = (DOCS / page).read_text(encoding="utf-8")
    rows = set(re.findall(r"`(\w+)`", "\n".join(line for line in text.splitlines() if line.startswith("|"))))
    if page == "detectron2.md":
        source = (DOCS.parent / "ioubal_kernels/integrations/detectron2.py").read_text(encoding="utf-8")
        wanted = set(re.findall(r'^    "([A-Z_]+)":', source, re.MULTILINE))
    else:
        source = (DOCS.parent / "ioubal_kernels/integrations/mmdet/losses.py").read_text(encoding="utf-8")
        wanted = set(re.findall(r"^        (\w+): [^=\n]+ = .+,$", source, re.MULTILINE))
        wanted -= {"weight", "avg_factor", "reduction_override", "activated"}  # of a call; a refusal
    assert len(wanted) >= 8 and wanted <= rows, wanted - rows
