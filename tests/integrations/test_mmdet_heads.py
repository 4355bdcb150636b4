"""MMDetection's detectors with this package's heads: stock at eta = lambda = 0, and a computation by hand otherwise."""

from __future__ import annotations

import importlib
import subprocess
import sys

import mmdet_env
import pytest
import torch
from torch.testing import assert_close

mmdet = mmdet_env.load()

from mmdet.models.utils import images_to_levels  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402
from mmdet.structures.bbox import bbox_overlaps  # noqa: E402
from mmengine.config import Config, ConfigDict  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402
from small_mmdet import CLASSES, FAMILIES, FOCAL, SIZE, STDS, anchors, batch, coder, config, make, step  # noqa: E402
from small_models import assert_same  # noqa: E402

import ioubal_kernels as ik  # noqa: E402
from ioubal_kernels.integrations import mmdet as integration  # noqa: E402

OFF = (0.0, 0.0)


def test_which_operators_run(record_property):
    """Not a check of anything of ours: the report says which operators the tests of this file ran with."""
    record_property("mmcv operators", mmdet_env.operators())
    assert mmdet.__version__.startswith("3.")


@pytest.mark.parametrize("empty", [False, True], ids=["boxes", "one-image-without"])
@pytest.mark.parametrize("family", FAMILIES)
def test_off_equals_stock(family, empty):
    """Losses, and the gradient of every parameter, with ignored regions and anchors outside allowed_border."""
    inputs = batch(empty=empty)
    want = step(make(family, False), *inputs)
    got = step(make(family, True, OFF), *inputs)
    assert {"loss_cls", "loss_bbox"} <= want[0].keys() and all(value > 0 for value in want[0].values())
    assert_same(got, want, rtol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_balanced_differs_where_it_should(family):
    """Eq. 4 keeps the classification loss's value and changes its gradient; Eq. 6 shrinks the box loss."""
    inputs = batch(empty=False)
    plain, got = step(make(family, True, OFF), *inputs), step(make(family, True), *inputs)
    for name in (n for n in plain[0] if n.endswith("loss_cls")):
        assert_close(got[0][name], plain[0][name], rtol=1e-4, atol=0.0)
    assert got[0]["loss_bbox"] < 0.97 * plain[0]["loss_bbox"]
    final = [n for n in plain[1] if n.split(".")[-2] in ("retina_cls", "conv_cls", "fc_cls") or ".cls_convs.0.0.w" in n]
    assert final
    for name in final:
        assert not torch.allclose(got[1][name], plain[1][name], rtol=0.01), name


# ------------------------------------------------------------------------------------------------ by hand


def ground_truth(*, empty: bool = False):
    """Instances, image information and ignored regions as mmdet's heads take them."""
    samples = batch(empty=empty)[1]
    return (
        [sample.gt_instances for sample in samples],
        [sample.metainfo for sample in samples],
        [sample.ignored_instances for sample in samples],
    )


def outputs(head, shapes, per_location, columns, *, box_scale=0.4):
    """Random maps of scores and boxes with gradients, one a level."""
    generator = torch.Generator().manual_seed(11)

    def maps(channels, scale):
        return [(scale * torch.randn(3, channels, size, size, generator=generator)).requires_grad_() for size in shapes]

    return maps(per_location * columns, 1.0), maps(per_location * 4, box_scale)


def gradients(losses, tensors):
    total = sum(sum(part) if isinstance(part, (list, tuple)) else part for part in losses)
    return torch.autograd.grad(total.sum(), tensors, retain_graph=True)


def compare(got, want, tensors):
    """Both losses, then the gradients of both in every level's map (the hand computation is in float64)."""
    for mine, theirs in zip(got, want, strict=True):
        mine, theirs = (sum(part) if isinstance(part, (list, tuple)) else part for part in (mine, theirs))
        assert theirs > 0
        assert_close(mine.double().sum(), theirs.double(), rtol=1e-5, atol=0.0)
    for mine, theirs in zip(gradients(got, tensors), gradients(want, tensors), strict=True):
        assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def focal_by_hand(logits, labels, iou, weight, eta, avg_factor):
    """Eq. 3 and 4 with focal loss; alpha .25, gamma 2; loss of float64 logits (M, K)."""
    one_hot = torch.zeros_like(logits)
    positive = labels < CLASSES
    one_hot[positive, labels[positive]] = 1.0
    p = logits.sigmoid()
    plain = -(0.25 * one_hot * (1 - p) ** 2 * p.log() + 0.75 * (1 - one_hot) * p**2 * (1 - p).log())
    plain = plain * weight[:, None]
    own = (plain * one_hot).sum(1)
    power = torch.where(positive, iou**eta, 0.0)
    scale = (own.sum() / (power * own).sum()).detach() if positive.any() else 0.0
    return ((plain * (1 - one_hot)).sum() + (scale * power * own).sum()) / avg_factor


def smooth_l1_by_hand(pred, target, iou, beta, lambda_, weight, avg_factor):
    """Eq. 5 and 6 of float64 deltas (M, 4)."""
    off = (pred - target).abs()
    plain = torch.where(off < beta, off**2 / (2 * beta), off - beta / 2)
    return (iou[:, None] ** lambda_ * plain * weight).sum() / avg_factor


def flat(maps, columns):
    return [level.permute(0, 2, 3, 1).reshape(-1, columns) for level in maps]


@pytest.mark.parametrize("decoded", [False, True], ids=["deltas", "reg_decoded_bbox"])
def test_retina_head_by_hand(decoded):
    """Per level; boxes decoded by mmdet's coder. With reg_decoded_bbox mmdet's GIoU loss regresses the boxes."""
    extra = {"reg_decoded_bbox": True, "loss_bbox": {"type": "GIoULoss", "loss_weight": 1.0}} if decoded else {}
    head = make("retinanet", True, (1.5, 1.2), **extra, bbox_coder=coder((0.5, 0.5, 0.25, 0.25))).bbox_head
    shapes = [8, 4, 2]
    scores, preds = outputs(head, shapes, 3, CLASSES)
    instances, metas, ignored = ground_truth()
    got = head.loss_by_feat(scores, preds, instances, metas, ignored)
    sizes = [torch.Size((size, size)) for size in shapes]
    anchor_list, flags = head.get_anchors(sizes, metas, device="cpu")
    counts = [len(level) for level in anchor_list[0]]
    labels, label_weights, targets, weights, avg_factor = head.get_targets(
        anchor_list, flags, instances, metas, batch_gt_instances_ignore=ignored
    )
    assert any((w == 0).any() for w in label_weights) and sum((level < CLASSES).sum() for level in labels) > 10
    priors = images_to_levels([torch.cat(own) for own in anchor_list], counts)
    cls, box = 0.0, 0.0
    for n, (x, d) in enumerate(zip(flat(scores, CLASSES), flat(preds, 4), strict=True)):
        level, prior, goal = labels[n].reshape(-1), priors[n].reshape(-1, 4), targets[n].reshape(-1, 4)
        positive = level < CLASSES
        boxes = head.bbox_coder.decode(prior, d)
        goals = goal if decoded else head.bbox_coder.decode(prior, goal)
        iou = torch.zeros(len(level), dtype=torch.float64)
        iou[positive] = bbox_overlaps(boxes[positive].detach(), goals[positive], is_aligned=True).double()
        cls = cls + 1.3 * focal_by_hand(x.double(), level, iou, label_weights[n].reshape(-1), 1.5, avg_factor)
        weight = weights[n].reshape(-1, 4)
        if decoded:
            box = box + MODELS.build({"type": "GIoULoss"})(boxes, goals, weight, avg_factor=avg_factor)
        else:
            part = smooth_l1_by_hand(d.double(), goal.double(), iou, 0.11, 1.2, weight, avg_factor)
            box = box + 2.0 * part
    compare((got["loss_cls"], got["loss_bbox"]), (cls, box), [*scores, *preds])


@pytest.mark.parametrize("weight", [-1, 2.5], ids=["", "pos_weight"])
def test_ssd_head_by_hand(weight):
    """Per image: cross entropy of the positives and of three times as many hardest negatives."""
    model = make("ssd", True)
    head = model.bbox_head
    head.train_cfg["pos_weight"] = weight
    assert head.loss_bbox.target_stds == STDS and head.loss_bbox.beta == 1.0
    shapes = [8, 4, 2]
    per_location = head.num_base_priors[0]
    scores, preds = outputs(head, shapes, per_location, CLASSES + 1, box_scale=2.0)
    instances, metas, ignored = ground_truth(empty=True)
    got = head.loss_by_feat(scores, preds, instances, metas, ignored)
    assert len(got["loss_cls"]) == 3 and got["loss_cls"][0].shape == (1,)
    anchor_list, flags = head.get_anchors([torch.Size((size, size)) for size in shapes], metas, device="cpu")
    parts = head.get_targets(anchor_list, flags, instances, metas, batch_gt_instances_ignore=ignored)
    labels, label_weights, targets, box_weights = (torch.cat(part, 1) for part in parts[:4])
    avg_factor = parts[4]
    all_scores = torch.cat([s.permute(0, 2, 3, 1).reshape(3, -1, CLASSES + 1) for s in scores], 1).double()
    all_preds = torch.cat([p.permute(0, 2, 3, 1).reshape(3, -1, 4) for p in preds], 1).double()
    cls, box = 0.0, 0.0
    for n in range(3):
        positive = labels[n] < CLASSES
        prior = torch.cat(anchor_list[n])
        boxes, goals = (head.bbox_coder.decode(prior, t.float().detach()) for t in (all_preds[n], targets[n]))
        iou = bbox_overlaps(boxes, goals, is_aligned=True).double()
        plain = -all_scores[n].log_softmax(1).gather(1, labels[n][:, None])[:, 0] * label_weights[n]
        negatives, _ = plain[labels[n] == CLASSES].sort(descending=True)
        own, power = plain[positive], iou[positive] ** 1.5
        scale = (own.sum() / (power * own).sum()).detach() if positive.any() else 0.0
        cls = cls + ((scale * power * own).sum() + negatives[: 3 * int(positive.sum())].sum()) / avg_factor
        weights = box_weights[n]
        box = box + smooth_l1_by_hand(all_preds[n], targets[n].double(), iou, 1.0, 1.5, weights, avg_factor)
    compare((got["loss_cls"], got["loss_bbox"]), (cls, box), [*scores, *preds])


def test_fovea_head_by_hand():
    """Whole batch; boxes by FoveaBox's own decoding, which does not reach the image's border here."""
    head = make("fovea", True, sigma=0.9).bbox_head
    shapes = [8, 4, 2]
    scores, preds = outputs(head, shapes, 1, CLASSES)
    instances, metas, _ = ground_truth(empty=True)
    got = head.loss_by_feat(scores, preds, instances, metas)
    sizes = [torch.Size((size, size)) for size in shapes]
    priors = head.prior_generator.grid_priors(sizes, device="cpu")
    labels, targets = head.get_targets(instances, sizes, priors)
    x, d = torch.cat(flat(scores, CLASSES)).double(), torch.cat(flat(preds, 4)).double()
    positive = labels < CLASSES
    boxes, goals = [], []
    start = 0
    for prior, base in zip(priors, head.base_edge_list, strict=True):
        rows = slice(start, start := start + 3 * len(prior))
        # A wide frame around the image, so that clamping to the border plays no part.
        moved, frame = prior.repeat(3, 1).double() + 1000, (2000, 2000)
        boxes.append(head._bbox_decode(moved, d[rows].detach(), base, frame))
        goals.append(head._bbox_decode(moved, targets[rows].double(), base, frame))
    iou = bbox_overlaps(torch.cat(boxes), torch.cat(goals), is_aligned=True).double()
    count = int(positive.sum())
    assert count > 5
    cls = 1.3 * focal_by_hand(x, labels, iou, torch.ones(len(labels)), 1.5, count + 3)
    box = 2.0 * smooth_l1_by_hand(
        d[positive], targets[positive].double(), iou[positive], 0.11, 1.5, torch.ones(count, 4), count
    )
    compare((got["loss_cls"], got["loss_bbox"]), (cls, box), [*scores, *preds])


def test_fovea_head_without_positives():
    """The box loss is 0 and joined to the graph, so that DDP finds every parameter used."""
    head = make("fovea", True).bbox_head
    scores, preds = outputs(head, [8, 4, 2], 1, CLASSES)
    nothing = [InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)) for _ in range(3)]
    got = head.loss_by_feat(scores, preds, nothing, ground_truth()[1])
    assert got["loss_cls"] > 0 and got["loss_bbox"] == 0
    for gradient in torch.autograd.grad(got["loss_bbox"], preds):
        assert (gradient == 0).all()


@pytest.mark.parametrize("agnostic", [False, True], ids=["class-specific", "class-agnostic"])
@pytest.mark.parametrize("decoded", [False, True], ids=["deltas", "reg_decoded_bbox"])
def test_box_head_by_hand(agnostic, decoded):
    extra = {"reg_decoded_bbox": True, "loss_bbox": {"type": "GIoULoss", "loss_weight": 1.0}} if decoded else {}
    head = make("faster_rcnn", True, (1.3, 1.5), reg_class_agnostic=agnostic, **extra).roi_head.bbox_head
    generator = torch.Generator().manual_seed(2)
    count = 30
    corner = 30 * torch.rand(count, 2, generator=generator)
    rois = torch.cat([torch.zeros(count, 1), corner, corner + 12 + 15 * torch.rand(count, 2, generator=generator)], 1)
    labels = torch.randint(0, CLASSES + 1, (count,), generator=generator)
    label_weights = (torch.rand(count, generator=generator) > 0.2).float()
    positive = labels < CLASSES
    deltas = torch.randn(count, 4, generator=generator)
    goals = head.bbox_coder.decode(rois[:, 1:], deltas)
    targets = torch.where(positive[:, None], goals if decoded else deltas, 0.0)
    weights = positive[:, None].float().repeat(1, 4)
    scores = torch.randn(count, CLASSES + 1, generator=generator, requires_grad=True)
    preds = torch.randn(count, 4 * (1 if agnostic else CLASSES), generator=generator, requires_grad=True)
    got = head.loss(scores, preds, rois, labels, label_weights, targets, weights)
    assert set(got) == {"loss_cls", "acc", "loss_bbox"}
    own = torch.arange(count)[positive]
    start = torch.zeros(len(own), dtype=torch.long) if agnostic else 4 * labels[positive]
    pred = torch.stack([preds[own, start + j] for j in range(4)], 1)
    boxes = head.bbox_coder.decode(rois[own, 1:], pred)
    iou = bbox_overlaps(boxes.detach(), goals[own], is_aligned=True).double()
    plain = -scores.double().log_softmax(1).gather(1, labels[:, None])[:, 0] * label_weights
    power = iou**1.3
    scale = (plain[own].sum() / (power * plain[own]).sum()).detach()
    cls = (plain[~positive].sum() + (scale * power * plain[own]).sum()) / float(label_weights.sum())
    if decoded:
        box = MODELS.build({"type": "GIoULoss"})(boxes, goals[own], weights[own], avg_factor=count)
    else:
        box = 2.4 * smooth_l1_by_hand(pred.double(), deltas[own].double(), iou, 1.0, 1.5, weights[own], count)
    compare((got["loss_cls"], got["loss_bbox"]), (cls, box), [scores, preds])
    nothing = torch.full_like(labels, CLASSES)
    without = head.loss(scores, preds, rois, nothing, label_weights, torch.zeros_like(targets), torch.zeros(count, 4))
    assert without["loss_cls"] > 0 and without["loss_bbox"] == 0


def test_gfl_head_as_it_is():
    """mmdet's own GFLHead passes (labels, iou): its classification loss with this package's, and by the functions."""
    torch.manual_seed(0)
    options = {"use_sigmoid": True, "beta": 2.0, "loss_weight": 1.0}
    train = {"assigner": {"type": "ATSSAssigner", "topk": 9}, "allowed_border": -1, "pos_weight": -1, "debug": False}
    generator = {**anchors([8, 16, 32]), "octave_base_scale": 4, "ratios": [1.0]}
    head = MODELS.build(
        ConfigDict(
            type="GFLHead",
            num_classes=CLASSES,
            in_channels=16,
            feat_channels=16,
            stacked_convs=1,
            norm_cfg=None,
            anchor_generator=generator,
            loss_cls={"type": "IoUBalancedFocalLoss", "eta": 1.5, **options},
            loss_dfl={"type": "DistributionFocalLoss", "loss_weight": 0.25},
            loss_bbox={"type": "GIoULoss", "loss_weight": 2.0},
            reg_max=8,
            train_cfg=train,
        )
    )
    features = [torch.randn(3, 16, size, size) for size in (8, 4, 2)]
    instances, metas, ignored = ground_truth(empty=True)
    calls = []
    head.loss_cls.register_forward_hook(
        lambda module, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True
    )
    losses = head.loss_by_feat(*head(features), instances, metas, ignored)
    sum(sum(part) for part in losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters() if p.grad is not None)
    assert head.gfl_cls.weight.grad.abs().max() > 0
    with_iou = 0
    for (scores, (labels, iou)), keywords, out in calls:
        with_iou += int(((labels < CLASSES) & (iou > 0)).sum())
        own = torch.where(labels == CLASSES, -1, labels)
        want = ik.iou_balanced_sigmoid_focal_loss(
            scores, own, iou, weight=keywords["weight"], avg_factor=keywords["avg_factor"], backend="reference"
        )
        assert_close(out, want, rtol=1e-5, atol=0.0)
    assert with_iou > 0


# ------------------------------------------------------------------------------------------------ configs, errors


def test_defaults_are_the_balanced_losses():
    """A config that names the head only: use_sigmoid, the coder and its stds are filled in."""
    made = {}
    for family, place in (("retinanet", "bbox_head"), ("fovea", "bbox_head"), ("ssd", "bbox_head")):
        cfg = config(family, True)
        for name in ("loss_cls", "loss_bbox"):
            del cfg[place][name]
        made[family] = MODELS.build(ConfigDict(cfg)).bbox_head
    assert made["retinanet"].cls_out_channels == CLASSES and made["ssd"].cls_out_channels == CLASSES + 1
    assert made["retinanet"].loss_bbox.box_coder == "delta" and made["fovea"].loss_bbox.box_coder == "fovea"
    assert made["ssd"].loss_bbox.target_stds == STDS
    cfg = config("retinanet", True, reg_decoded_bbox=True)
    assert MODELS.build(ConfigDict(cfg)).bbox_head.loss_bbox.box_coder == "boxes"
    box = MODELS.build(ConfigDict(config("faster_rcnn", True))).roi_head.bbox_head
    assert box.loss_bbox.target_stds == STDS and box.loss_cls.eta == 1.5
    cfg = config("ssd", True)
    del cfg["bbox_head"]["loss_bbox"]
    cfg["train_cfg"]["smoothl1_beta"] = 0.7  # SSDHead's own place for it
    assert MODELS.build(ConfigDict(cfg)).bbox_head.loss_bbox.beta == 0.7


def test_means_of_the_centre_do_not_matter():
    """They shift both boxes alike: the IoU is that of the deltas still."""
    shifted = {**coder(), "target_means": (0.1, -0.2, 0.0, 0.0)}
    head = MODELS.build(ConfigDict(config("retinanet", True, bbox_coder=shifted))).bbox_head
    assert head.loss_bbox.box_coder == "delta"


STOCK_FOCAL = {"type": "FocalLoss", **FOCAL}


@pytest.mark.parametrize(
    ("family", "head", "error", "message"),
    [
        ("retinanet", {"loss_cls": STOCK_FOCAL}, TypeError, "loss_cls must be a loss with target=.labels, iou."),
        ("fovea", {"loss_cls": STOCK_FOCAL}, TypeError, "IoUBalancedFoveaHead: loss_cls must be a loss with"),
        ("ssd", {"loss_cls": {"type": "IoUBalancedFocalLoss"}}, TypeError, "must be IoUBalancedCrossEntropyLoss"),
        (
            "retinanet",
            {"loss_bbox": {"type": "IoUBalancedSmoothL1Loss", "target_stds": STDS}},
            ValueError,
            "target_stds must be .1.0, 1.0, 1.0, 1.0. as in the head, or left out, got .0.1",
        ),
        (
            "retinanet",
            {"bbox_coder": {**coder(), "target_means": (0.0, 0.0, 0.1, 0.0)}},
            ValueError,
            "target_means of dw and dh must be 0",
        ),
        ("retinanet", {"bbox_coder": {"type": "TBLRBBoxCoder"}}, ValueError, "must be a DeltaXYWHBBoxCoder"),
        ("faster_rcnn", {"with_reg": False}, ValueError, "with_reg must be True"),
    ],
)
def test_configs_that_do_not_fit(family, head, error, message):
    with pytest.raises(error, match=message):
        MODELS.build(ConfigDict(config(family, True, **head)))


def test_any_coder_has_an_iou():
    """TBLR distances with a stock box loss: the IoU comes from the coder's own decoding."""
    coder = {"type": "TBLRBBoxCoder", "normalizer": 2.0}
    head = make("retinanet", True, bbox_coder=coder, loss_bbox={"type": "SmoothL1Loss"}).bbox_head
    scores, preds = outputs(head, [8, 4, 2], 3, CLASSES, box_scale=0.1)
    instances, metas, _ = ground_truth()
    with torch.no_grad():
        for level in preds:
            level.add_(0.5)
    got = head.loss_by_feat(scores, preds, instances, metas)
    assert all(torch.isfinite(g).all() for g in gradients((got["loss_cls"], got["loss_bbox"]), [*scores, *preds]))


@pytest.mark.slow
def test_custom_imports_in_a_config_file(tmp_path):
    """What a user writes: the config file registers everything by itself, in a fresh interpreter."""
    path = tmp_path / "config.py"
    path.write_text(
        "custom_imports = dict(imports=['ioubal_kernels.integrations.mmdet'], allow_failed_imports=False)\n"
        f"model = {config('retinanet', True)!r}\n"
    )
    assert Config.fromfile(path).model.bbox_head.type == "IoUBalancedRetinaHead"
    program = (
        "import sys\n"
        f"sys.path.insert(0, {str(mmdet_env.__file__.rsplit('/', 1)[0])!r})\n"
        "import mmdet_env; mmdet_env.load()\n"
        "from mmengine.config import Config\n"
        "from mmdet.registry import MODELS\n"
        "assert 'IoUBalancedRetinaHead' not in MODELS.module_dict\n"
        f"cfg = Config.fromfile({str(path)!r})\n"
        "print(type(MODELS.build(cfg.model).bbox_head.loss_cls).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "IoUBalancedFocalLoss"


def test_everything_is_registered_under_its_name():
    for name in integration.__all__:
        if name.endswith("Mixin"):
            continue
        assert MODELS.get(name) is getattr(integration, name)
    assert importlib.import_module("ioubal_kernels").integrations.mmdet is integration


def test_prediction_is_untouched():
    """The same boxes from the stock and the balanced detector."""
    inputs, samples = batch(empty=False)
    found = []
    for balanced in (False, True):
        model = make("retinanet", balanced).eval()
        with torch.no_grad():
            found.append([sample.pred_instances for sample in model.predict(inputs, samples)])
    for stock, ours in zip(*found, strict=True):
        assert len(stock) > 0 and torch.equal(stock.bboxes, ours.bboxes) and torch.equal(stock.scores, ours.scores)
    assert found[0][0].bboxes.max() <= SIZE
