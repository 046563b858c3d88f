"""From a printed shape to a pen stroke: thinning to a centre line, and drawing that line with a round pen."""

from __future__ import annotations

import numpy as np


def _removable() -> np.ndarray:
    """[2, 256]: whether a pixel with this ring of neighbours goes in the first / second half of a thinning pass.

    Bit k of the index is neighbour k, clockwise from north. Guo and Hall, "Parallel thinning with two-subiteration
    algorithms", CACM 32(3), 1989, algorithm A1. (The better known one of Zhang and Suen eats diagonal lines of width two.)
    """
    table = np.zeros((2, 256), bool)
    for ring in range(256):
        n, ne, e, se, s, sw, w, nw = ((ring >> k) & 1 for k in range(8))
        pieces = (not n and (ne | e)) + (not e and (se | s)) + (not s and (sw | w)) + (not w and (nw | n))
        ends = min((nw | n) + (ne | e) + (se | s) + (sw | w), (n | ne) + (e | se) + (s | sw) + (w | nw))
        if pieces == 1 and 2 <= ends <= 3:
            table[0, ring] = not ((s | sw | (not nw)) and w)
            table[1, ring] = not ((n | ne | (not se)) and e)
    return table


_REMOVABLE = _removable()


def thin(masks: np.ndarray) -> np.ndarray:
    """Centre lines, one pixel wide, of the ink in bool `masks` [n, h, w]; uint8 [n, h, w] of 0 and 1.

    The ink must stay clear of the outermost two pixels."""
    n, height, width = masks.shape
    padded = np.zeros((n, height + 2, width + 2), np.uint8)
    padded[:, 1:-1, 1:-1] = masks
    row = width + 2
    ring = np.array([-row, -row + 1, 1, row + 1, row, row - 1, -1, -row - 1])
    flat = padded.reshape(-1)
    ink = np.flatnonzero(flat)  # only ink can change, about a tenth of the pixels
    shrinking = True
    while shrinking:
        shrinking = False
        for table in _REMOVABLE:
            code = np.zeros(ink.size, np.uint8)
            for k, offset in enumerate(ring):
                code |= flat[ink + offset] << np.uint8(k)
            gone = table[code]
            shrinking |= bool(gone.any())
            flat[ink[gone]] = 0
            ink = ink[~gone]
    _enlarge_dots(padded)
    return padded[:, 1:-1, 1:-1]


def _enlarge_dots(lines: np.ndarray) -> None:
    """Let a dot, which thinning leaves a single pixel of, be three pixels wide and high, as a pen would press it."""
    row = lines.shape[2]
    flat = lines.reshape(-1)
    ring = np.array([-row, -row + 1, 1, row + 1, row, row - 1, -1, -row - 1])
    ink = np.flatnonzero(flat)
    dots = ink[~flat[ink[:, None] + ring].any(1)]
    flat[dots[:, None] + ring] = 1


def draw_with_pen(lines: np.ndarray, squared_radius: int) -> np.ndarray:
    """Ink left by a round pen that follows `lines` (uint8 [n, h, w]): every pixel within the radius of a line."""
    height, width = lines.shape[1:]
    reach = int(squared_radius**0.5)
    padded = np.pad(lines, ((0, 0), (reach, reach), (reach, reach)))
    ink = np.zeros_like(lines)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            if dy * dy + dx * dx <= squared_radius:
                np.maximum(ink, padded[:, reach + dy : reach + dy + height, reach + dx : reach + dx + width], out=ink)
    return ink


def soften(ink: np.ndarray) -> np.ndarray:
    """Mean over 3 by 3 pixels, zero outside: float32 [n, h, w]. It is the area a pixel of the 28 by 28 image covers."""
    padded = np.pad(ink, ((0, 0), (1, 1), (1, 1)))
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]  # at most 3, fits uint8
    return (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) * np.float32(1 / 9)
