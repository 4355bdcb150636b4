"""The detectors: sizes, raw maps, inference, backbone files."""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
from torchvision.models import resnet18

import ioubal_kernels as ik
from ioubal_kernels.detection.config import LossConfig
from ioubal_kernels.detection.ema import ModelEma
from ioubal_kernels.detection.errors import NonFiniteError, UsageError
from ioubal_kernels.detection.models import build_model
from ioubal_kernels.detection.models.retinanet import HeadMaps, RetinaNet
from ioubal_kernels.detection.objective import detection_loss


@pytest.fixture(scope="module")
def tiny() -> RetinaNet:
    torch.manual_seed(0)
    return build_model("retinanet_tiny", 3, 2.0)


def test_tiny_has_about_a_million_parameters(tiny):
    assert 0.9e6 < sum(p.numel() for p in tiny.parameters()) < 1.0e6


def test_heads_give_raw_maps_and_start_at_the_prior(tiny):
    model = copy.deepcopy(tiny).eval()
    with torch.no_grad():
        maps = model(torch.randn(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps.cls_logits] == [(2, 27, 8, 12), (2, 27, 4, 6), (2, 27, 2, 3)]
    assert [tuple(m.shape) for m in maps.bbox_deltas] == [(2, 36, 8, 12), (2, 36, 4, 6), (2, 36, 2, 3)]
    scores = torch.cat([m.flatten() for m in maps.cls_logits]).sigmoid()
    assert 0.003 < scores.mean() < 0.03


def test_resnet_fpn_has_five_levels():
    model = build_model("retinanet_r18_fpn", 2, 4.0).eval()
    with torch.no_grad():
        maps = model(torch.zeros(1, 3, 128, 128))
    assert [m.shape[-1] for m in maps.bbox_deltas] == [16, 8, 4, 2, 1]
    assert model.anchors(maps).shape == (9 * (256 + 64 + 16 + 4 + 1), 4)


def test_unknown_model():
    with pytest.raises(ValueError, match="build_model: name must be one of retinanet_tiny"):
        build_model("yolo", 2, 4.0)


def test_loss_of_raw_maps_equals_the_loss_of_flat_ones(tiny):
    """The heads' own layout and the anchors' order fit together: permuted by hand the loss is the same."""
    torch.manual_seed(1)
    maps = tiny(torch.randn(2, 3, 64, 64))
    boxes = [torch.tensor([[5.0, 8, 25, 30], [30, 30, 60, 62]]), torch.zeros(0, 4)]
    labels = [torch.tensor([2, 0]), torch.zeros(0, dtype=torch.int64)]
    config = LossConfig(w_loc=2.0)
    loss = detection_loss(tiny, maps, boxes, labels, config, 2.0)
    assert loss.num_positives > 0
    from ioubal_kernels.detection.anchors import match_batch
    from ioubal_kernels.detection.models.retinanet import flatten_maps

    anchors = tiny.anchors(maps)
    flat = ik.iou_balanced_detection_loss(
        flatten_maps(maps.cls_logits, 3), flatten_maps(maps.bbox_deltas, 4), anchors, match_batch(anchors, boxes),
        boxes, labels, w_loc=2.0, backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(loss.classification, flat.classification, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.localization, flat.localization, rtol=1e-5, atol=1e-6)


class FixedMaps(RetinaNet):
    """A RetinaNet whose outputs are given."""

    def forward(self, images):
        return self.given


def fixed(num_classes: int = 2) -> FixedMaps:
    model = build_model("retinanet_tiny", num_classes, 2.0)
    model.__class__ = FixedMaps
    grid = ((8, 8), (4, 4), (2, 2))
    model.given = HeadMaps(
        [torch.full((1, 9 * num_classes, *s), -20.0) for s in grid], [torch.zeros(1, 36, *s) for s in grid]
    )
    return model.eval()


def test_detect_finds_the_anchor_that_was_lit():
    model = fixed()
    model.given.cls_logits[1][0, 4 * 2 + 1, 2, 1] = 3.0  # level 16, anchor 4, class 1, row 2, column 1
    index = 64 * 9 + (2 * 4 + 1) * 9 + 4
    anchor = model.anchors(model.given)[index]
    found = model.detect(torch.zeros(1, 3, 64, 64))[0]
    assert found["labels"].tolist() == [1]
    assert found["scores"].tolist() == pytest.approx([torch.tensor(3.0).sigmoid().item()])
    assert found["boxes"][0].tolist() == anchor.clamp(0, 64).tolist()


def test_detect_suppresses_per_class_and_limits():
    model = fixed()
    for anchor, label, logit in ((0, 0, 3.0), (1, 0, 2.0), (1, 1, 1.0)):
        model.given.cls_logits[0][0, anchor * 2 + label, 4, 4] = logit
    found = model.detect(torch.zeros(1, 3, 64, 64), nms_threshold=0.3)[0]
    assert found["labels"].tolist() == [0, 1]
    assert len(model.detect(torch.zeros(1, 3, 64, 64), max_detections=1)[0]["scores"]) == 1
    assert model.detect(torch.zeros(1, 3, 64, 64), score_threshold=0.8)[0]["labels"].tolist() == [0]
    assert len(model.detect(torch.zeros(1, 3, 64, 64), candidates=1)[0]["scores"]) == 1


def test_detect_without_detections_and_with_nan():
    model = fixed()
    empty = model.detect(torch.zeros(1, 3, 64, 64))[0]
    assert empty["boxes"].shape == (0, 4)
    model.given.cls_logits[2][0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        model.detect(torch.zeros(1, 3, 64, 64))


def test_ema_by_hand():
    """decay min(.9, (1 + n) / (10 + n)): 2/11 at the first update, 3/12 at the second."""
    model = torch.nn.BatchNorm1d(1)
    ema = ModelEma(model, 0.9)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_mean.fill_(6.0)
        model.num_batches_tracked.fill_(7)
    ema.update(model)
    assert ema.module.weight.item() == pytest.approx(1 + (3 - 1) * 9 / 11)
    assert ema.module.running_mean.item() == pytest.approx(6 * 9 / 11)
    assert ema.module.num_batches_tracked.item() == 7
    first = ema.module.weight.item()
    ema.update(model)
    assert ema.module.weight.item() == pytest.approx(first + (3 - first) * 9 / 12)


def test_backbone_file(tmp_path):
    torch.manual_seed(3)
    body = resnet18(weights=None)
    file = tmp_path / "r18.pth"
    torch.save(body.state_dict(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    model = build_model("retinanet_r18_fpn", 2, 4.0, backbone_file=str(file), backbone_sha256=digest)
    loaded = dict(model.backbone.body.named_parameters())
    assert torch.equal(loaded["layer3.0.conv1.weight"], body.layer3[0].conv1.weight)
    trained = {n.split(".")[0] for n, p in loaded.items() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}


@pytest.mark.parametrize(
    ("content", "digest", "message"),
    [
        (None, None, "is not a file"),
        (b"<html>", None, "not a plain PyTorch state dict"),
        ({"conv1.weight": 3}, None, "expected a dict of tensors"),
        ({"conv1.weight": torch.zeros(1)}, None, "does not fit this ResNet"),
        (b"x", "0" * 64, r"SHA-256 of .* is 2d711642.*expected 0000"),
    ],
)
def test_bad_backbone_file(tmp_path, content, digest, message):
    file = tmp_path / "backbone.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(UsageError, match=message):
        build_model("retinanet_r18_fpn", 2, 4.0, backbone_file=str(file), backbone_sha256=digest)
