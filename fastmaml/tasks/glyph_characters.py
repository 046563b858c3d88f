"""The classes of `Glyphs`: every letter of the alphabets that can be told from the letters before it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .glyph_alphabets import ALPHABETS, letters
from .glyph_fonts import SMALLEST, FontFace, coverage
from .glyph_strokes import draw_with_pen, soften, thin

ALIKE = 0.90  # cosine of two softened drawings above which a stranger may take them for the same character
PEN = 8  # squared radius of the pen for this comparison


class Character(NamedTuple):
    """One class: a letter of an alphabet."""

    point: int
    alphabet: str
    split: str


def distinct_characters() -> list[Character]:
    """Letters of `ALPHABETS` in order, without near-duplicates (Latin A, Greek Alpha, Cyrillic A count once)."""
    font, covered = FontFace("DejaVuSans"), coverage("DejaVuSans")
    found = [Character(p, a.name, a.split) for a in ALPHABETS for p in letters(a, covered) if font.size(p) >= SMALLEST]
    ink = soften(draw_with_pen(thin(font.masks([c.point for c in found])), PEN))
    for _ in range(2):
        ink = _halve(soften(ink))
    flat = ink.reshape(len(found), -1)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    alike = flat @ flat.T >= ALIKE
    kept: list[int] = []
    for index in range(len(found)):
        if not alike[index, kept].any():
            kept.append(index)
    return [found[index] for index in kept]


def _halve(images: np.ndarray) -> np.ndarray:
    n, height, width = images.shape
    return images.reshape(n, height // 2, 2, width // 2, 2).mean((2, 4), dtype=np.float32)
