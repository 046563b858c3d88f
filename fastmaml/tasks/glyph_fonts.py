"""The DejaVu fonts that matplotlib ships: where they are, what they cover, and a character as a mask of ink."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

CANVAS = 84  # pixels; three times the 28 of a finished image
BOX = 57  # the longer side of a character's ink on the canvas
PROBE = 64  # font size at which a character is measured first
SMALLEST = 0.35  # em; smaller ink is a dot or a mark, which would be blown up to a blot

# Not the bold ones: thinning takes their weight away again, and in small letters it has swallowed loops.
FACES = (
    "DejaVuSans",
    "DejaVuSerif",
    "DejaVuSansMono",
    "DejaVuSans-Oblique",
    "DejaVuSerif-Italic",
    "DejaVuSansMono-Oblique",
)
EXTRA_HINT = "glyphs need matplotlib (for its fonts) and Pillow: pip install 'fastmaml[vision]'"


def font_folder() -> Path:
    """Folder of the installed matplotlib that holds its .ttf files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(EXTRA_HINT) from error
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def pillow_font() -> ModuleType:
    """`PIL.ImageFont`, checked to have been built with freetype."""
    try:
        from PIL import ImageFont, features
    except ImportError as error:
        raise ImportError(EXTRA_HINT) from error
    if not features.check("freetype2"):
        raise ImportError("glyphs need a Pillow built with freetype, which this one is not")
    return ImageFont


def freetype_version() -> str:
    """Version of the freetype that Pillow renders with; other versions may round a pixel differently."""
    pillow_font()
    from PIL import features

    return str(features.version("freetype2"))


def coverage(face: str) -> set[int]:
    """Code points that `face` has a picture for."""
    from matplotlib.ft2font import FT2Font

    return set(FT2Font(str(font_folder() / f"{face}.ttf")).get_charmap())


def fallbacks(face: str) -> tuple[str, ...]:
    """`face`, then Sans for missing characters: first slanted if `face` is slanted, then upright."""
    slanted = "Oblique" in face or "Italic" in face
    return tuple(dict.fromkeys((face, "DejaVuSans-Oblique", "DejaVuSans") if slanted else (face, "DejaVuSans")))


class FontFace:
    """One face with its fallbacks, rendering characters as masks whose longer side is `BOX` pixels."""

    def __init__(self, face: str) -> None:
        self._image_font = pillow_font()
        self._chain = [(font_folder() / f"{name}.ttf", coverage(name)) for name in fallbacks(face)]
        self._sized: dict[tuple[Path, int], Any] = {}

    def masks(self, points: Sequence[int]) -> np.ndarray:
        """Ink of each code point, centred: bool [len(points), CANVAS, CANVAS]."""
        masks = np.zeros((len(points), CANVAS, CANVAS), bool)
        for mask, point in zip(masks, points):
            ink = self._fitted(point)
            top, left = (CANVAS - ink.shape[0]) // 2, (CANVAS - ink.shape[1]) // 2
            mask[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
        return masks

    def size(self, point: int) -> float:
        """Longer side of the ink of `point`, in em."""
        return max(self._ink(point, PROBE).shape) / PROBE

    def _fitted(self, point: int) -> np.ndarray:
        return self._ink(point, max(1, round(BOX / self.size(point))))[:CANVAS, :CANVAS]

    def _ink(self, point: int, size: int) -> np.ndarray:
        """Ink of `point` at font size `size`, cropped to its bounding box: bool [h, w]."""
        path = next(path for path, covered in self._chain if point in covered)
        if (path, size) not in self._sized:
            basic = self._image_font.Layout.BASIC  # raqm, where present, would shape letters by their neighbours
            self._sized[path, size] = self._image_font.truetype(str(path), size, layout_engine=basic)
        mask = self._sized[path, size].getmask(chr(point), mode="L")
        ink = np.asarray(mask, np.uint8).reshape(mask.size[::-1]) > 127
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if rows.size else ink[:0, :0]
