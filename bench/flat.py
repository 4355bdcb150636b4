"""Softmax cross entropy beside PyTorch's own, and what a small call costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import ioubal_kernels as ik
from ioubal_kernels import testing

from . import eager
from . import inputs as bench_inputs
from .clocks import sets_beyond_cache
from .peers import WHOLE, assert_norms
from .retinanet import Oracle, fused
from .work import BACKWARD, BOTH, FORWARD, INFERENCE, Bench, Contender, Problem, Work, short

SOFTMAX, PLAIN_SOFTMAX = "IoU-balanced cross entropy", "plain cross entropy"
DRY_ROWS = 300


@dataclass(frozen=True)
class Softmax:
    """Softmax cross entropy of (rows, columns)."""

    label: str
    rows: int
    columns: int
    dtype: torch.dtype
    peers: bool = True

    @property
    def name(self) -> str:
        return f"softmax/{self.label}/{self.rows}x{self.columns}/{short(self.dtype)}"


def balanced_cross_entropy(logits: Tensor, labels: Tensor, iou: Tensor, eta: float = 1.5) -> Tensor:
    """The IoU-balanced cross entropy in eager steps: what one writes, and what torch.compile is given."""
    loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
    positive = labels > 0
    weight = torch.where(positive, iou**eta, 1.0)
    plain = torch.where(positive, loss, 0.0).sum()
    weighted = torch.where(positive, weight * loss, 0.0).sum()
    normalizer = torch.where(weighted > 0, plain / weighted, 0.0).detach()
    return (torch.where(positive, normalizer * weight, 1.0) * loss).sum() / (labels >= 0).sum().clamp(min=1)


def draw_softmax(case: Softmax, rows: int, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels (25 % positive, 1 % ignored), IoUs."""
    g = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(rows, case.columns, generator=g, device=device).to(case.dtype)
    kind = torch.rand(rows, generator=g, device=device)
    chosen = torch.randint(1, case.columns, (rows,), generator=g, device=device)
    labels = torch.where(kind < 0.25, chosen, 0)
    labels = torch.where(kind > 0.99, -1, labels)
    return logits.requires_grad_(), labels, torch.rand(rows, generator=g, device=device)


def softmax(bench: Bench, case: Softmax) -> Problem:
    rows = DRY_ROWS if bench.small else case.rows
    size = rows * case.columns * torch.finfo(case.dtype).bits // 8
    sets = sets_beyond_cache(2 * size, bench.device)
    draws = [draw_softmax(case, rows, bench.device, seed) for seed in range(sets)]
    logits, labels, iou = draws[0]
    exact: dict[str, list[Tensor]] = {}
    # softmax - 1 cancels at the target: that entry is judged against the row's scale.
    target = F.one_hot(labels.clamp(min=0), case.columns)
    floor = testing.FLOOR + target.double() / (labels >= 0).sum()

    def oracle(loss: Callable[..., Tensor], name: str) -> list[Tensor]:
        if name not in exact:
            wide = logits.detach().double().requires_grad_()
            exact[name] = Work(lambda: [loss(wide, labels, iou.double())], [wide]).both()
        return exact[name]

    def check_ours(_: Work, results: list[Tensor]) -> None:
        want = oracle(partial(ik.iou_balanced_cross_entropy, backend="reference"), SOFTMAX)
        testing.assert_close_budget(results[0], want[0], torch.float32, "loss", what=case.name)
        testing.assert_close_budget(results[1], want[1], case.dtype, "gradient", floor, what=case.name)

    def plain(x: Tensor, labels: Tensor, _: Tensor) -> Tensor:
        return F.cross_entropy(x, labels, ignore_index=-1)

    def check_peer(name: str, loss: Callable[..., Tensor], results: list[Tensor]) -> None:
        assert_norms(results, oracle(loss, name), case.dtype, case.name)

    contenders = []
    for backend in bench.backends:
        loss = partial(ik.iou_balanced_cross_entropy, backend=backend)
        contenders.append(
            Contender(
                "fused",
                SOFTMAX,
                lambda i, loss=loss: Work(lambda: [loss(*draws[max(i, 0)])], [draws[max(i, 0)][0]]),
                check_ours,
                "every element at full size",
                (BOTH, INFERENCE, FORWARD, BACKWARD),
                {"backend": backend},
            )
        )

    def peer(name: str, computes: str, loss: Callable[..., Tensor], compiled: bool = False) -> Contender:
        call = torch.compile(loss, fullgraph=True, dynamic=False) if compiled else loss

        def make(i: int) -> Work:
            return Work(lambda: [call(*draws[max(i, 0)])], [draws[max(i, 0)][0]])

        return Contender(
            name,
            computes,
            make,
            lambda _, results: check_peer(computes, loss, results),
            "every entry, in norm",
            (BOTH, FORWARD, BACKWARD),
        )

    if case.peers and bench.peers:
        contenders += [
            peer("F.cross_entropy", PLAIN_SOFTMAX, plain),
            peer("eager PyTorch", SOFTMAX, balanced_cross_entropy),
            peer("torch.compile of eager", SOFTMAX, balanced_cross_entropy, compiled=True),
        ]
    facts = {
        "case": "softmax",
        "shape": case.label,
        "rows": rows,
        "classes": case.columns,
        "dtype": short(case.dtype),
    }
    moved = {BOTH: 2 * size + 12 * rows, INFERENCE: size + 12 * rows}
    return Problem(facts, contenders, rows * case.columns, case.dtype, sets, moved)


# ---------------------------------------------------------------------------------------------- small calls


def small_call(bench: Bench, layout: str) -> Problem:
    """About 100 anchors x 80 classes: what a call costs apart from its work."""
    levels = ((3, 3), (1, 2))
    found = bench_inputs.targets(1, levels, 1, bench.device, torch.int32, positive_share=0.05)
    flat = bench_inputs.with_logits(found, torch.float32, "flat", 1)
    heads = flat.in_layout(layout).requiring_grad()
    oracle = Oracle(flat)
    contenders = [
        Contender(
            "fused",
            WHOLE,
            lambda _, backend=backend: fused(heads, backend),
            lambda _, results: oracle.check(heads, results, "small call"),
            "every element at full size",
            (BOTH, INFERENCE),
            {"backend": backend},
        )
        for backend in bench.backends
    ]

    if layout == "flat":
        contenders.append(
            Contender(
                "eager PyTorch (README)",
                WHOLE,
                lambda _: Work(partial(eager.eager_loss, *heads.arguments()), heads.heads()),
                lambda _, results: assert_norms(results, oracle.ours(), torch.float32, "eager"),
                "every entry, in norm",
                graph=False,
                package="torchvision",
            )
        )
    nothing = torch.zeros(4, requires_grad=True)
    contenders.append(
        Contender(
            "x.sum().backward()",
            "nothing: the least that a forward and backward of autograd costs",
            lambda _: Work(lambda: [nothing.sum()], [nothing]),
            lambda _, results: torch.testing.assert_close(results[1].cpu(), torch.ones(4)),
            "every element at full size",
        )
    )
    rows = flat.matched_idxs.numel()
    facts = {
        "case": "small call",
        "batch": 1,
        "layout": layout,
        "dtype": "float32",
        "classes": bench_inputs.CLASSES,
        "anchors": rows,
    }
    return Problem(facts, contenders, rows * bench_inputs.CLASSES, torch.float32, 1, {}, calls=100)
