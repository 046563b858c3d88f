"""Twenty drawers: each has a face it copies from, a pen, a slant and a hand that is never quite steady."""

from __future__ import annotations

from math import radians
from typing import NamedTuple

import numpy as np

from .glyph_fonts import CANVAS, FACES
from .glyph_strokes import draw_with_pen, soften

DRAWERS = 20
SIDE = 28  # pixels of a finished image
KNOTS = 4  # control points of the elastic field, per axis
PENS = (2, 4, 5, 8, 9, 10)  # squared radii on the canvas: lines of about 1 to 2.3 pixels in the finished image


class Drawer(NamedTuple):
    """Habits of one drawer. Lengths are in pixels of the 84 by 84 canvas."""

    face: str
    pen: int  # squared radius
    angle: float  # radians, counter-clockwise
    slant: float  # horizontal shift per vertical pixel
    width: float  # factor on the horizontal axis
    size: float  # factor on both axes
    wobble: float  # largest displacement of a control point


def make_drawers(seed: int) -> list[Drawer]:
    """The drawers of a data set; the habits depend on `seed` alone, the faces are the same for every seed."""
    random = np.random.Generator(np.random.Philox(key=[seed, DRAWERS]))
    drawers = []
    for index in range(DRAWERS):
        angle, slant, width, size, wobble = random.uniform((-8, -0.2, 0.75, 0.85, 5), (8, 0.2, 1.15, 1.15, 11)).tolist()
        pen = PENS[int(random.integers(len(PENS)))]
        drawers.append(Drawer(FACES[index % len(FACES)], pen, radians(angle), slant, width, size, wobble))
    return drawers


def draw(lines: np.ndarray, drawer: Drawer, random: np.random.Generator) -> np.ndarray:
    """One drawing of each character by `drawer`.

    Args:
        lines: centre lines [n, CANVAS, CANVAS], uint8.
        random: where this drawer's unsteadiness comes from.

    Returns:
        uint8 [n, 28, 28], 255 = ink.
    """
    n = len(lines)
    ink = soften(draw_with_pen(lines, drawer.pen)).reshape(n, -1)
    y, x = _source_points(n, drawer, random)
    return np.rint(255 * _bilinear(ink, y, x)).astype(np.uint8).reshape(n, SIDE, SIDE)


def _source_points(n: int, drawer: Drawer, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Where on the canvas each finished pixel looks: y and x, float32 [n, 784]."""
    angle = drawer.angle + random.uniform(-0.12, 0.12, (n, 1))
    size = drawer.size * random.uniform(0.92, 1.08, (n, 1))
    width = drawer.width * random.uniform(0.92, 1.08, (n, 1))
    slant = drawer.slant + random.uniform(-0.08, 0.08, (n, 1))
    shift = random.uniform(-4, 4, (2, n, 1))

    pixel = (np.arange(SIDE) - (SIDE - 1) / 2) * (CANVAS / SIDE)
    u = (np.tile(pixel, SIDE) - shift[0]) / size
    v = (np.repeat(pixel, SIDE) - shift[1]) / size
    y = np.sin(angle) * u + np.cos(angle) * v
    x = (np.cos(angle) * u - np.sin(angle) * v) / width + slant * y
    bend = _elastic_field(random.uniform(-drawer.wobble, drawer.wobble, (2, n, KNOTS, KNOTS)))
    centre = (CANVAS - 1) / 2
    return (y + bend[0] + centre).astype(np.float32), (x + bend[1] + centre).astype(np.float32)


def _elastic_field(knots: np.ndarray) -> np.ndarray:
    """Smooth field through control points [2, n, KNOTS, KNOTS]: cubic B-spline weights, [2, n, 784]."""
    position = np.linspace(0.0, KNOTS - 1.0, SIDE)
    distance = np.abs(position[:, None] - np.arange(KNOTS))
    near, far = 2 / 3 - distance**2 + distance**3 / 2, np.maximum(2 - distance, 0) ** 3 / 6
    weight = np.where(distance < 1, near, far)  # [28, KNOTS]
    return (weight @ knots @ weight.T).reshape(*knots.shape[:2], -1)


def _bilinear(ink: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Values of flat canvases `ink` [n, CANVAS * CANVAS] at points y, x [n, m]; outside is empty."""
    low, high = np.float32(0), np.float32(CANVAS - 1.001)
    inside = (y >= low) & (y <= high) & (x >= low) & (x <= high)
    y, x = np.clip(y, low, high), np.clip(x, low, high)
    row, left = y.astype(np.int32), x.astype(np.int32)
    fy, fx = y - row, x - left
    at = row * CANVAS + left + (np.arange(len(ink), dtype=np.int32) * (CANVAS * CANVAS))[:, None]
    flat = ink.reshape(-1)
    top = flat[at] * (1 - fx) + flat[at + 1] * fx
    bottom = flat[at + CANVAS] * (1 - fx) + flat[at + CANVAS + 1] * fx
    return np.where(inside, top * (1 - fy) + bottom * fy, low)
