"""Glyphs: the built-in images. Letters of many scripts, redrawn by twenty unsteady hands. Needs no download."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import glyph_alphabets, glyph_characters, glyph_drawers, glyph_fonts, glyph_strokes
from .cache import cached
from .glyph_characters import distinct_characters
from .glyph_drawers import DRAWERS, SIDE, draw, make_drawers
from .glyph_fonts import EXTRA_HINT, FACES, FontFace, freetype_version
from .glyph_strokes import thin
from .image_tasks import ImageTasks
from .progress_line import progress_line
from .source import check_count, check_split


class GlyphSet(NamedTuple):
    """All drawings: `images` uint8 [classes, 20, 28, 28] (255 = ink), with the alphabet, split and letter of each class."""

    images: np.ndarray
    alphabets: list[str]
    splits: list[str]
    points: list[int]


class Glyphs(ImageTasks):
    """Character recognition on rendered letters, similar to Omniglot.

    About a thousand letters of some twenty alphabets, from the DejaVu fonts in matplotlib. Each letter is thinned to its
    centre line and redrawn by 20 drawers. They differ in font face, pen, slant, proportions and steadiness. Each alphabet
    belongs to one split. Letters that look alike (compared upright) count once. Images are float32 [1, 28, 28], ink = 1.
    Nearest neighbour on pixels is right in about 45 % of 5-way 1-shot tasks (Omniglot: 42 %).

    Args:
        ways, shots, query_shots: classes in a task, and support and query examples of each; 20 drawings a character.
        split: "train", "val" or "test".
        seed: seed of the tasks.
        root: folder for the rendered images; default $FASTMAML_CACHE or ~/.cache/fastmaml.
        rotations: True turns each character of "train" into four classes, "all" the characters of every split.
        drawing_seed: seed of the drawings; the same seed gives the same images.

    Raises:
        ImportError: matplotlib or Pillow is missing.
        ValueError: an argument does not fit.
    """

    name = "glyphs"

    def __init__(
        self,
        ways: int = 5,
        shots: int = 1,
        query_shots: int = 15,
        split: str = "train",
        seed: int = 0,
        root: str | Path | None = None,
        rotations: bool | str = True,
        drawing_seed: int = 0,
    ) -> None:
        check_split(split)
        self.drawing_seed = check_count("drawing_seed", drawing_seed, least=0)
        glyphs = load_glyphs(self.drawing_seed, root)
        chosen = [index for index, owner in enumerate(glyphs.splits) if owner == split]
        names = [f"{glyphs.alphabets[i]}/{chr(glyphs.points[i])}" for i in chosen]
        super().__init__(glyphs.images[chosen][:, :, None], names, ways, shots, query_shots, split, rotations, seed)

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "drawing_seed": self.drawing_seed}


def load_glyphs(drawing_seed: int = 0, root: str | Path | None = None) -> GlyphSet:
    """The glyph set. The first call renders it (about ten seconds on one core); later calls read the cache file."""

    def make() -> dict[str, np.ndarray]:
        made = render_glyphs(drawing_seed)
        return {
            "images": made.images,
            "alphabets": np.array(made.alphabets),
            "splits": np.array(made.splits),
            "points": np.array(made.points),
        }

    folder = Path(root) if root is not None else None
    stored = cached(f"glyphs-{_recipe(drawing_seed)}.npz", make, folder)
    return GlyphSet(stored["images"], *(stored[key].tolist() for key in ("alphabets", "splits", "points")))


def render_glyphs(drawing_seed: int = 0) -> GlyphSet:
    """Draw every character 20 times. The same seed, fonts and freetype give the same images, byte for byte."""
    drawers = make_drawers(drawing_seed)
    with progress_line("rendering glyphs", DRAWERS + 2) as advance:
        characters = distinct_characters()
        advance(2)
        points = [c.point for c in characters]
        images = np.empty((len(points), DRAWERS, SIDE, SIDE), np.uint8)
        for face in FACES:
            lines = thin(FontFace(face).masks(points))
            for number, drawer in enumerate(drawers):
                if drawer.face == face:
                    hand = np.random.Generator(np.random.Philox(key=np.array([drawing_seed, number], np.uint64)))
                    images[:, number] = draw(lines, drawer, hand)
                    advance(1)
    return GlyphSet(images, [c.alphabet for c in characters], [c.split for c in characters], points)


def _recipe(drawing_seed: int) -> str:
    """A hash of everything that the images depend on: seed, fonts, freetype and the drawing code."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(EXTRA_HINT) from error
    digest = hashlib.sha256(f"{drawing_seed} {matplotlib.__version__} {freetype_version()}".encode())
    for module in (glyph_alphabets, glyph_characters, glyph_drawers, glyph_fonts, glyph_strokes):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()[:16]
