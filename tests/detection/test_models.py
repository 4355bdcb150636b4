"""The detectors: what they are made of, raw maps, inference, backbone files, export's weights."""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torchvision.models import resnet18, vgg16
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.roi_heads import RoIHeads

import ioubal_kernels as ik
from ioubal_kernels.detection.architectures import MODELS
from ioubal_kernels.detection.config import LossConfig
from ioubal_kernels.detection.ema import ModelEma
from ioubal_kernels.detection.errors import NonFiniteError, UsageError
from ioubal_kernels.detection.models import Detector, PreparedImages, build_model
from ioubal_kernels.detection.models.ssd import default_boxes
from ioubal_kernels.detection.objective import apply_loss

TINY = tuple(name for name, architecture in MODELS.items() if architecture.backbone == "tiny")
BOXES = [torch.tensor([[5.0, 8, 25, 30], [30, 30, 60, 62]]), torch.zeros(0, 4)]
LABELS = [torch.tensor([2, 0]), torch.zeros(0, dtype=torch.int64)]


def tiny(name: str, classes: int = 3, **options) -> Detector:
    torch.manual_seed(0)
    detector = build_model(name, classes, anchor_scale=2.0, size=(64, 64), **options)
    apply_loss(detector, LossConfig(w_loc=2.0))
    return detector


def prepared(images: torch.Tensor) -> PreparedImages:
    return PreparedImages(images, [tuple(images.shape[-2:])] * len(images))


@pytest.mark.parametrize("name", TINY)
def test_tiny_has_about_a_million_parameters_and_trains(name):
    model = tiny(name).train()
    assert 0.8e6 < sum(p.numel() for p in model.parameters()) < 1.3e6
    losses = model(prepared(torch.randn(2, 3, 64, 64)), BOXES, LABELS)
    expected = {"cls", "loc"} | ({"rpn_cls", "rpn_loc"} if name == "faster_rcnn_tiny" else set())
    assert losses.keys() == expected
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    found = model.statistics()
    assert int(found["positives"]) > 0 and 0 < float(found["mean_iou"]) < 1


def test_the_tiny_ones_are_as_deep_as_documented():
    """Two hidden layers a tower, 64 sampled RoIs of 100 proposals: a checkpoint or a comparison depends on it."""
    for name, towers in (("retinanet_tiny", ("classification_head.conv", "regression_head.conv")),
                         ("foveabox_tiny", ("cls_tower.layers", "box_tower.layers"))):  # fmt: skip
        weights = [key for key, value in tiny(name).state_dict().items() if value.ndim == 4]
        output = int(name.startswith("fovea"))  # its last layer is in the list of the hidden ones
        assert [sum(tower in key for key in weights) for tower in towers] == [2 + output] * 2
    network = tiny("faster_rcnn_tiny").network
    assert network.roi_heads.fg_bg_sampler.batch_size_per_image == 64
    assert network.rpn._pre_nms_top_n == {"training": 100, "testing": 100}


@pytest.mark.parametrize("name", TINY)
def test_prepared_images_are_what_a_list_of_images_becomes(name):
    """A batch the loader prepared, and the same pictures through torchvision's own transform: the same detections."""
    model = tiny(name).eval()
    model.set_inference(score_threshold=0.0, nms_threshold=0.5, candidates=50, max_detections=20)
    transform = model.network.transform
    transform.min_size, transform.max_size = (64,), 64
    pictures = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (transform.image_mean, transform.image_std))
    with torch.no_grad():
        got = model(prepared((pictures - mean) / std))
        want = model.network(list(pictures))
    for one, other in zip(got, want, strict=True):
        assert len(one["scores"]) > 0
        torch.testing.assert_close(one["boxes"], other["boxes"], rtol=1e-4, atol=1e-3)
        assert torch.equal(one["labels"] + model.offset, other["labels"])


@pytest.mark.parametrize("name", TINY)
def test_labels_start_at_zero_whatever_the_network_calls_them(name):
    """Trained towards one class, the classification loss of the trainer's label 2 goes through the right channel."""
    model = tiny(name).train()
    images = prepared(torch.randn(2, 3, 64, 64))
    targets = model.targets(BOXES, LABELS)
    assert targets[0]["labels"].tolist() == [2 + model.offset, model.offset]
    assert model.offset == (MODELS[name].family in ("ssd", "faster_rcnn"))
    with pytest.raises(Exception):  # noqa: B017  (each network has its own error for a class that does not exist)
        model(images, BOXES, [torch.tensor([3, 0]), LABELS[1]])


def test_retinanet_hands_over_raw_maps_and_starts_at_the_prior():
    model = tiny("retinanet_tiny").train()
    shapes, scores = [], []

    def keep(module, inputs, output):
        shapes.append([tuple(level.shape) for level in output])
        scores.extend(level.detach().flatten().sigmoid() for level in output if level.shape[1] == 27)

    for part in (model.network.head.classification_head, model.network.head.regression_head):
        part.register_forward_hook(keep)
    model(prepared(torch.randn(2, 3, 64, 96)), BOXES, LABELS)
    assert shapes[0] == [(2, 27, 8, 12), (2, 27, 4, 6), (2, 27, 2, 3)]
    assert shapes[1] == [(2, 36, 8, 12), (2, 36, 4, 6), (2, 36, 2, 3)]
    assert 0.003 < torch.cat(scores).mean() < 0.03


def test_resnet_fpn_levels():
    for name, sizes in (("retinanet_r18_fpn", [16, 8, 4, 2, 1]), ("faster_rcnn_r50_fpn", [32, 16, 8, 4, 2])):
        backbone = build_model(name, 2).network.backbone.eval()
        with torch.no_grad():
            assert [level.shape[-1] for level in backbone(torch.zeros(1, 3, 128, 128)).values()] == sizes


def test_default_boxes_are_the_papers():
    """SSD300 on COCO is torchvision's; SSD512's seven levels and VOC's scales by the authors' rule, by hand."""
    assert default_boxes(300, 15).scales == pytest.approx([0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05])
    assert default_boxes(300, 20).scales == pytest.approx([0.10, 0.20, 0.37, 0.54, 0.71, 0.88, 1.05])
    assert default_boxes(512, 10).scales == pytest.approx([0.04, 0.10, 0.26, 0.42, 0.58, 0.74, 0.90, 1.06])
    assert default_boxes(512, 15).scales == pytest.approx([0.07, 0.15, 0.30, 0.45, 0.60, 0.75, 0.90, 1.05])
    assert default_boxes(512, 10).num_anchors_per_location() == [4, 6, 6, 6, 6, 4, 4]
    assert default_boxes(300, 15).num_anchors_per_location() == [4, 6, 6, 6, 4, 4]


def test_anchors_are_float32_under_autocast():
    """torchvision's take the maps' bfloat16, whose 8 digits put an anchor at x = 1000 somewhere within 4 pixels."""
    model = tiny("retinanet_tiny")
    from torchvision.models.detection.image_list import ImageList

    images = ImageList(torch.zeros(1, 3, 64, 2048), [(64, 2048)])
    maps = [torch.zeros(1, 8, 64 // s, 2048 // s, dtype=torch.bfloat16) for s in (8, 16, 32)]
    generator = model.network.anchor_generator
    anchors = generator(images, maps)[0]
    assert isinstance(generator, AnchorGenerator) and anchors.dtype == torch.float32
    assert torch.equal(anchors, generator(images, [m.float() for m in maps])[0])


def test_faster_rcnn_learns_the_boxes_as_they_are_under_autocast(monkeypatch):
    """Proposals and targets in float32: in bfloat16 a box at x = 903.3 would be learnt at 904."""
    model = tiny("faster_rcnn_tiny").train()
    seen = []
    sampled = RoIHeads.select_training_samples

    def recording(self, proposals, targets):
        seen.append(sampled(self, proposals, targets))
        return seen[-1]

    monkeypatch.setattr(RoIHeads, "select_training_samples", recording)
    boxes = [torch.tensor([[903.3, 101.7, 933.9, 140.2], [611.4, 30.6, 690.1, 107.9]])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(prepared(torch.randn(1, 3, 160, 1024)), boxes, [torch.tensor([0, 1])])
    ((proposals, matched, labels, targets),) = seen
    positive = labels[0] > 0
    coder = model.network.roi_heads.box_coder
    learnt = coder.decode_single(targets[0][positive], proposals[0][positive]).reshape(-1, 4)
    assert positive.any() and proposals[0].dtype == torch.float32
    torch.testing.assert_close(learnt, boxes[0][matched[0][positive]], rtol=0, atol=0.01)


def test_unknown_model():
    with pytest.raises(ValueError, match="build_model: name must be one of retinanet_tiny"):
        build_model("yolo", 2)


# ---------------------------------------------------------------------------------------------- FoveaBox


def test_fovea_cells_levels_and_loss_by_the_reference():
    """Both losses and every gradient against the float64 reference, with the divisors positives + N and positives."""
    model = tiny("foveabox_tiny").train()
    apply_loss(model, LossConfig(alpha=0.4, gamma=1.5, beta=0.11, w_loc=2.0))
    network, maps = model.network, {}
    network.base_edges = (16.0, 32.0, 64.0)

    def keep(name):
        def hook(module, inputs, output):
            maps[name] = output
            for level in output:
                level.retain_grad()

        return hook

    network.cls_tower.register_forward_hook(keep("cls"))
    network.box_tower.register_forward_hook(keep("box"))
    losses = model(prepared(torch.randn(2, 3, 64, 64)), BOXES, LABELS)
    sum(losses.values()).backward()
    assert network.scale_ranges == ((1.0, 64.0), (32.0, 128.0), (64.0, 512.0))
    shapes = [(8, 8), (4, 4), (2, 2)]
    cells = network.cells(shapes, torch.device("cpu"))
    assert cells[9].tolist() == [12 - 8, 12 - 8, 12 + 8, 12 + 8]  # row 1, column 1 of stride 8: its centre is 12, 12
    matched = ik.match_fovea(
        BOXES, shapes, strides=(8, 16, 32), scale_ranges=network.scale_ranges, sigma=0.4, backend="reference"
    )
    positives = int((matched >= 0).sum())
    assert positives > 0
    wide = {k: [level.detach().double().requires_grad_() for level in v] for k, v in maps.items()}
    want = ik.iou_balanced_detection_loss(
        wide["cls"], wide["box"], cells.double(), matched, [b.double() for b in BOXES], LABELS, box_coder="fovea",
        alpha=0.4, gamma=1.5, beta=0.11, w_loc=2.0, backend="reference",
        avg_factor=(float(positives + 2), float(positives)),
    )  # fmt: skip
    (want.classification + want.localization).backward()
    assert float(losses["cls"]) == pytest.approx(want.classification.item(), rel=1e-5)
    assert float(losses["loc"]) == pytest.approx(want.localization.item(), rel=1e-5)
    for name, levels in maps.items():
        for level, exact in zip(levels, wide[name], strict=True):
            scale = float(exact.grad.abs().max()) + 1e-12
            torch.testing.assert_close(level.grad.double(), exact.grad, rtol=1e-4, atol=1e-5 * scale)


def test_fovea_finds_the_cell_that_was_lit():
    model = tiny("foveabox_tiny", 2).eval()
    network = model.network
    logits = [torch.full((1, 2, s, s), -20.0) for s in (8, 4, 2)]
    deltas = [torch.zeros(1, 4, s, s) for s in (8, 4, 2)]
    logits[1][0, 1, 2, 1] = 3.0  # level of stride 16, row 2, column 1: centre x 24, y 40
    deltas[1][0, :, 2, 1] = torch.tensor([0.5, 0.25, 1.0, 2.0]).mul(16 / network.base_edges[1]).log()
    found = network.postprocess_detections(logits, deltas, [(64, 64)])[0]
    assert found["labels"].tolist() == [1]
    assert found["boxes"][0].tolist() == pytest.approx([24 - 8, 40 - 4, 24 + 16, 64.0])  # clipped at the bottom
    assert network.postprocess_detections([torch.full_like(m, -20) for m in logits], deltas, [(64, 64)])[0][
        "boxes"
    ].shape == (0, 4)


def test_fovea_suppresses_within_a_class_above_the_threshold():
    network = tiny("foveabox_tiny", 2).eval().network
    logits = [torch.full((1, 2, s, s), -20.0) for s in (8, 4, 2)]
    deltas = [torch.zeros(1, 4, s, s) for s in (8, 4, 2)]
    deltas[1] += torch.tensor(16 / network.base_edges[1]).log()  # boxes of 32 px
    logits[1][0, :, 2, 1] = torch.tensor([2.0, 3.0])  # two classes at one place: IoU 1
    logits[1][0, 1, 2, 2] = 2.5  # the second one at the next place, 16 px on: IoU 1/3
    for threshold, kept in ((0.3, [1, 0]), (0.4, [1, 1, 0])):
        network.nms_thresh = threshold
        assert network.postprocess_detections(logits, deltas, [(64, 64)])[0]["labels"].tolist() == kept


# ---------------------------------------------------------------------------------------------- inference


@pytest.mark.parametrize("name", TINY)
def test_limits_of_inference(name):
    model, images = tiny(name).eval(), prepared(torch.randn(1, 3, 64, 64))
    options = {"nms_threshold": 0.5, "candidates": 30}
    with torch.no_grad():
        model.set_inference(score_threshold=0.0, max_detections=7, **options)
        assert len(model(images)[0]["scores"]) == 7
        model.set_inference(score_threshold=0.999, max_detections=7, **options)
        found = model(images)[0]
    assert found["boxes"].shape == (0, 4) and found["labels"].dtype == torch.int64


@pytest.mark.parametrize("name", TINY)
def test_every_limit_reaches_the_network(name):
    model = tiny(name)
    model.set_inference(score_threshold=0.12, nms_threshold=0.34, candidates=56, max_detections=7)
    network = model.network
    if name == "faster_rcnn_tiny":
        candidates = {network.rpn._pre_nms_top_n["testing"], network.rpn._post_nms_top_n["testing"]}
        assert candidates == {56}
    else:
        assert network.topk_candidates == 56
    last = network.roi_heads if name == "faster_rcnn_tiny" else network
    assert (last.score_thresh, last.nms_thresh, last.detections_per_img) == (0.12, 0.34, 7)


@pytest.mark.parametrize("name", TINY)
def test_outputs_are_float32_under_autocast(name):
    """Eight bits of a score would leave hundreds of detections tied, those of a delta cost IoU."""
    model, dtypes = tiny(name).eval(), set()
    model.set_inference(score_threshold=0.0, nms_threshold=1.0, candidates=200, max_detections=100)
    for head in model._heads():
        head.register_forward_hook(lambda module, inputs, output: dtypes.update(t.dtype for t in tree_leaves(output)))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(prepared(torch.randn(1, 3, 64, 64)))
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("name", TINY)
def test_nan_in_the_weights_is_an_error_and_not_an_empty_image(name):
    model = tiny(name).eval()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
        with pytest.raises(NonFiniteError, match="NaN or infinite"):
            model(prepared(torch.randn(1, 3, 64, 64)))


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


@pytest.mark.parametrize("name", TINY)
def test_a_copy_is_independent_and_computes_the_same(name):
    model = tiny(name).eval()
    copied = copy.deepcopy(model)
    images = prepared(torch.randn(1, 3, 64, 64))
    with torch.no_grad():
        want = model(images)[0]
        next(model.parameters()).add_(1.0)
        got = copied(images)[0]
    assert torch.equal(got["boxes"], want["boxes"])


# ---------------------------------------------------------------------------------------------- backbone files


def test_resnet_file(tmp_path):
    torch.manual_seed(3)
    body = resnet18(weights=None)
    file = tmp_path / "r18.pth"
    torch.save(body.state_dict(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    model = build_model("retinanet_r18_fpn", 2, norm="frozen", backbone_file=str(file), backbone_sha256=digest)
    loaded = dict(model.network.backbone.body.named_parameters())
    assert torch.equal(loaded["layer3.0.conv1.weight"], body.layer3[0].conv1.weight)
    trained = {n.split(".")[0] for n, p in loaded.items() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}


def test_vgg_file(tmp_path):
    """Every convolution of VGG's features lands in its place; the classifier and SSD's own layers are left alone."""
    torch.manual_seed(3)
    features = {f"features.{k}": v for k, v in vgg16(weights=None).features.state_dict().items()}
    file = tmp_path / "vgg.pth"
    torch.save({**features, "classifier.0.weight": torch.zeros(1)}, file)
    backbone = build_model("ssd300_vgg16", 2, backbone_file=str(file)).network.backbone
    assert torch.equal(backbone.features[21].weight, features["features.21.weight"])
    assert torch.equal(backbone.extra[0][1].weight, features["features.24.weight"])
    assert torch.equal(backbone.extra[0][5].bias, features["features.28.bias"])
    assert len(features) == 26


def test_the_digest_in_a_files_name_is_checked(tmp_path):
    file = tmp_path / "resnet18-00000000.pth"
    torch.save(resnet18(weights=None).state_dict(), file)
    with pytest.raises(UsageError, match="expected 00000000, as its name says"):
        build_model("retinanet_r18_fpn", 2, backbone_file=str(file))


@pytest.mark.parametrize(
    ("content", "digest", "message"),
    [
        (None, None, "is not a file"),
        (b"<html>", None, "not a plain PyTorch state dict"),
        ({"conv1.weight": 3}, None, "expected a dict of tensors"),
        ({"conv1.weight": torch.zeros(1)}, None, "does not fit this backbone"),
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
        build_model("retinanet_r18_fpn", 2, backbone_file=str(file), backbone_sha256=digest)
