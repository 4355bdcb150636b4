"""Launches of the pass over the logits: which levels go together, in vectors of what width, in tiles of what size."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from ._launch import TYPES, cdiv, gamma_case, pack, power_of_two, programs_of, widest
from .coefficients import Scratch
from .focal_dense import NOTHING, DenseLevels, DenseNumbers, dense_kernel
from .positives import Marks

# A program is a warp: it waits for none, and what is rare is looked for in what 32 threads read at once.
WARPS = 1
# Registers of a thread, and the warps that a multiprocessor holds with so many; for any gamma, and for weights.
REGISTERS, RESIDENT = 64, 32
REGISTERS_MORE, RESIDENT_MORE = 80, 24
READ_AHEAD, READ_AHEAD_PLANES = 64, 32  # bytes of logits that a thread reads before it computes
MOST_VECTORS = 8  # of a thread in a group: more make a long program of narrow accesses
MOST_ROWS = 2048  # of a group, whose marks are looked at at once
PROGRAMS = 8192  # of a launch, to fill a GPU twice; beyond that they are longer, up to
TILE_BYTES, TILE_BYTES_PLANES = 8192, 16384  # of logits
RUN = 1 << 30  # logits of an image's level of rows: they are counted in 32 bits
FULL = 0.9  # of the best use of a program's time: enough


class Choice(NamedTuple):
    """How the pass is launched; 0: by rule."""

    groups: int = 0  # of a program, at most 32
    vectors: int = 0  # of a thread in a group
    registers: int = 0  # of a thread, at most
    warps: int = 0  # of a program


choice = Choice()  # for `make gpu-tune` and tests


@dataclass
class DenseLevel:
    """A level as the launcher sees it."""

    x: Tensor
    out: Tensor | None
    x_offset: int  # elements from the tensor's start
    image_stride: int
    rows: int  # anchors of an image
    first_anchor: int
    planes: bool = False
    locations: int = 0
    anchors: int = 1  # per location

    def addresses(self) -> tuple[int, int]:
        start = self.x_offset * self.x.element_size()
        x = self.x.data_ptr() + start
        return x, x if self.out is None else self.out.data_ptr() + start

    def parts(self, classes: int) -> list[DenseLevel]:
        """The level, or where it has too many rows some of them each; none of a level without rows. The planes of a
        single class are rows of one logit: their marks lie in the same order."""
        if self.planes and classes == 1:
            return replace(self, planes=False).parts(classes)
        if self.planes or self.rows * classes <= RUN:
            return [self] if self.rows else []
        step = max(RUN // classes // 1024, 1) * 1024  # every part is aligned as the first one
        return [
            replace(
                self,
                x_offset=self.x_offset + first * classes,
                rows=min(step, self.rows - first),
                first_anchor=self.first_anchor + first,
            )
            for first in range(0, self.rows, step)
        ]


@functools.lru_cache(maxsize=1024)
def period_of(locations: int, classes: int, vector: int, group: int, loop: int) -> int:
    """Classes of a period: as few as make whole vectors, fill the groups of a program well and leave a program, of up
    to `loop` groups, more than the one that looking at its marks costs."""
    fewest = vector // math.gcd(locations, vector)

    def use(n: int) -> float:  # share of a program's slots in use, of its time without the marks
        vectors, groups = n * locations // vector, min(classes // n, loop)
        return vectors / (cdiv(vectors, group) * group) * groups / (groups + 1)

    choices = [n for n in range(fewest, classes + 1, fewest) if classes % n == 0]
    best = max(map(use, choices))
    return next(n for n in choices if use(n) >= FULL * best)


@dataclass
class DensePass:
    """All launches of the pass over the logits of one loss. ``launch`` sets `partial` and `tiles`."""

    marks: Marks
    scratch: Scratch
    levels: Sequence[DenseLevel]
    images: int
    classes: int
    anchors_per_image: int
    gamma: float
    output: int = NOTHING.value
    row_weight: Tensor | None = None
    scale: tuple[Tensor | None, float] = (None, 1.0)
    expected: tuple[Tensor | None, float] = (None, 1.0)
    may_skip: bool = False
    loss: Tensor | None = None
    partial: int = 0  # address of the tiles' losses
    tiles: int = 0

    def __post_init__(self) -> None:
        self.levels = [part for level in self.levels for part in level.parts(self.classes)]

    def launch(self, memory: Any) -> None:
        plans = [plan for plan in (self.plan(*group) for group in self.groups()) if plan["tiles"] > 0]
        self.tiles = sum(plan["tiles"] for plan in plans)
        self.partial = memory.take(self.tiles, 4) if self.loss is not None else 0
        done = 0
        for plan in plans:
            self.run(plan, self.partial + 4 * done)
            done += plan["tiles"]

    def losses(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Packed, for the last kernel: addresses of the tiles' losses and of their sum, and how many there are."""
        return pack(self.partial, 0 if self.loss is None else self.loss.data_ptr()), pack(self.tiles)

    def groups(self) -> list[tuple[int, list[DenseLevel]]]:
        """Levels of one launch and their vectors' width: rows and planes apart, and apart from those that the width of
        the largest does not suit the others."""
        found = []
        for planes in (False, True):
            levels = [level for level in self.levels if level.planes == planes]
            if not levels:
                continue
            width = self.vector(max(levels, key=lambda level: level.rows))
            wide = [level for level in levels if self.vector(level) >= width]
            narrow = [level for level in levels if self.vector(level) < width]
            found.append((width, wide))
            if narrow:
                found.append((min(map(self.vector, narrow)), narrow))
        return found

    def vector(self, level: DenseLevel) -> int:
        """Elements of a vector. Rows need not begin with a whole one; planes must, those of an anchor together, and be
        as large as a vector."""
        size = level.x.element_size()
        x, out = level.addresses()
        if not level.planes:
            return widest(size, x - out) if (x - out) % 16 == 0 else 1
        strides = [level.image_stride * size] if self.images > 1 else []
        width = widest(size, x, out, self.classes * level.locations * size, *strides)
        while width > max(level.locations, 1):
            width //= 2
        return width

    def plan(self, vector: int, levels: Sequence[DenseLevel]) -> dict[str, Any]:
        """Tiles and constants of a launch."""
        size = levels[0].x.element_size()
        planes = levels[0].planes
        threads = 32 * (choice.warps or WARPS)
        ahead, tile_bytes = (READ_AHEAD_PLANES, TILE_BYTES_PLANES) if planes else (READ_AHEAD, TILE_BYTES)
        unroll = choice.vectors or min(ahead // (vector * size), MOST_VECTORS)
        while not planes and unroll > 1 and unroll * threads * vector > MOST_ROWS * self.classes:
            unroll //= 2
        group = unroll * threads  # vectors
        addresses = [level.addresses() for level in levels]
        logits = sum(self.images * level.rows * self.classes for level in levels)
        reach = group * vector  # entries of a group
        loop = choice.groups or min(cdiv(logits, reach * PROGRAMS), max(tile_bytes // (reach * size), 1))
        one_row, periods, most = True, [0] * len(levels), 1
        if planes:
            periods = [period_of(level.locations, self.classes, vector, group, loop) for level in levels]
            tiles = [cdiv(n * level.locations // vector, group) for n, level in zip(periods, levels)]
            counts = [
                self.images * level.anchors * tile * cdiv(self.classes // n, loop)
                for n, level, tile in zip(periods, levels, tiles)
            ]
        else:
            starts = [x for x, _ in addresses]
            if self.images > 1:
                starts += [level.image_stride * size for level in levels]
            one_row = self.classes % vector == 0 and all(start % (vector * size) == 0 for start in starts)
            entries = [level.rows * self.classes + (0 if one_row else vector - 1) for level in levels]
            tiles = [cdiv(cdiv(n, vector), group * loop) for n in entries]
            counts = [self.images * tile for tile in tiles]
            most = (reach - 1) // self.classes + 2
        table = DenseLevels(
            pack(*(x for x, _ in addresses)),
            pack(*(out for _, out in addresses)),
            pack(*(level.image_stride for level in levels)),
            pack(*(level.locations for level in levels)),
            pack(*(level.anchors if planes else level.rows for level in levels)),
            pack(*(level.first_anchor for level in levels)),
            pack(*periods),
            pack(*(sum(counts[:i]) for i in range(len(counts)))),
            pack(*tiles),
        )
        return {
            "tiles": sum(counts),
            "loop": loop,
            "table": table,
            "x": levels[0].x,
            "consts": {
                "PLANES": planes,
                "THREADS": threads,
                "VECTOR": vector,
                "ONE_ROW": one_row,
                "UNROLL": unroll,
                "SPAN": max(power_of_two(most), threads),
            },
        }

    def run(self, plan: dict[str, Any], partial: int) -> None:
        x, gamma = plan["x"], gamma_case(self.gamma)
        numbers = DenseNumbers(
            x if self.row_weight is None else self.row_weight,
            x if self.scale[0] is None else self.scale[0],
            x if self.expected[0] is None else self.expected[0],
        )
        warps = choice.warps or WARPS
        # In planes that may have nothing to do, a period of many classes and the loop over tiles spill at 64 (sm_80).
        more = gamma < 0 or self.row_weight is not None or (self.may_skip and plan["consts"]["PLANES"])
        registers, resident = (REGISTERS_MORE, RESIDENT_MORE) if more else (REGISTERS, RESIDENT)
        dense_kernel[(programs_of(plan["tiles"], self.may_skip, x, resident // warps),)](
            plan["table"],
            self.marks,
            self.scratch,
            numbers,
            pack(partial),
            self.anchors_per_image,
            plan["tiles"],
            plan["loop"],
            self.gamma,
            self.scale[1],
            self.expected[1],
            T=TYPES[x.dtype],
            K=self.classes,
            GAMMA=gamma,
            OUTPUT=self.output,
            WEIGHTED=self.row_weight is not None,
            WANT_LOSS=self.loss is not None,
            MAY_SKIP=self.may_skip,
            SCALE_GIVEN=self.scale[0] is not None,
            EXPECTED_GIVEN=self.expected[0] is not None,
            num_warps=warps,
            maxnreg=choice.registers or registers,
            **plan["consts"],
        )
