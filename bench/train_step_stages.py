"""The loss stages that `train_step` compares, from raw head maps to a loss, and their parity with float64."""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torchvision.models.detection.retinanet import RetinaNetHead

import ioubal_kernels as ik
from ioubal_kernels import testing
from ioubal_kernels.integrations.torchvision.observing import flatten_maps

from .eager import eager_loss
from .peers import torchvision_matches
from .train_step_case import Case, HeadMaps, Mark, Stage, Targets, leaves_of

PARITY_LOGITS = 1 << 26  # of these at most in the float64 oracle: half a gigabyte a tensor
EPS = 2.0**-24  # half an ulp of float32


@dataclass(frozen=True)
class LossStage:
    """A competitor. balanced: it computes our loss; else torchvision's, which the oracle then computes as well."""

    name: str
    computes: str
    matcher: str
    run: Stage
    balanced: bool


def fused(case: Case, maps: HeadMaps, targets: Targets, mark: Mark | None = None) -> Tensor:
    """The trainer's objective as it is. Its matching ends where it calls the fused loss."""
    outputs = {"cls_logits": maps.cls_logits, "bbox_regression": maps.bbox_deltas}
    anchors = [case.anchors(maps)] * len(targets[0])
    call = lambda: case.model.network.compute_loss(case.model.targets(*targets), outputs, anchors)  # noqa: E731
    if mark is None:
        out = call()
    else:
        original, calls = ik.iou_balanced_detection_loss, []

        def entered(*arguments, **options):
            mark("matching")
            calls.append(None)
            return original(*arguments, **options)

        with mock.patch.object(ik, "iou_balanced_detection_loss", entered):
            out = call()
        if len(calls) != 1:
            raise RuntimeError(
                f"the trainer's objective called ik.iou_balanced_detection_loss {len(calls)} times instead of once:"
                " where its matching ends is not known"
            )
    return out["classification"] + out["bbox_regression"]


def flat_maps(case: Case, maps: HeadMaps) -> tuple[Tensor, Tensor]:
    """Logits (N, R, K) and deltas (N, R, 4) in float32: the permute and cat that a loss on flat tensors needs. 16-bit
    maps are widened, as autocast does for these losses."""
    flat = flatten_maps(maps.cls_logits, case.spec.classes), flatten_maps(maps.bbox_deltas, 4)
    return flat[0].float(), flat[1].float()


def eager(case: Case, maps: HeadMaps, targets: Targets, mark: Mark | None = None) -> Tensor:
    """The README's eager form of our loss, after torchvision's matching."""
    anchors = case.anchors(maps)
    matched = torch.stack(torchvision_matches(anchors, targets[0]))
    if mark is not None:
        mark("matching")
    config = case.config.loss
    options = (config.eta, config.lambda_, float(config.w_loc), config.beta)
    cls, loc = eager_loss(*flat_maps(case, maps), anchors, matched, *targets, *options)
    return cls + loc


def torchvision_loss(case: Case, maps: HeadMaps, targets: Targets, mark: Mark | None = None) -> Tensor:
    """torchvision's RetinaNetHead.compute_loss on the same maps, after its matching."""
    anchors = case.anchors(maps)
    matched = torchvision_matches(anchors, targets[0])
    if mark is not None:
        mark("matching")
    logits, deltas = flat_maps(case, maps)
    head = RetinaNetHead(1, 1, case.spec.classes)  # its convolutions are not used, so they are small
    losses = head.compute_loss(
        [{"boxes": boxes, "labels": labels} for boxes, labels in zip(*targets, strict=True)],
        {"cls_logits": logits, "bbox_regression": deltas},
        [anchors] * len(matched),
        matched,
    )
    return losses["classification"] + losses["bbox_regression"]


TORCHVISION_MATCHER = "torchvision box_iou and Matcher, image by image"
STAGES = (
    LossStage("fused", "IoU-balanced focal and smooth L1, raw maps", "the trainer's own", fused, True),
    LossStage("eager", "IoU-balanced focal and smooth L1, README's form", TORCHVISION_MATCHER, eager, True),
    LossStage("torchvision", "another loss: plain focal and L1", TORCHVISION_MATCHER, torchvision_loss, False),
)


def oracle(case: Case, stage: LossStage, maps: HeadMaps, targets: Targets) -> Tensor:
    """The stage's loss in float64 by the reference backend. maps: float64 leaves."""
    anchors, (boxes, labels) = case.anchors(maps), targets
    matched = torch.stack(torchvision_matches(anchors, boxes))
    config = case.config.loss
    if stage.balanced:
        options = {"eta": config.eta, "lambda_": config.lambda_, "w_loc": float(config.w_loc), "beta": config.beta}
    else:  # L1 is smooth L1 without its smooth part; torchvision averages within each image, then over the images
        per_image = (matched >= 0).sum(1).clamp(min=1).double() * len(boxes)
        options = {"eta": 0.0, "lambda_": 0.0, "beta": 0.0, "avg_factor": per_image}
    out = ik.iou_balanced_detection_loss(
        flatten_maps(maps.cls_logits, case.spec.classes),
        flatten_maps(maps.bbox_deltas, 4),
        anchors.double(),
        matched,
        [b.double() for b in boxes],
        labels,
        backend="reference",
        **options,
    )
    return out.classification + out.localization


def box_rounding(anchors: Tensor) -> float:
    """What float32 in pixel coordinates may cost an eager loss, relative.

    A corner or centre of coordinate L is off by about 3 roundings of EPS * L, an edge of length e by twice that
    relative to e. The IoU has two edges in its intersection and about three in its union (30 EPS L / e), is raised to
    1.5 (45), and a delta's error is divided by beta = 1/9 in smooth L1's gradient (54): together 99 EPS L / e, plus the
    few roundings of the loss itself.
    """
    smallest = float((anchors[:, 2:] - anchors[:, :2]).min())
    return 99.0 * EPS * float(anchors.abs().max()) / smallest + 16.0 * EPS


def check_within(got: Tensor, want: Tensor, allowed: Tensor, what: str) -> None:
    """AssertionError unless every element of got is within `allowed` of the float64 `want`."""
    error = (got.detach().double() - want).abs()
    bad = ~(error <= allowed)  # true for NaN
    if bool(bad.any()):
        worst = int(torch.where(bad, error.nan_to_num(nan=float("inf")), -1.0).argmax())
        pair = f"got {got.reshape(-1)[worst].item()!r}, expected {want.reshape(-1)[worst].item()!r}"
        raise AssertionError(f"{what}: {int(bad.sum())} of {bad.numel()} elements are wrong; the worst: {pair}")


def at_the_kink(case: Case, maps: HeadMaps, targets: Targets, distance: float) -> Tensor:
    """Where (N, R, 4) a delta is so near its target that rounding may turn the sign which is L1's gradient."""
    anchors, boxes = case.anchors(maps), targets[0]
    deltas = flatten_maps(maps.bbox_deltas, 4).detach()
    near = torch.zeros_like(deltas, dtype=torch.bool)
    for n, matched in enumerate(torchvision_matches(anchors, boxes)):
        rows = (matched >= 0).nonzero()[:, 0]
        goal = ik.encode_boxes(boxes[n][matched[rows]].double(), anchors[rows].double())
        near[n, rows] = (deltas[n, rows] - goal).abs() <= distance
    return near


def flat_gradients(case: Case, leaves: HeadMaps) -> list[Tensor]:
    """Of the logits (N, R, K) and of the deltas (N, R, 4)."""
    widths = (case.spec.classes, 4)
    return [flatten_maps([leaf.grad for leaf in part], width) for part, width in zip(leaves, widths, strict=True)]


def check_parity(case: Case, stage: LossStage, maps: HeadMaps, targets: Targets) -> str:
    """Loss and gradients of every element of every map against the float64 oracle; says over how many images.

    Raises AssertionError for a stage that is wrong.
    """
    per_image = sum(level[0].numel() for level in maps.cls_logits)
    images = max(1, min(len(targets[0]), PARITY_LOGITS // per_image))
    targets = targets[0][:images], targets[1][:images]
    leaves = leaves_of(maps, images)
    loss = stage.run(case, leaves, targets, None)
    loss.backward()
    wide = HeadMaps(*([level.detach().double().requires_grad_() for level in part] for part in leaves))
    want = oracle(case, stage, wide, targets)
    want.backward()
    dtype = leaves.cls_logits[0].dtype
    got, exact = flat_gradients(case, leaves), flat_gradients(case, wide)
    if stage.name == "fused":  # the kernels hold a budget of their own, element by element
        testing.assert_close_budget(loss, want, torch.float32, "loss", what="loss")
        for name, one, other in zip(HeadMaps._fields, got, exact, strict=True):
            testing.assert_close_budget(one, other, dtype, what=f"gradient of {name}")
        return parity_text(images, case)
    boxes = box_rounding(case.anchors(leaves))
    stored = 2.0**-8 if dtype == torch.bfloat16 else 0.0  # a gradient is rounded to its map's dtype
    check_within(loss, want.detach(), boxes * want.detach().abs(), "loss")
    # torchvision forms a score as 1 - (1 - p), which costs EPS / p, squared.
    score = flatten_maps(wide.cls_logits, case.spec.classes).detach().sigmoid()
    check_within(got[0], exact[0], (boxes + stored + 4.0 * EPS / score) * exact[0].abs(), "gradient of cls_logits")
    # A delta's gradient is a difference: its error is relative to the largest.
    allowed = boxes * exact[1].abs().max() + stored * exact[1].abs()
    if not stage.balanced:
        allowed = torch.where(at_the_kink(case, wide, targets, boxes), float("inf"), allowed)
    check_within(got[1], exact[1], allowed, "gradient of bbox_deltas")
    return parity_text(images, case)


def parity_text(images: int, case: Case) -> str:
    return f"float64 oracle, loss and every gradient of {images} of {case.spec.batch} images"
