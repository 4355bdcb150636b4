"""What else computes such a loss. A peer that is not installed has a row that says so.

None of the libraries' losses is IoU-balanced or knows ignored anchors: their rows say what they compute. Each is held
against the float64 oracle of what it computes, value and gradient, before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ioubal_kernels as ik
from ioubal_kernels import testing

from . import eager
from .work import BACKWARD, BOTH, FORWARD, Work


def static_loss(
    logits: Tensor, deltas: Tensor, anchors: Tensor, matched: Tensor, gt_boxes: Tensor, gt_labels: Tensor,
    eta: float = 1.5, lambda_: float = 1.5, beta: float = 1 / 9,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss in static shapes, the form that torch.compile makes most of: every entry as a negative in one pass, the
    positives corrected by a gather. gt boxes and labels padded; float32 inside."""
    pos, counted = matched >= 0, matched != ik.IGNORE
    at = matched.clamp(min=0).long()
    label = gt_labels.long().gather(1, at).clamp(min=0)
    box = gt_boxes.gather(1, at[..., None].expand(-1, -1, 4))
    box = torch.where(pos[..., None], box, anchors)
    d = torch.where(pos[..., None], deltas.float(), 0.0)
    wa, ha = anchors[..., 2] - anchors[..., 0], anchors[..., 3] - anchors[..., 1]
    xa, ya = anchors[..., 0] + wa / 2, anchors[..., 1] + ha / 2
    bw, bh = box[..., 2] - box[..., 0], box[..., 3] - box[..., 1]
    goal = torch.stack(
        [(box[..., 0] + bw / 2 - xa) / wa, (box[..., 1] + bh / 2 - ya) / ha, (bw / wa).log(), (bh / ha).log()], -1
    )
    with torch.no_grad():
        px, py = d[..., 0] * wa + xa, d[..., 1] * ha + ya
        pw, ph = d[..., 2].clamp(max=4.135).exp() * wa, d[..., 3].clamp(max=4.135).exp() * ha
        width = torch.minimum(px + pw / 2, box[..., 2]) - torch.maximum(px - pw / 2, box[..., 0])
        height = torch.minimum(py + ph / 2, box[..., 3]) - torch.maximum(py - ph / 2, box[..., 1])
        inter = width.clamp(min=0) * height.clamp(min=0)
        iou = torch.where(pos, inter / (pw * ph + bw * bh - inter), 0.0)
    x = logits.float()
    dense = 0.75 * x.sigmoid() ** 2 * F.softplus(x) * counted[..., None]
    z = x.gather(2, label[..., None])[..., 0]
    plain = torch.where(pos, 0.25 * (1 - z.sigmoid()) ** 2 * F.softplus(-z), 0.0)
    wrong = torch.where(pos, 0.75 * z.sigmoid() ** 2 * F.softplus(z), 0.0)
    weighted = (iou**eta * plain).sum()
    weight = torch.where(weighted > 0, plain.sum() / weighted, 0.0).detach()
    count = pos.sum().clamp(min=1)
    loc = (iou**lambda_ * F.smooth_l1_loss(d, goal, beta=beta, reduction="none").sum(-1) * pos).sum()
    return (dense.sum() - wrong.sum() + weight * weighted) / count, loc / count


PLAIN, PLAIN_HEADS = "plain focal loss, classification alone", "plain focal and L1 loss, per image"
WHOLE, BALANCED = "both IoU-balanced losses", "IoU-balanced classification, the IoU given"
# Relative error in norm. 16-bit arithmetic in eager steps is that coarse; another loss is further off.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
MOST_BOXES = 64
ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Peer:
    """A competitor on flat or NCHW heads. make(heads) gives its work; `batches` None: at any batch."""

    name: str
    computes: str
    make: Callable[[testing.DetectionInputs], Work]
    graph: bool = False  # whether a CUDA graph can hold it
    package: str | None = None
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES
    layouts: tuple[str, ...] = ("flat",)
    batches: tuple[int, ...] | None = None
    phases: tuple[str, ...] = (BOTH, FORWARD, BACKWARD)


def labels_of(heads: testing.DetectionInputs) -> Tensor:
    """Class of every anchor, -1 background, -2 ignored, (N, R)."""
    padded = heads if isinstance(heads.gt_labels, Tensor) else heads.padded()
    at = heads.matched_idxs.clamp(min=0).long()
    return torch.where(heads.matched_idxs >= 0, padded.gt_labels.long().gather(1, at), heads.matched_idxs.long())


def given_iou(heads: testing.DetectionInputs) -> Tensor:
    """An IoU in [0, 1) for every anchor, (N, R), for the losses that are given one."""
    shape, device = heads.matched_idxs.shape, heads.matched_idxs.device
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)).to(device)


def one_hot(heads: testing.DetectionInputs) -> Tensor:
    """Dense targets in the logits' dtype."""
    labels = labels_of(heads)
    target = torch.zeros_like(heads.cls_logits)
    target.scatter_(2, labels.clamp(min=0)[..., None], (labels >= 0)[..., None].to(target.dtype))
    return target.detach()


def padded(heads: testing.DetectionInputs) -> testing.DetectionInputs:
    """The same leaves; boxes in one tensor of MOST_BOXES places, with ones instead of NaN where there is none.

    Every set of inputs has the same shapes then: others would be compiled again.
    """
    out = heads.padded(MOST_BOXES - max(len(boxes) for boxes in heads.gt_boxes))
    return replace(out, gt_boxes=out.gt_boxes.nan_to_num(nan=1.0))


def flattened(heads: testing.DetectionInputs) -> testing.DetectionInputs:
    """Level maps as flat tensors that autograd knows: the permute and the cat that a flat loss needs."""
    if isinstance(heads.cls_logits, Tensor):
        return heads
    flat = lambda maps: testing.from_levels(maps, heads.per_location)  # noqa: E731
    return replace(heads, cls_logits=flat(heads.cls_logits), bbox_deltas=flat(heads.bbox_deltas))


def torchvision_matches(anchors: Tensor, gt_boxes: Sequence[Tensor]) -> list[Tensor]:
    """torchvision's matching, image by image, as its RetinaNet does it: N int64 tensors (R,)."""
    from torchvision.models.detection._utils import Matcher
    from torchvision.ops import box_iou

    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
    background = torch.full(anchors.shape[:1], ik.BACKGROUND, dtype=torch.int64, device=anchors.device)
    return [matcher(box_iou(boxes, anchors)) if len(boxes) else background for boxes in gt_boxes]


# ---------------------------------------------------------------------------------------------- both losses


def make_eager(heads: testing.DetectionInputs) -> Work:
    return Work(lambda: eager.eager_loss(*flattened(heads).arguments()), heads.heads())


# One compiled function for all sets of inputs; `torch._dynamo.reset()`, a case's first step, forgets the last case's.
compiled_eager = torch.compile(eager.eager_loss)
compiled_static = torch.compile(static_loss, fullgraph=True, dynamic=False)


def make_compiled(heads: testing.DetectionInputs) -> Work:
    return Work(lambda: compiled_eager(*flattened(heads).arguments()), heads.heads())


def make_static(heads: testing.DetectionInputs) -> Work:
    whole = padded(heads)
    return Work(lambda: compiled_static(*flattened(whole).arguments()), heads.heads())


def make_heads(heads: testing.DetectionInputs) -> Work:
    """torchvision's RetinaNet heads: their losses of the matcher's result."""
    from torchvision.models.detection import retinanet

    anchors, matched = heads.anchors, list(heads.matched_idxs.long())
    targets = [{"boxes": b, "labels": t} for b, t in zip(heads.gt_boxes, heads.gt_labels, strict=True)]
    channels = heads.per_location
    classes = flattened(heads).cls_logits.shape[-1]
    classification = retinanet.RetinaNetClassificationHead(8, channels, classes)
    regression = retinanet.RetinaNetRegressionHead(8, channels)

    def losses() -> list[Tensor]:
        flat = flattened(heads)
        outputs = {"cls_logits": flat.cls_logits, "bbox_regression": flat.bbox_deltas}
        return [
            classification.compute_loss(targets, outputs, matched),
            regression.compute_loss(targets, outputs, [anchors] * len(matched), matched),
        ]

    return Work(losses, heads.heads())


# ---------------------------------------------------------------------------------------------- classification


def make_authors(heads: testing.DetectionInputs) -> Work:
    labels, iou = labels_of(heads), given_iou(heads)
    return Work(lambda: [eager.authors_style_loss(heads.cls_logits, labels, iou)], [heads.cls_logits])


def make_torchvision(heads: testing.DetectionInputs) -> Work:
    from torchvision.ops import sigmoid_focal_loss

    target = one_hot(heads)
    return Work(lambda: [sigmoid_focal_loss(heads.cls_logits, target, reduction="sum")], [heads.cls_logits])


def make_apex(heads: testing.DetectionInputs) -> Work:
    from apex.contrib.focal_loss.focal_loss import focal_loss

    labels = labels_of(heads).clamp(min=-1)
    classes, one = heads.cls_logits.shape[-1], torch.ones((), device=labels.device)
    return Work(lambda: [focal_loss(heads.cls_logits, labels, one, classes, 0.25, 2.0)], [heads.cls_logits])


def make_mmcv(heads: testing.DetectionInputs) -> Work:
    from mmcv.ops import sigmoid_focal_loss

    classes = heads.cls_logits.shape[-1]
    labels = labels_of(heads).reshape(-1)
    labels = torch.where(labels < 0, classes, labels)  # its background is the class after the last
    loss: Any = lambda: sigmoid_focal_loss(heads.cls_logits.reshape(-1, classes), labels, 2.0, 0.25, None, "sum")  # noqa: E731
    return Work(lambda: [loss()], [heads.cls_logits])


# ---------------------------------------------------------------------------------------------- oracles


def oracle_work(peer: Peer, flat: testing.DetectionInputs) -> Work:
    """In float64 and by the reference: what the peer computes of flat heads."""
    wide = flat.double().requiring_grad()
    logits, labels = wide.cls_logits, labels_of(flat)
    plain = {"eta": 0.0, "reduction": "sum", "backend": "reference"}
    unused = torch.ones(labels.shape, dtype=torch.float64, device=labels.device)
    if peer.computes == WHOLE:
        return Work(lambda: ik.iou_balanced_detection_loss(*wide.arguments(), backend="reference")[:2], wide.heads())
    if peer.computes == BALANCED:
        iou = given_iou(flat).double()
        loss = ik.iou_balanced_sigmoid_focal_loss
        return Work(lambda: [loss(logits, labels, iou, eps=1e-6, backend="reference")], [logits])
    if peer.computes == PLAIN:  # ignored anchors are background to it
        known = labels.clamp(min=-1)
        return Work(lambda: [ik.iou_balanced_sigmoid_focal_loss(logits, known, unused, **plain)], [logits])
    assert peer.computes == PLAIN_HEADS, f"no oracle for {peer.computes!r}"

    def per_image() -> list[Tensor]:
        cls = loc = torch.zeros((), dtype=torch.float64, device=logits.device)
        for i, found in enumerate(labels):
            at = (found >= 0).nonzero()[:, 0]
            count = max(len(at), 1) * len(labels)
            cls = cls + ik.iou_balanced_sigmoid_focal_loss(logits[i], found, unused[i], **plain) / count
            box = wide.gt_boxes[i][wide.matched_idxs[i, at].long()]
            goal = ik.encode_boxes(box, wide.anchors[at])
            loc = loc + (wide.bbox_deltas[i, at] - goal).abs().sum() / count
        return [cls, loc]

    return Work(per_image, wide.heads())


def assert_norms(got: Sequence[Tensor], want: Sequence[Tensor], dtype: torch.dtype, what: str) -> None:
    """Raises AssertionError unless each tensor is near the float64 one in norm, as the dtype allows."""
    for i, (value, exact) in enumerate(zip(got, want, strict=True)):
        error, size = float((value.double() - exact).norm()), float(exact.norm())
        near = error <= TOLERANCE[dtype] * size
        assert near, f"{what}: result {i} is off by {error / max(size, 1e-300):.3g} in norm"


def assert_near(
    got: Sequence[Tensor], want: Sequence[Tensor], losses: int, dtype: torch.dtype, positives: Tensor, what: str
) -> None:
    """Raises AssertionError unless the losses' sum and the gradients (flat, the logits' first) are near in norm: all
    entries together, and those of the positive anchors on their own, whose share of the whole may be small."""

    def judged(results: Sequence[Tensor]) -> list[Tensor]:
        grads = results[losses:]
        return [sum(results[:losses]), *grads, *(grad[positives] for grad in grads)]

    assert_norms(judged(got), judged(want), dtype, what)


# ---------------------------------------------------------------------------------------------- all of them

TORCHVISION = "torchvision"
PEERS = (
    Peer("torch.compile, static form", WHOLE, make_static, graph=True, batches=(1, 16), layouts=("flat", "nchw")),
    Peer("torchvision heads", PLAIN_HEADS, make_heads, package=TORCHVISION, layouts=("flat", "nchw")),
    Peer("torchvision sigmoid_focal_loss", PLAIN, make_torchvision, graph=True, package=TORCHVISION),
    Peer("eager PyTorch (README)", WHOLE, make_eager, package=TORCHVISION, layouts=("flat", "nchw")),
    Peer("eager, authors' style", BALANCED, make_authors, package=TORCHVISION),
    Peer(
        "apex focal_loss",
        PLAIN,
        make_apex,
        package="apex.contrib.focal_loss",
        dtypes=(torch.float32, torch.float16),
    ),
    Peer("mmcv sigmoid_focal_loss", PLAIN, make_mmcv, package="mmcv.ops", dtypes=(torch.float32, torch.float16)),
    # Its loop over the images is unrolled: at batch 16 compiling alone would take minutes.
    Peer("torch.compile of eager (README)", WHOLE, make_compiled, package=TORCHVISION, batches=(1,)),
)


def peers_of(batch: int, layout: str, dtype: torch.dtype) -> list[Peer]:
    """The peers of a case, torch.compile's last: they take longest."""
    fitting = [
        peer
        for peer in PEERS
        if dtype in peer.dtypes and layout in peer.layouts and (peer.batches is None or batch in peer.batches)
    ]
    return sorted(fitting, key=lambda peer: "compile" in peer.name)
