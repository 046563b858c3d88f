"""Which characters of the DejaVu fonts make the `Glyphs` data set, and which alphabet belongs to which split."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import NamedTuple


class Alphabet(NamedTuple):
    """A named set of code points and the split that owns it."""

    name: str
    split: str
    ranges: tuple[tuple[int, int], ...]  # first and last code point, both included


# Scripts that share shapes (Latin, Greek, Cyrillic and their relatives) belong to one split. A letter that looks like one
# of an earlier alphabet is dropped. The alphabets of "train" come first, so test letters are always new.
ALPHABETS = (
    Alphabet("Latin", "train", ((0x41, 0x5A), (0x61, 0x7A))),
    Alphabet("Latin extended", "train", ((0xC0, 0x24F), (0x2C60, 0x2C7F), (0xA722, 0xA7AF))),
    Alphabet("Phonetic", "train", ((0x250, 0x2AF), (0x1D00, 0x1D7F))),
    Alphabet("Greek", "train", ((0x370, 0x3E1), (0x3F0, 0x3FF))),
    Alphabet("Coptic", "train", ((0x3E2, 0x3EF),)),
    Alphabet("Cyrillic", "train", ((0x400, 0x52F), (0xA640, 0xA69F))),
    Alphabet("Old Italic", "train", ((0x10300, 0x1032F),)),
    Alphabet("Lisu", "train", ((0xA4D0, 0xA4FF),)),
    Alphabet("Arabic", "train", ((0x620, 0x6D5),)),
    Alphabet("Canadian syllabics", "train", ((0x1401, 0x167F),)),
    Alphabet("Armenian", "val", ((0x531, 0x587),)),
    Alphabet("Hebrew", "val", ((0x5D0, 0x5EA),)),
    Alphabet("Ogham", "val", ((0x1681, 0x169A),)),
    Alphabet("Asomtavruli (Georgian)", "test", ((0x10A0, 0x10C5),)),
    Alphabet("Mkhedruli (Georgian)", "test", ((0x10D0, 0x10FF),)),
    Alphabet("Nuskhuri (Georgian)", "test", ((0x2D00, 0x2D2D),)),
    Alphabet("Lao", "test", ((0xE81, 0xEC4),)),
    Alphabet("N'Ko", "test", ((0x7CA, 0x7EA),)),
    Alphabet("Tifinagh", "test", ((0x2D30, 0x2D65),)),
)


def letters(alphabet: Alphabet, covered: Iterable[int]) -> list[int]:
    """Code points of `alphabet` in `covered` that are letters on their own: no accents, no modifiers, no compositions."""
    present = set(covered)
    points = (point for first, last in alphabet.ranges for point in range(first, last + 1) if point in present)
    return [
        p
        for p in points
        if unicodedata.category(chr(p)) in ("Lu", "Ll", "Lo") and not unicodedata.decomposition(chr(p))
    ]
