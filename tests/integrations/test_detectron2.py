"""IoUBalancedRetinaNet, against the real Detectron2 where it is installed, else against a stand-in of its calling
convention; each test's id says which.
"""

from __future__ import annotations

import copy
import pickle

import detectron2_stand_in
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_iou

try:
    import detectron2

    AGAINST = f"detectron2-{detectron2.__version__}"
except ImportError:
    detectron2_stand_in.install()
    AGAINST = detectron2_stand_in.VERSION

from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import META_ARCH_REGISTRY, RetinaNet
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from ioubal_kernels.boxes import decode
from ioubal_kernels.integrations import detectron2 as integration

CLASSES, LOCATIONS, PER_LOCATION = 3, (8, 4), 2
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


@pytest.fixture(autouse=True, params=[AGAINST])
def against(request):
    """Nothing but the name in the id."""
    return request.param


class Grid(nn.Module):
    """Anchors of two levels over an image of 64 pixels, in Detectron2's order: row, column, anchor."""

    def forward(self, features):
        levels = []
        for size, base in zip(LOCATIONS, (14.0, 28.0), strict=True):
            center = (torch.arange(size) + 0.5) * 64 / size
            y, x = torch.meshgrid(center, center, indexing="ij")
            at = torch.stack([x, y, x, y], -1).reshape(-1, 1, 4)
            half = torch.tensor([[-base, -base, base, base], [-base, -base / 2, base, base / 2]]) / 2
            levels.append(Boxes((at + half).reshape(-1, 4)))
        return levels


def make(kind=integration.IoUBalancedRetinaNet, **options):
    options = {"smooth_l1_beta": 0.1, "box2box_transform": Box2BoxTransform(weights=WEIGHTS), **options}
    return kind(
        backbone=nn.Identity(),
        head=nn.Identity(),
        head_in_features=["p3", "p4"],
        anchor_generator=Grid(),
        anchor_matcher=Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True),
        num_classes=CLASSES,
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
        **options,
    ).train()


def ground_truth(empty=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(3):
        count = 0 if empty and number == 2 else 5 + 2 * number
        corner = 34 * torch.rand(count, 2, generator=generator)
        boxes = torch.cat([corner, corner + 10 + 18 * torch.rand(count, 2, generator=generator)], 1)
        classes = torch.randint(0, CLASSES, (count,), generator=generator)
        found.append(Instances((64, 64), gt_boxes=Boxes(boxes), gt_classes=classes))
    return found


def predictions(seed=1):
    """The heads' maps: logits (N, A*K, H, W) and deltas (N, A*4, H, W) of each level."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            (scale * torch.randn(3, PER_LOCATION * columns, size, size, generator=generator)).requires_grad_()
            for size in LOCATIONS
        ]
        for columns, scale in ((CLASSES, 1.0), (4, 1.5))
    ]


def transposed(maps, columns):
    """Detectron2's layout (N, H*W*A, K) of maps."""
    split = [m.reshape(3, PER_LOCATION, columns, *m.shape[2:]) for m in maps]
    return [m.permute(0, 3, 4, 1, 2).reshape(3, -1, columns) for m in split]


def train_step(model, maps, gt, iteration=0):
    """Losses and the gradients of both heads' maps."""
    with EventStorage(iteration) as storage:
        losses = model.forward_training(None, None, maps, gt)
    flat = [m for head in maps for m in head]
    grads = torch.autograd.grad(losses["loss_cls"] + 1.7 * losses["loss_box_reg"], flat)
    return {name: value.detach() for name, value in losses.items()}, grads, storage


@pytest.mark.parametrize("empty", [False, True], ids=["boxes", "one-image-without"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [0.25, -1.0])
def test_off_equals_stock(alpha, beta, empty):
    """Losses, gradients and the moving average over three steps."""
    options = {"focal_loss_alpha": alpha, "focal_loss_gamma": 1.5, "smooth_l1_beta": beta}
    stock, ours = make(RetinaNet, **options), make(eta=0.0, lambda_=0.0, **options)
    for step in range(3):
        maps, gt = predictions(step), ground_truth(empty, step)
        want, want_grads, _ = train_step(stock, maps, gt)
        got, got_grads, _ = train_step(ours, maps, gt)
        assert want["loss_box_reg"] > 0
        for name, value in want.items():
            assert_close(got[name], value, rtol=2e-5, atol=0.0)
        for mine, theirs in zip(got_grads, want_grads, strict=True):
            assert_close(mine, theirs, rtol=2e-5, atol=2e-6 * float(theirs.abs().max()))
        assert isinstance(ours.loss_normalizer, torch.Tensor) and ours.loss_normalizer.ndim == 0
        assert float(ours.loss_normalizer) == pytest.approx(stock.loss_normalizer, rel=1e-6)


@pytest.mark.parametrize("scope", ["batch", "level", "image"])
def test_by_hand(scope):
    """Eq. 3 to 6 in float64 from Detectron2's own labels."""
    model, maps, gt = make(eta=1.5, lambda_=1.2, w_loc=2.5, normalizer_scope=scope), predictions(), ground_truth()
    got, grads, storage = train_step(model, maps, gt, iteration=19)
    anchors = Grid()(None)
    flat = torch.cat([level.tensor for level in anchors]).double()
    labels, boxes = (torch.stack(t) for t in model.label_anchors(anchors, gt))
    logits = torch.cat(transposed(maps[0], CLASSES), 1).double()
    deltas = torch.cat(transposed(maps[1], 4), 1).double()
    positive = (labels >= 0) & (labels < CLASSES)
    first = PER_LOCATION * LOCATIONS[0] ** 2
    assert (labels == -1).any() and positive[:, :first].sum() > 2 and positive[:, first:].sum() > 2
    size, goal = (b[..., 2:] - b[..., :2] for b in (flat, boxes.double()))
    shift = (boxes.double()[..., :2] + boxes[..., 2:] - flat[..., :2] - flat[..., 2:]) / 2
    target = torch.cat([shift / size, (goal / size).log()], -1) * torch.tensor(WEIGHTS).double()
    iou = torch.zeros_like(labels, dtype=torch.float64)
    for n in range(3):
        decoded = decode(deltas[n][positive[n]].detach(), flat[positive[n]], WEIGHTS)
        iou[n, positive[n]] = box_iou(decoded, boxes[n][positive[n]].double()).diagonal()
    p, one_hot = logits.sigmoid(), torch.zeros_like(logits)
    one_hot[positive] = torch.eye(CLASSES).double()[labels[positive]]
    focal = -(0.25 * one_hot * (1 - p) ** 2 * p.log() + 0.75 * (1 - one_hot) * p**2 * (1 - p).log())
    own = (focal * one_hot).sum(-1)
    weighted = iou**1.5 * own
    if scope == "batch":
        scale = own.sum() / weighted.sum()
    elif scope == "image":
        scale = (own.sum(1, keepdim=True) / weighted.sum(1, keepdim=True)).nan_to_num(0.0)
    else:
        parts = [own[:, :first].sum() / weighted[:, :first].sum(), own[:, first:].sum() / weighted[:, first:].sum()]
        scale = torch.where(torch.arange(own.shape[1]) < first, *parts)
    normalizer = 0.9 * 100 + 0.1 * int(positive.sum())
    negatives = (focal * (1 - one_hot)).sum(-1)[labels != -1].sum()
    cls = (negatives + (scale.detach() * weighted).sum()) / normalizer
    off = (deltas - target)[positive].abs()
    smooth = torch.where(off < 0.1, off**2 / 0.2, off - 0.05).sum(1)
    box = 2.5 * (iou[positive] ** 1.2 * smooth).sum() / normalizer
    want = torch.autograd.grad(cls + 1.7 * box, [m for head in maps for m in head])
    assert_close(got["loss_cls"].double(), cls.detach(), rtol=1e-5, atol=0.0)
    assert_close(got["loss_box_reg"].double(), box.detach(), rtol=1e-5, atol=0.0)
    for mine, theirs in zip(grads, want, strict=True):
        assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    logged = {name: value[0] for name, value in storage.latest().items()}
    assert logged["num_pos_anchors"] == pytest.approx(int(positive.sum()) / 3)
    assert logged["mean_iou"] == pytest.approx(float(iou[positive].mean()), rel=1e-5)


def test_losses_take_both_layouts():
    """`losses` as RetinaNet calls it, on transposed predictions, and on the heads' maps."""
    model, maps, gt = make(), predictions(), ground_truth()
    want, _, _ = train_step(model, maps, gt)
    del model.loss_normalizer
    anchors = model.anchor_generator(None)
    labels, boxes = model.label_anchors(anchors, gt)
    with EventStorage(0):
        got = model.losses(anchors, transposed(maps[0], CLASSES), labels, transposed(maps[1], 4), boxes)
    for name, value in want.items():
        assert_close(got[name].detach(), value, rtol=1e-6, atol=0.0)


class Reads(TorchDispatchMode):
    """Counts what would make a CUDA device's host wait."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_no_value_is_read_on_the_host(monkeypatch):
    """From labels to losses; the scalars are read every log_period iterations only."""
    monkeypatch.setenv("IOUBAL_CHECK", "0")
    model, maps, gt = make(log_period=20), predictions(), ground_truth()
    anchors = model.anchor_generator(None)
    labels, boxes = model.label_anchors(anchors, gt)
    for iteration, expected in ((0, 0), (1, 0), (18, 0), (19, 2), (20, 0)):
        with EventStorage(iteration) as storage, Reads() as reads:
            model.losses(anchors, maps[0], labels, maps[1], boxes)
        assert reads.count == expected, iteration
        assert bool(storage.latest()) is bool(expected)
    with Reads() as reads:
        torch.ones(1).item()
    assert reads.count == 1


def test_copies_and_pickles_keep_the_normalizer():
    model = make(eta=1.1)
    train_step(model, predictions(), ground_truth())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.loss_normalizer, model.loss_normalizer)
        assert other.iou_balanced == model.iou_balanced
    assert "loss_normalizer" not in model.state_dict()


def small_cfg():
    """A config that the real Detectron2 builds in a second and the stand-in knows the keys of."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "IoUBalancedRetinaNet"
    cfg.MODEL.RETINANET.NUM_CLASSES = CLASSES
    if AGAINST != detectron2_stand_in.VERSION:
        cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
        cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.FPN.OUT_CHANNELS = 16
        # Without weights from a file frozen normalisation would let the activations grow.
        cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = "BN", 0
    return cfg


def test_config():
    cfg = small_cfg()
    assert build_model(cfg).iou_balanced["eta"] == 1.5  # without add_config: the defaults
    integration.add_config(cfg)
    node = "MODEL.RETINANET.IOU_BALANCED"
    cfg.merge_from_list([f"{node}.ETA", 1.2, f"{node}.LAMBDA", 0.5, f"{node}.W_LOC", 3.0])
    cfg.merge_from_list([f"{node}.BACKEND", "reference"])
    integration.add_config(cfg)  # again: keeps what is there
    model = build_model(cfg)
    assert META_ARCH_REGISTRY.get("IoUBalancedRetinaNet") is type(model)
    own = model.iou_balanced
    assert (own["eta"], own["lambda_"], own["w_loc"], own["backend"]) == (1.2, 0.5, 3.0, "reference")
    assert own["beta"] == cfg.MODEL.RETINANET.SMOOTH_L1_LOSS_BETA and own["gamma"] == 2.0 and own["alpha"] == 0.25
    with pytest.raises((KeyError, AssertionError), match="Non-existent"):
        cfg.merge_from_list([f"{node}.ETTA", 1.0])
    cfg.MODEL.RETINANET.IOU_BALANCED = type(cfg)({"ETTA": 1.0})
    with pytest.raises(ValueError, match="IOU_BALANCED's key must be one of .* got 'ETTA'; did you mean 'ETA'"):
        build_model(cfg)


@pytest.mark.skipif(AGAINST == detectron2_stand_in.VERSION, reason="needs Detectron2's backbones")
def test_a_whole_model_trains():
    torch.manual_seed(0)
    model = build_model(small_cfg()).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    image = 255 * torch.rand(3, 64, 64)
    inputs = [{"image": image, "instances": ground_truth(False)[0]}]
    totals = []
    for step in range(12):
        with EventStorage(step):
            total = sum(model(inputs).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total * model.loss_normalizer))  # whose average starts at 100 and falls
    assert totals[-1] < 0.9 * totals[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box_reg_loss_type": "giou"}, "box_reg_loss_type .*must be 'smooth_l1'.* got 'giou'"),
        ({"box2box_transform": Box2BoxTransformLinear()}, "must be a Box2BoxTransform .* got Box2BoxTransformLinear"),
        ({"eta": -1.0}, "eta must be finite and at least 0"),
        ({"normalizer_scope": "levels"}, "did you mean 'level'"),
        ({"log_period": -1}, "log_period must be at least 0"),
    ],
)
def test_bad_arguments_say_what_they_got(options, message):
    with pytest.raises(ValueError, match=f"IoUBalancedRetinaNet: {message}|{message}"):
        make(**options)
