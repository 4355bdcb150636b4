"""The other losses on a GPU: softmax cross entropy, smooth L1, decoding of boxes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ioubal_kernels as ik
from ioubal_kernels import testing

from .cases import short
from .graph_timing import Step, capture, sets_beyond_cache, wall_ms
from .paths import COPY, Bench, Path, Row, copy_path, race_rows

CROSS_ENTROPY = {81: 2_000_000, 1204: 131_072}  # columns: rows
SMOOTH_L1_ROWS, DECODED = 1 << 22, 16 * 200700


def loss_step(loss: Callable[[Tensor], Tensor], x: Tensor) -> Step:
    def step() -> list[Tensor]:
        value = loss(x)
        return [value.detach(), *torch.autograd.grad(value, x)]

    return step


def rows_for(
    bench: Bench,
    facts: Row,
    make: Callable[[int], tuple[Tensor, Callable[[Tensor, str], Tensor]]],
    extra_bytes: int,
    floor: Callable[[Tensor], Any],
    peers: dict[str, Callable[[int], Step]],
) -> list[Row]:
    """make(seed): the differentiable input and the loss of (input, backend). extra_bytes: beside 2 x the input."""
    x, loss = make(0)
    dtype = x.dtype
    sets = sets_beyond_cache(2 * x.nbytes, bench.device)
    steps = []
    for seed in range(sets):
        leaf, function = make(seed)
        leaf = leaf.requires_grad_()
        steps.append(loss_step(lambda t, f=function: f(t, bench.backend), leaf))
    replays = [capture(step, bench.device) for step in steps]
    wide = x.detach().double().requires_grad_()
    want = loss_step(lambda t: loss(t, "reference"), wide)()
    got = replays[0].results
    testing.assert_close_budget(got[0], want[0], torch.float32, "loss", what=str(facts["case"]))
    testing.assert_close_budget(got[1], want[1], dtype, "gradient", floor(want[1]), what=str(facts["case"]))
    del wide, want
    paths = {COPY: copy_path(bench, x.numel(), dtype, sets)}
    paths["fused"] = Path([r.run for r in replays], 2 * x.nbytes + extra_bytes, {})
    for name, peer in peers.items():
        paths[name] = Path([capture(peer(seed), bench.device).run for seed in range(sets)], 0, {})
    facts = {**facts, "dtype": short(dtype), "parity": "every element at full size"}
    rows = race_rows(bench, paths, 2 * x.nbytes, facts)
    wall = round(wall_ms(steps[0], bench.device), 4)
    return [row | {"eager_wall_ms": wall} if row["path"] == "fused" else row for row in rows]


def cross_entropy_rows(bench: Bench, columns: int, dtype: torch.dtype) -> list[Row]:
    rows = CROSS_ENTROPY[columns] if not bench.small else 300

    def draw(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator(bench.device).manual_seed(seed)
        logits = torch.randn(rows, columns, generator=g, device=bench.device).to(dtype)
        kind = torch.rand(rows, generator=g, device=bench.device)
        chosen = torch.randint(1, columns, (rows,), generator=g, device=bench.device)
        labels = torch.where(kind < 0.25, chosen, 0)
        labels = torch.where(kind > 0.99, -1, labels).to(torch.int32)
        return logits, labels, torch.rand(rows, generator=g, device=bench.device)

    def make(seed: int) -> tuple[Tensor, Callable[[Tensor, str], Tensor]]:
        logits, labels, iou = draw(seed)
        return logits, lambda x, backend: ik.iou_balanced_cross_entropy(x, labels, iou, backend=backend)

    def plain(seed: int) -> Step:
        logits, labels, _ = draw(seed)
        wide = labels.long()
        return loss_step(lambda x: F.cross_entropy(x, wide, ignore_index=-1), logits.requires_grad_())

    labels = draw(0)[1]
    # softmax - 1 cancels at the target: that entry is judged against the row's scale.
    target = F.one_hot(labels.long().clamp(min=0), columns)
    floor = lambda _: testing.FLOOR + target.double() / (labels >= 0).sum()  # noqa: E731
    facts = {"case": f"softmax cross entropy, {columns} classes", "rows": rows, "logits": rows * columns}
    return rows_for(bench, facts, make, 8 * rows, floor, {"F.cross_entropy (not balanced)": plain})


def smooth_l1_rows(bench: Bench, dtype: torch.dtype) -> list[Row]:
    rows = SMOOTH_L1_ROWS if not bench.small else 300

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator(bench.device).manual_seed(seed)
        target = torch.randn(rows, 4, generator=g, device=bench.device) * 0.5
        pred = target + torch.randn(rows, 4, generator=g, device=bench.device) * 0.3
        return pred.to(dtype), target.to(dtype)

    def make(seed: int) -> tuple[Tensor, Callable[[Tensor, str], Tensor]]:
        pred, target = draw(seed)
        return pred, lambda x, backend: ik.iou_balanced_smooth_l1_loss(x, target, backend=backend)

    def plain(seed: int) -> Step:
        pred, target = draw(seed)
        return loss_step(lambda x: F.smooth_l1_loss(x, target, beta=1 / 9, reduction="sum"), pred.requires_grad_())

    extra = rows * 4 * torch.finfo(dtype).bits // 8
    facts = {"case": "smooth L1", "rows": rows}
    return rows_for(bench, facts, make, extra, lambda _: testing.FLOOR, {"F.smooth_l1_loss (not balanced)": plain})


def decode_rows(bench: Bench, dtype: torch.dtype) -> list[Row]:
    """Forward only: deltas and anchors in, float32 boxes out."""
    count = DECODED if not bench.small else 300
    found = []
    for seed in range(sets_beyond_cache(count * 48, bench.device)):
        g = torch.Generator(bench.device).manual_seed(seed)
        deltas = (torch.randn(count, 4, generator=g, device=bench.device) * 0.2).to(dtype)
        corner = torch.rand(count, 2, generator=g, device=bench.device) * 200
        found.append((deltas, torch.cat([corner, corner + 40], 1)))
    decode = lambda d, a: [ik.decode_boxes(d, a, backend=bench.backend)]  # noqa: E731
    replays = [capture(lambda d=d, a=a: decode(d, a), bench.device) for d, a in found]
    want = ik.decode_boxes(found[0][0].double(), found[0][1].double(), backend="reference")
    # Corners are differences of coordinates up to 300: three roundings of that are 10 times the budget.
    testing.assert_close_budget(replays[0].results[0], want, torch.float32, "gradient", 10.0, what="decode")
    size = found[0][0].nbytes
    paths = {COPY: copy_path(bench, count * 4, dtype, len(found))}
    paths["fused"] = Path([r.run for r in replays], size + count * 32, {})
    facts = {"case": "decode boxes", "rows": count, "dtype": short(dtype), "parity": "every element at full size"}
    rows = race_rows(bench, paths, 2 * size, facts)
    wall = round(wall_ms(lambda: decode(*found[0]), bench.device), 4)
    return [row | {"eager_wall_ms": wall} if row["path"] == "fused" else row for row in rows]
