"""Equality with eager code written independently in the authors' style: one-hot targets, torchvision's and torch's
losses, boolean indexing, loops over scopes. Values and gradients, float64 and float32."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, sigmoid_focal_loss

import ioubal_kernels as ik
from ioubal_kernels import testing

F64 = torch.float64


def compare(got: torch.Tensor, want: torch.Tensor, got_inputs: list, want_inputs: list, dtype: torch.dtype) -> None:
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype is F64 else {"rtol": 2e-5, "atol": 1e-6}
    torch.testing.assert_close(got.to(F64), want.to(F64), **tolerance)
    g = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    for a, b in zip(
        torch.autograd.grad(got, got_inputs, g.to(got.dtype)),
        torch.autograd.grad(want, want_inputs, g.to(want.dtype)),
        strict=True,
    ):
        torch.testing.assert_close(a.to(F64), b.to(F64), **tolerance)


def eager_weights(plain: torch.Tensor, q: torch.Tensor, scope: torch.Tensor, eps: float = 0.0) -> torch.Tensor:
    """Eq. 4 scope by scope for positives' losses (P,) and IoU powers (P,)."""
    weights = torch.zeros_like(plain)
    for s in scope.unique().tolist():
        inside = scope == s
        denominator = (q[inside] * plain[inside]).sum() + eps
        weights[inside] = q[inside] * plain[inside].sum() / denominator
    return weights.detach()


def eager_sigmoid(x, labels, iou, eta, alpha, gamma, eps, weight, scope):
    keep = labels >= -1
    x, labels, iou, weight, scope = x[keep], labels[keep], iou[keep], weight[keep], scope[keep]
    target = F.one_hot(labels.clamp(min=0), x.shape[1]) * (labels >= 0)[:, None]
    loss = sigmoid_focal_loss(x, target.to(x.dtype), alpha=-1 if alpha is None else alpha, gamma=gamma)
    loss = loss * weight[:, None]
    positive = target.bool()
    rows = positive.any(1)
    w = torch.ones_like(loss)
    w[positive] = eager_weights(loss[positive].detach(), iou[rows].clamp(0, 1) ** eta, scope[rows], eps)
    return (loss * w).sum(), int(rows.sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("eta", "alpha", "gamma", "scoped"),
    list(itertools.product((0.0, 1.5), (None, 0.25), (0.0, 1.0, 1.5, 2.0), (False, True))),
)
def test_sigmoid(eta: float, alpha: float, gamma: float, scoped: bool, dtype: torch.dtype, backend: str) -> None:
    c = testing.classification_inputs(11, 60, 6, dtype=dtype)
    x, y = c.logits.clone().requires_grad_(), c.logits.clone().requires_grad_()
    scope = {"scope_ids": c.scope_ids, "num_scopes": 3, "eps": 0.01} if scoped else {}
    got = ik.iou_balanced_sigmoid_focal_loss(
        x, c.labels, c.iou, eta=eta, alpha=alpha, gamma=gamma, weight=c.weight, backend=backend, **scope
    )
    ids = c.scope_ids if scoped else torch.zeros_like(c.labels)
    want, count = eager_sigmoid(y, c.labels, c.iou, eta, alpha, gamma, scope.get("eps", 0.0), c.weight, ids)
    compare(got, want / max(count, 1), [x], [y], dtype)


def test_eta_zero_is_torchvisions_focal_loss(backend: str) -> None:
    c = testing.classification_inputs(12, (4, 30), 6, ignored_share=0.0, dtype=F64)
    target = F.one_hot(c.labels.clamp(min=0), 6) * (c.labels >= 0)[..., None]
    x, y = c.logits.clone().requires_grad_(), c.logits.clone().requires_grad_()
    got = ik.iou_balanced_sigmoid_focal_loss(x, c.labels, c.iou, eta=0.0, reduction="none", backend=backend)
    compare(got, sigmoid_focal_loss(y, target.to(F64)), [x], [y], F64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("eta", "background"), list(itertools.product((0.0, 1.0, 1.5), (0, 3, None))))
def test_softmax(eta: float, background: int | None, dtype: torch.dtype, backend: str) -> None:
    c = testing.classification_inputs(13, 50, 5, softmax=True, dtype=dtype)
    x, y = c.logits.clone().requires_grad_(), c.logits.clone().requires_grad_()
    got = ik.iou_balanced_cross_entropy(
        x, c.labels, c.iou, eta=eta, background_index=background, weight=c.weight, backend=backend
    )
    keep = c.labels >= 0
    loss = F.cross_entropy(y[keep], c.labels[keep], reduction="none") * c.weight[keep]
    positive = c.labels[keep] != (-1 if background is None else background)
    w = torch.ones_like(loss)
    q = c.iou[keep][positive] ** eta
    w[positive] = eager_weights(loss[positive].detach(), q, torch.zeros(len(q)))
    compare(got, (loss * w).sum() / keep.sum(), [x], [y], dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("lambda_", "beta", "normalize", "given"),
    list(itertools.product((0.0, 1.5), (0.0, 1 / 9, 1.0), (False, True), (False, True))),
)
def test_smooth_l1(lambda_: float, beta: float, normalize: bool, given: bool, dtype: torch.dtype, backend: str) -> None:
    pred, target = testing.delta_inputs(14, 40, dtype=dtype)
    x, y = pred.clone().requires_grad_(), pred.clone().requires_grad_()
    anchor = torch.tensor([[10.0, 20.0, 50.0, 90.0]], dtype=F64).expand(40, 4)
    coder = BoxCoder((2.0, 2.0, 4.0, 4.0))
    boxes = [coder.decode_single(d.detach().to(F64), anchor) for d in (pred, target)]
    iou = torch.rand(40, generator=torch.Generator().manual_seed(2)) if given else box_iou(*boxes).diagonal()
    got = ik.iou_balanced_smooth_l1_loss(
        x,
        target,
        iou.to(dtype) if given else None,
        lambda_=lambda_,
        beta=beta,
        normalize=normalize,
        w_loc=2.5,
        box_weights=(2.0, 2.0, 4.0, 4.0),
        backend=backend,
    )
    loss = F.smooth_l1_loss(y, target, beta=beta, reduction="none").sum(1)
    w = iou.to(F64) ** lambda_
    if normalize:
        w = eager_weights(loss.detach().to(F64), w, torch.zeros(40))
    compare(got, (2.5 * w * loss).sum() / 40, [x], [y], dtype)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("scope", ["batch", "level", "image"])
@pytest.mark.parametrize("gt", ["list", "padded"])
@pytest.mark.parametrize("shared", [True, False])
def test_detection(layout: str, scope: str, gt: str, shared: bool, backend: str) -> None:
    """RetinaNet's training step on torchvision's parts; per-image divisors as the authors' SSD has them for scope
    image.
    """
    d = testing.detection_inputs(15, 3, 4, gt="list", shared_anchors=shared, dtype=F64)
    options = {"w_loc": 3.0, "eps": 1e-6, "box_weights": (10.0, 10.0, 5.0, 5.0)}
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    logits, deltas = d.cls_logits.clone().requires_grad_(), d.bbox_deltas.clone().requires_grad_()
    levels = torch.cat([torch.full((size,), i) for i, size in enumerate(d.level_sizes)])
    classification, localization, ious, losses, scopes = 0, [], [], [], []
    divisor = torch.tensor([max(int((m >= 0).sum()), 1) for m in d.matched_idxs], dtype=F64)
    for n in range(3):
        m = d.matched_idxs[n]
        positive = m >= 0
        anchors = d.anchors if shared else d.anchors[n]
        gt_boxes = d.gt_boxes[n][m[positive]]
        target = coder.encode_single(gt_boxes, anchors[positive])
        decoded = coder.decode_single(deltas[n][positive], anchors[positive])
        iou = box_iou(decoded, gt_boxes).diagonal().detach()
        one_hot = torch.zeros_like(logits[n])
        one_hot[positive] = F.one_hot(d.gt_labels[n][m[positive]], 4).to(F64)
        focal = sigmoid_focal_loss(logits[n], one_hot, reduction="none")
        is_positive = one_hot.bool()
        classification = classification + (focal * (~is_positive & (m != -2)[:, None])).sum() / divisor[n]
        losses.append(focal[is_positive] / 1.0)
        ious.append(iou)
        scopes.append({"batch": levels * 0, "level": levels, "image": levels * 0 + n}[scope][positive])
        l1 = F.smooth_l1_loss(deltas[n][positive], target, beta=1 / 9, reduction="none").sum(1)
        localization.append((3.0 * iou**1.5 * l1).sum() / divisor[n])
    plain, iou = torch.cat(losses), torch.cat(ious)
    w = eager_weights(plain.detach(), iou**1.5, torch.cat(scopes), 1e-6)
    per_positive = torch.repeat_interleave(divisor, torch.tensor([len(i) for i in ious]))
    classification = classification + (w * plain / per_positive).sum()

    e = d.in_layout(layout)
    e = (e.padded() if gt == "padded" else e).requiring_grad()
    got = ik.iou_balanced_detection_loss(
        *e.arguments(),
        normalizer_scope=scope,
        anchors_per_level=d.level_sizes,
        avg_factor=divisor,
        backend=backend,
        **options,
    )
    torch.testing.assert_close(got.classification, classification)
    torch.testing.assert_close(got.localization, sum(localization))
    assert got.num_positives.item() == len(iou)
    torch.testing.assert_close(got.mean_iou, iou.mean().float())
    (got.classification * 2 + got.localization).backward()
    (classification * 2 + sum(localization)).backward()
    for h, want in zip(e.heads(), wanted_grads(d, logits.grad, deltas.grad, layout), strict=True):
        torch.testing.assert_close(h.grad, want, rtol=1e-9, atol=1e-12)


def wanted_grads(d: testing.DetectionInputs, logits: torch.Tensor, deltas: torch.Tensor, layout: str) -> list:
    if layout == "flat":
        return [logits, deltas]
    return [m for t in (logits, deltas) for m in testing.to_levels(t, d.levels, d.per_location, layout)]
