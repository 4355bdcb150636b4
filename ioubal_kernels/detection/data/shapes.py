"""Drawing for the synthetic set: backgrounds, textures and the sprites' outlines; NumPy and Pillow only.

Every function takes its own `numpy.random.Generator`, so an image depends on its seed alone.
"""

from __future__ import annotations

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("rectangle", "ellipse", "triangle", "star", "cross", "ring", "hexagon", "arrow")
"""The classes in order; the first K are used."""

_OVERSAMPLE = 4


def _regular(count: int, radius: float = 1.0, phase: float = 0.0) -> list[tuple[float, float]]:
    steps = [phase + 2 * math.pi * k / count for k in range(count)]
    return [(radius * math.cos(a), radius * math.sin(a)) for a in steps]


def _star() -> list[tuple[float, float]]:
    return [
        (r * math.cos(a), r * math.sin(a))
        for k in range(10)
        for r, a in [(1.0 if k % 2 == 0 else 0.48, math.pi * k / 5)]
    ]


_CROSS = [(-0.36, -1), (0.36, -1), (0.36, -0.36), (1, -0.36), (1, 0.36), (0.36, 0.36), (0.36, 1), (-0.36, 1),
          (-0.36, 0.36), (-1, 0.36), (-1, -0.36), (-0.36, -0.36)]  # fmt: skip
_ARROW = [(1, 0), (0.1, 0.9), (0.1, 0.4), (-1, 0.4), (-1, -0.4), (0.1, -0.4), (0.1, -0.9)]

_OUTLINES: dict[str, list[list[tuple[float, float]]]] = {
    "rectangle": [[(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]],
    "ellipse": [_regular(40)],
    "triangle": [_regular(3)],
    "star": [_star()],
    "cross": [_CROSS],
    "ring": [_regular(40), _regular(40, 0.5)],
    "hexagon": [_regular(6)],
    "arrow": [_ARROW],
}


def sprite_mask(shape: str, radius: float, stretch: float, angle: float) -> np.ndarray:
    """The sprite's coverage, float32 (S, S) in [0, 1], centred, S odd.

    Args:
        shape: one of `SHAPES`.
        radius: half of its longer extent in pixels, before rotation.
        stretch: height over width, before rotation.
        angle: radians.
    """
    half = int(math.ceil(radius * 1.5)) + 1
    side = 2 * half + 1
    cos, sin = math.cos(angle), math.sin(angle)
    image = Image.new("L", (side * _OVERSAMPLE, side * _OVERSAMPLE), 0)
    draw = ImageDraw.Draw(image)
    for k, outline in enumerate(_OUTLINES[shape]):
        points = []
        for x, y in outline:
            u, v = x * radius, y * radius * stretch
            points.append(
                ((u * cos - v * sin + half + 0.5) * _OVERSAMPLE, (u * sin + v * cos + half + 0.5) * _OVERSAMPLE)
            )
        # Further outlines are holes.
        draw.polygon(points, fill=255 if k == 0 else 0)
    return np.asarray(image.reduce(_OVERSAMPLE), dtype=np.float32) / 255.0


def smooth_noise(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Random field, float32 (height, width) in [0, 1]: `cells` x `cells` random values, interpolated."""
    grid = (rng.random((cells, cells)) * 255).astype(np.uint8)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / 255.0


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A grey pattern, float32 (height, width) in [0, 1]: stripes, a gradient, a checker or smooth noise."""
    kind = rng.integers(4)
    if kind == 3:
        return smooth_noise(rng, height, width, int(rng.integers(3, 12)))
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, math.pi)
    along = xs * np.float32(math.cos(angle)) + ys * np.float32(math.sin(angle))
    if kind == 0:
        return 0.5 + 0.5 * np.sin(
            along * np.float32(2 * math.pi / rng.uniform(4, 24)) + np.float32(rng.uniform(0, 6.28))
        )
    if kind == 1:
        return (along - along.min()) / max(float(along.max() - along.min()), 1.0)
    period = rng.uniform(5, 16)
    across = -xs * np.float32(math.sin(angle)) + ys * np.float32(math.cos(angle))
    return ((np.floor(along / period) + np.floor(across / period)) % 2).astype(np.float32)


def random_colour(rng: np.random.Generator) -> np.ndarray:
    """float32 (3,), 0..255, of any hue."""
    return colour(rng.uniform(0, 1), rng.uniform(0.1, 0.8), rng.uniform(0.25, 0.95))


def colour(hue: float, saturation: float, value: float) -> np.ndarray:
    """float32 (3,), 0..255."""
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), dtype=np.float32) * 255.0


def paint(pattern: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Blends two colours by a pattern: float32 (H, W, 3)."""
    return first + pattern[:, :, None] * (second - first)


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """float32 (size, size, 3), 0..255: two textures over each other, and clutter lines that belong to no object."""
    canvas = paint(texture(rng, size, size), random_colour(rng), random_colour(rng))
    other = paint(texture(rng, size, size), random_colour(rng), random_colour(rng))
    canvas += smooth_noise(rng, size, size, 4)[:, :, None] * (other - canvas)
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 7))):
        points = [(float(x), float(y)) for x, y in rng.uniform(0, size, (int(rng.integers(2, 4)), 2))]
        line_colour = tuple(int(c) for c in random_colour(rng))
        draw.line(points, fill=line_colour, width=int(rng.integers(1, max(2, size // 24) + 1)))
    return np.asarray(image, dtype=np.float32)
