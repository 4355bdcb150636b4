"""What else computes such a loss on a GPU. A peer that is not installed has a row that says so.

None of the libraries' losses is IoU-balanced, knows ignored anchors or the box loss: their rows say what they compute.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ioubal_kernels as ik
from ioubal_kernels import testing

Step = Callable[[], list[Tensor]]


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


@dataclass(frozen=True)
class Peer:
    """A competitor. make(heads) gives a step: [loss, *gradients]. graph: whether a CUDA graph can hold it."""

    name: str
    computes: str
    make: Callable[[testing.DetectionInputs], Step]
    graph: bool
    package: str | None = None
    balanced: bool = False  # the same loss as ours, so its value is compared before it is timed
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    batches: tuple[int, ...] = (16,)

    def absent(self) -> bool:
        if self.package is None:
            return False
        try:
            return importlib.util.find_spec(self.package) is None
        except ImportError:  # of a parent package
            return True


def both_losses(function: Callable[..., tuple[Tensor, Tensor]], heads: testing.DetectionInputs) -> Step:
    def step() -> list[Tensor]:
        cls, loc = function(*heads.arguments())
        return [(cls + loc).detach(), *torch.autograd.grad(cls + loc, heads.heads())]

    return step


def classification(function: Callable[[Tensor], Tensor], heads: testing.DetectionInputs) -> Step:
    def step() -> list[Tensor]:
        loss = function(heads.cls_logits)
        return [loss.detach(), *torch.autograd.grad(loss, heads.cls_logits)]

    return step


def labels_of(heads: testing.DetectionInputs) -> Tensor:
    """Class of every anchor, -1 background, -2 ignored, (N, R)."""
    padded = heads if isinstance(heads.gt_labels, Tensor) else heads.padded()
    at = heads.matched_idxs.clamp(min=0).long()
    return torch.where(heads.matched_idxs >= 0, padded.gt_labels.long().gather(1, at), heads.matched_idxs.long())


def one_hot(heads: testing.DetectionInputs) -> Tensor:
    """Dense targets in the logits' dtype."""
    labels = labels_of(heads)
    target = torch.zeros_like(heads.cls_logits)
    target.scatter_(2, labels.clamp(min=0)[..., None], (labels >= 0)[..., None].to(target.dtype))
    return target.detach()


def padded(heads: testing.DetectionInputs) -> testing.DetectionInputs:
    """The same leaves; boxes in one tensor, with ones instead of NaN where there is none."""
    out = heads.padded()
    return replace(out, gt_boxes=out.gt_boxes.nan_to_num(nan=1.0))


def make_eager(heads: testing.DetectionInputs) -> Step:
    from .. import eager

    return both_losses(eager.eager_loss, heads)


def make_authors(heads: testing.DetectionInputs) -> Step:
    from .. import eager

    labels = labels_of(heads)
    iou = torch.full(labels.shape, 0.7, device=labels.device)
    return classification(lambda x: eager.authors_style_loss(x, labels, iou), heads)


def make_compiled(heads: testing.DetectionInputs) -> Step:
    from .. import eager

    torch._dynamo.reset()
    return both_losses(torch.compile(eager.eager_loss), heads)


def make_static(heads: testing.DetectionInputs) -> Step:
    torch._dynamo.reset()
    return both_losses(torch.compile(static_loss, fullgraph=True), padded(heads))


def make_torchvision(heads: testing.DetectionInputs) -> Step:
    from torchvision.ops import sigmoid_focal_loss

    target = one_hot(heads)
    return classification(lambda x: sigmoid_focal_loss(x, target, reduction="sum"), heads)


def make_apex(heads: testing.DetectionInputs) -> Step:
    from apex.contrib.focal_loss.focal_loss import focal_loss

    labels = labels_of(heads)
    positives = (labels >= 0).sum().float()
    classes = heads.cls_logits.shape[-1]
    return classification(lambda x: focal_loss(x, labels, positives, classes, 0.25, 2.0), heads)


def make_mmcv(heads: testing.DetectionInputs) -> Step:
    from mmcv.ops import sigmoid_focal_loss

    classes = heads.cls_logits.shape[-1]
    labels = labels_of(heads).reshape(-1)
    labels = torch.where(labels < 0, classes, labels)  # its background is the class after the last
    call: Any = lambda x: sigmoid_focal_loss(x.reshape(-1, classes), labels, 2.0, 0.25, None, "sum")  # noqa: E731
    return classification(call, heads)


PLAIN = "plain focal loss, classification alone"
WHOLE = "both IoU-balanced losses"
PEERS = (
    Peer("torch.compile, static form", WHOLE, make_static, graph=True, balanced=True),
    Peer(
        "torchvision sigmoid_focal_loss",
        f"{PLAIN}, dense targets given",
        make_torchvision,
        graph=True,
        package="torchvision",
    ),
    Peer("eager PyTorch (README)", WHOLE, make_eager, graph=False, package="torchvision", balanced=True),
    Peer(
        "eager, authors' style",
        "IoU-balanced classification, the IoU given",
        make_authors,
        graph=False,
        package="torchvision",
    ),
    Peer(
        "apex focal_loss",
        PLAIN,
        make_apex,
        graph=False,
        package="apex.contrib.focal_loss",
        dtypes=(torch.float32, torch.float16),
    ),
    Peer(
        "mmcv sigmoid_focal_loss",
        PLAIN,
        make_mmcv,
        graph=False,
        package="mmcv.ops",
        dtypes=(torch.float32, torch.float16),
    ),
    # Its loop over the images is unrolled: at batch 16 compiling alone would take minutes.
    Peer(
        "torch.compile of eager (README)",
        WHOLE,
        make_compiled,
        graph=False,
        package="torchvision",
        balanced=True,
        batches=(1,),
    ),
)
