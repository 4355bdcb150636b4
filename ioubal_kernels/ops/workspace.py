"""Scratch memory of the GPU kernels: one float64 tensor per call, allocated here because torch's allocator knows the
stream, CUDA graphs and the memory limit. The sizes are upper bounds; the launchers hand the pieces out and check them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The constants of csrc/cuda: sums per tile, anchors (rows of the focal loss) per word of bits and words per tile, rows
# per tile of the other row losses.
_PARTIALS = 9
_WORD = 32
_TILE_WORDS = 64  # 128, but for those that a number of anchors per location does not divide
_ROWS = 256
_GROUP = 2048  # logits of a group of strips, at least; kept of each: two words of bits, and a loss or two
_TRITON_ROWS, _TRITON_ANCHORS = 2048, 8192  # of a tile of the Triton kernels' positives
TRITON_GROUP = 256  # logits that a program of the Triton kernels' dense pass reads at once, at least, when by rule
triton_group = TRITON_GROUP  # and now
_MATCH_BLOCK = 128  # anchors culled together by the Triton kernels
_PIECES = 16  # each is rounded up to 8 bytes


def _tensor(doubles: int, floats: int, device: torch.device) -> list[Tensor]:
    return [torch.empty(doubles + floats // 2 + _PIECES, dtype=torch.float64, device=device)]


def _mark_size(classes: int) -> int:
    return 1 if classes <= 128 else 2 if classes <= 32768 else 4  # triton_kernels/positives.py


def triton_tiles(logits: int, runs: int) -> int:
    """At most so many programs has Triton's dense pass, each of which keeps a loss: most read several groups of logits,
    but where only all planes of an anchor together make whole vectors they read one. `runs`: stretches of memory that
    begin with a group of their own: images' levels of rows, or planes."""
    return logits // triton_group + runs


def rows_workspace(backend: str, name: str, rows: int, columns: int, scopes: int, device: torch.device) -> list[Tensor]:
    """For the loss `name` over rows (R, K); empty for the CPU kernels, which need none."""
    if backend == "cpu":
        return []
    if backend == "triton":
        # Rows per tile of sums; kept per row: a mark, 8 bytes and 2 of a list (focal), 8 (cross entropy), 4.
        tiles = rows // (128 if name == "smooth_l1" else _TRITON_ROWS) + 1
        if name == "focal":
            kept = rows * (8 + _mark_size(columns)) // 4 + _TRITON_ROWS // 2 * tiles
            kept += triton_tiles(rows * columns, rows * columns // (1 << 29) + 1)  # parts of 2^30 logits
        elif name == "cross_entropy":
            together = max(min(1024 >> (columns - 1).bit_length(), 128), 1) if columns else 1  # rows of a program
            kept = 2 * rows + rows // together + 1
        else:
            kept = rows + tiles
        return _tensor(_PARTIALS * scopes * (tiles + 1), 2 * scopes + kept + 4 * _PIECES, device)
    tiles = rows // (_TILE_WORDS * _WORD if name == "focal" else _ROWS) + 1
    words = rows // _WORD + _PIECES
    groups = rows * columns // _GROUP + 2 * _PIECES
    return _tensor(_PARTIALS * scopes * (tiles + 1), 2 * scopes + 4 * groups + 2 * words + rows + tiles, device)


def detection_workspace(
    backend: str,
    images: int,
    anchors: int,
    classes: int,
    groups: int,
    levels: int,
    scopes: int,
    weights: int,
    device: torch.device,
) -> list[Tensor]:
    """For the detection loss: `anchors` per image, `groups` the sum over levels of anchors per location, `weights`
    4-byte numbers kept per anchor by the CUDA kernels (1, or 2 where eta and lambda differ)."""
    if backend == "cpu":
        return []
    if backend == "triton":
        tiles = images * (anchors // _TRITON_ANCHORS + levels)
        dense_tiles = triton_tiles(images * anchors * classes, images * (2 * levels + groups * (classes + 1)))
        floats = 3 * images + 2 * scopes + dense_tiles + images * anchors * (4 + _mark_size(classes)) // 4
        return _tensor(_PARTIALS * (tiles + images * levels), floats, device)
    words = images * (anchors // _WORD + groups)
    segments = images * levels
    tiles = words // _TILE_WORDS + segments
    strips = images * anchors * classes // _GROUP + 2 * segments
    floats = 3 * images + 2 * scopes + 4 * strips + 2 * words + weights * images * anchors
    return _tensor(_PARTIALS * (tiles + segments), floats, device)


def groups_of(deltas: Sequence[Tensor]) -> int:
    """The sum over levels of anchors per location; a flat tensor counts as one."""
    return sum(d.shape[1] // 4 if d.ndim == 4 else 1 for d in deltas)


def matching_workspace(
    backend: str, anchor_shape: Sequence[int], images: int, boxes: int, device: torch.device
) -> list[Tensor]:
    """For matching anchors (R, 4) or (N, R, 4) with up to `boxes` boxes an image. CUDA: float32 copies of the boxes,
    the best anchor of each, and a word for every 32 anchors and image. Triton: the bounds of every block of anchors,
    and the best IoU of every box with its anchor. Never of the size R x G."""
    if backend == "cpu":
        return []
    sets = anchor_shape[0] if len(anchor_shape) == 3 else 1
    rows = anchor_shape[-2]
    if backend == "triton":
        # A box's corners, area, place and best anchor; a block's bounds; a count per image.
        return _tensor(4 * images * boxes, 4 * sets * (rows // _MATCH_BLOCK + 1) + images, device)
    return _tensor(3 * images * boxes, images * (rows // _WORD + 1), device)
