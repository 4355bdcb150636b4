"""Smooth L1 and the box functions, beside what PyTorch and torchvision have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

import ioubal_kernels as ik
from ioubal_kernels import testing

from .clocks import sets_beyond_cache
from .flat import DRY_ROWS
from .peers import assert_norms
from .work import BOTH, INFERENCE, Bench, Contender, Problem, Work, short

FUNCTIONS = ("decode", "encode", "delta-iou")
Pair = Callable[[Tensor, Tensor], Tensor]


def smooth_l1(bench: Bench, rows: int, dtype: torch.dtype) -> Problem:
    rows = DRY_ROWS if bench.small else rows
    size = rows * 4 * torch.finfo(dtype).bits // 8
    sets = sets_beyond_cache(2 * size, bench.device)

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator(bench.device).manual_seed(seed)
        target = torch.randn(rows, 4, generator=g, device=bench.device) * 0.5
        pred = target + torch.randn(rows, 4, generator=g, device=bench.device) * 0.3
        return pred.to(dtype).requires_grad_(), target.to(dtype)

    draws = [draw(seed) for seed in range(sets)]

    def plain(x: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(x, target, beta=1 / 9, reduction="sum") / rows

    def contender(path: str, computes: str, loss: Any, oracle: Any, facts: dict[str, Any]) -> Contender:
        def check(_: Work, results: list[Tensor]) -> None:
            pred, target = draws[0]
            wide = pred.detach().double().requires_grad_()
            want = Work(lambda: [oracle(wide, target.double())], [wide]).both()
            if path != "fused":
                assert_norms(results, want, dtype, path)
                return
            testing.assert_close_budget(results[0], want[0], torch.float32, "loss", what=path)
            testing.assert_close_budget(results[1], want[1], dtype, what=path)

        make = lambda i: Work(lambda: [loss(*draws[max(i, 0)])], [draws[max(i, 0)][0]])  # noqa: E731
        return Contender(path, computes, make, check, "every element at full size", (BOTH,), facts)

    reference = partial(ik.iou_balanced_smooth_l1_loss, backend="reference")
    contenders = [
        contender(
            "fused",
            "IoU-balanced smooth L1, the IoU from the deltas",
            partial(ik.iou_balanced_smooth_l1_loss, backend=backend),
            reference,
            {"backend": backend},
        )
        for backend in bench.backends
    ]
    contenders.append(
        contender("reference backend", "IoU-balanced smooth L1", reference, reference, {"backend": "reference"})
    )
    contenders.append(contender("F.smooth_l1_loss", "plain smooth L1", plain, plain, {}))
    facts = {"case": "smooth l1", "rows": rows, "dtype": short(dtype)}
    return Problem(facts, contenders, rows * 4, dtype, sets, {BOTH: 3 * size}, "coordinate")


def function(bench: Bench, name: str, rows: int, dtype: torch.dtype) -> Problem:
    """One of FUNCTIONS of `rows` rows: deltas or boxes and anchors, or deltas and deltas, in; float32 out."""
    rows = DRY_ROWS if bench.small else rows
    size = torch.finfo(dtype).bits // 8
    bytes_in = rows * 4 * (size + (size if name == "delta-iou" else 4))
    bytes_out = rows * 4 * (1 if name == "delta-iou" else 4)
    sets = sets_beyond_cache(bytes_in + bytes_out, bench.device)

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator(bench.device).manual_seed(seed)
        deltas = (torch.randn(rows, 4, generator=g, device=bench.device) * 0.2).to(dtype)
        corner = torch.rand(rows, 2, generator=g, device=bench.device) * 200
        anchors = torch.cat([corner, corner + 40], 1)
        if name == "delta-iou":
            return deltas, (deltas + torch.randn(rows, 4, generator=g, device=bench.device) * 0.1).to(dtype)
        if name == "encode":
            return ik.decode_boxes(deltas, anchors, backend="reference").to(dtype), anchors
        return deltas, anchors

    draws = [draw(seed) for seed in range(sets)]
    ours: Pair = {"decode": ik.decode_boxes, "encode": ik.encode_boxes, "delta-iou": ik.delta_iou}[name]
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    theirs: dict[str, Pair] = {"decode": coder.decode_single, "encode": coder.encode_single}
    # Coordinates go up to 300: three roundings of that are 10 times the budget of a corner, once the budget in units of
    # the anchor's 40.
    floor = {"decode": 10.0, "encode": 1.0}.get(name, testing.FLOOR)

    def check(_: Work, results: list[Tensor]) -> None:
        want = ours(*(t.double() for t in draws[0]), backend="reference")
        testing.assert_close_budget(results[0], want, torch.float32, floor=floor, what=name)

    def contender(path: str, call: Pair, facts: dict[str, Any]) -> Contender:
        make = lambda i: Work(lambda: [call(*draws[max(i, 0)])])  # noqa: E731
        return Contender(path, f"{name} of boxes", make, check, "every element at full size", (INFERENCE,), facts)

    contenders = [
        contender("fused", partial(ours, backend=backend), {"backend": backend}) for backend in bench.backends
    ]
    contenders.append(contender("reference backend", partial(ours, backend="reference"), {"backend": "reference"}))
    if name in theirs and dtype is torch.float32:  # it computes in the dtype of the deltas
        contenders.append(contender("torchvision BoxCoder", theirs[name], {}))
    facts = {"case": name, "rows": rows, "dtype": short(dtype)}
    return Problem(facts, contenders, rows * 4, dtype, sets, {INFERENCE: bytes_in + bytes_out}, "coordinate")
