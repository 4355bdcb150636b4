"""Scaling a gradient where it lies, for losses whose logits it was written over."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, number, on_device, programs_of, widest

BLOCK = 2048


@triton.jit(do_not_specialize=["count", "tiles"])
def rescale_kernel(
    data,
    scale_tensor,
    expected_tensor,
    count: tl.int64,
    tiles,
    expected: tl.float64,
    EXPECTED_GIVEN: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Nothing is read or written where the factor is 1. A 0 stays one, as an ignored row's has to whatever it is."""
    factor = tl.load(scale_tensor).to(tl.float64) / number(expected_tensor, expected, EXPECTED_GIVEN)
    tile = tl.program_id(0)
    if factor == 1.0:
        tile = tiles
    while tile < tiles:
        i = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = i < count // VECTOR * VECTOR  # VECTOR divides it: as the mask's constancy
        at = tl.multiple_of(data + i, (16,)) if VECTOR > 1 else data + i
        value = tl.load(at, mask=mask).to(tl.float32)
        value = tl.where(value == 0.0, value, value * factor.to(tl.float32))
        tl.store(at, value.to(data.dtype.element_ty), mask=mask)
        tile += tl.num_programs(0)


def rescale(grads: Sequence[Tensor], grad_output: Tensor, grad_scale_tensor: Tensor | None, grad_scale: float) -> None:
    for grad in grads:
        tiles = cdiv(grad.numel(), BLOCK)
        if tiles == 0:
            continue
        size = grad.element_size()
        vector = widest(size, grad.data_ptr(), grad.numel() * size)
        with on_device(grad):
            rescale_kernel[(programs_of(tiles, True, grad),)](
                grad,
                grad_output,
                grad if grad_scale_tensor is None else grad_scale_tensor,
                grad.numel(),
                tiles,
                grad_scale,
                EXPECTED_GIVEN=grad_scale_tensor is not None,
                VECTOR=vector if vector * size == 16 else 1,
                BLOCK=BLOCK,
                num_warps=4,
            )
