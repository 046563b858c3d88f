"""The two public Omniglot zips: finds them, checks them, and reads their drawings at 28 by 28."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .cache import cache_folder, cached
from .download import download_file
from .progress_line import progress_line

SOURCE = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
DRAWERS = 20
SIDE = 28
ORIGINAL_SIDE = 105


class Part(NamedTuple):
    """One of the two zips. `md5` belongs to the published file; a repackaged zip has another MD5 and works too."""

    name: str
    characters: int
    md5: str

    @property
    def file_name(self) -> str:
        return f"{self.name}.zip"


BACKGROUND = Part("images_background", 964, "68d2efa1b9178cc56df9314c21c6e718")
EVALUATION = Part("images_evaluation", 659, "6b91aef0f799c5bb55b94e3f2daec811")
PARTS = (BACKGROUND, EVALUATION)


class Drawings(NamedTuple):
    """Drawings of one zip: character names, and images uint8 [characters, 20, 28, 28], 255 = ink."""

    names: list[str]
    images: np.ndarray


def load_omniglot(
    root: str | Path | None = None, download: bool = True, resize: str = "lanczos"
) -> tuple[Drawings, Drawings]:
    """Background and evaluation drawings. The first call decodes them; later calls read the cache folder.

    Looks for the zips in `root`, `root`/omniglot and `root`/omniglot-py (torchvision's folder). Without `root`: in the same
    places under $FASTMAML_DATA, then in the cache folder.

    `resize`: "lanczos" smooths, "nearest" keeps one bit per pixel. PIL always resizes 1-bit pictures with NEAREST. So the
    code of MAML and of prototypical networks trained on "nearest".

    Raises:
        FileNotFoundError: a zip is missing and `download` is False.
        ConnectionError: a zip is missing and cannot be downloaded.
        ValueError: a zip is not the Omniglot zip, or is damaged.
    """
    background, evaluation = (_load_part(part, _find(part, root, download), resize) for part in PARTS)
    return background, evaluation


def _folders(root: str | Path | None) -> list[Path]:
    data = os.environ.get("FASTMAML_DATA")
    bases = [Path(root)] if root is not None else [*([Path(data)] if data else []), cache_folder()]
    return [base / below for base in bases for below in ("", "omniglot", "omniglot-py")]


def _find(part: Part, root: str | Path | None, download: bool) -> Path:
    for folder in _folders(root):
        if (folder / part.file_name).is_file():
            return folder / part.file_name
    target = (Path(root) if root is not None else cache_folder() / "omniglot") / part.file_name
    if not download:
        raise FileNotFoundError(
            f"{target} is missing: put the public Omniglot zips there, give their folder with --root, or download them "
            "with 'fastmaml data omniglot --download'"
        )
    try:
        download_file(f"{SOURCE}/{part.file_name}", target, part.md5)
    except ConnectionError as error:
        raise ConnectionError(
            f"{target} is missing and {error}: run the command again to resume, put the public Omniglot zips there, or "
            "give their folder with --root"
        ) from error
    return target


def _load_part(part: Part, path: Path, resize: str) -> Drawings:
    key = hashlib.sha256(f"{_fingerprint(path)} {SIDE} {resize}".encode()).hexdigest()[:16]

    def make() -> dict[str, np.ndarray]:
        names, images = decode(part, path, resize)
        return {"names": np.array(names), "images": images}

    stored = cached(f"omniglot-{part.name}-{key}.npz", make)
    return Drawings(stored["names"].tolist(), stored["images"])


def _fingerprint(path: Path) -> str:
    """Size, time and the end of the file, which lists the checksums of a zip's files."""
    status = path.stat()
    with open(path, "rb") as file:
        file.seek(max(0, status.st_size - (1 << 16)))
        return f"{status.st_size} {status.st_mtime_ns} {hashlib.sha256(file.read()).hexdigest()}"


def decode(part: Part, path: Path, resize: str = "lanczos") -> tuple[list[str], np.ndarray]:
    """Check a zip by its contents and read it: names, and images uint8 [characters, 20, 28, 28], 255 = ink.

    Raises:
        ImportError: Pillow is missing.
        ValueError: the zip is damaged, or does not hold `part.characters` characters of 20 readable drawings.
    """
    if importlib.util.find_spec("PIL") is None:
        raise ImportError("reading Omniglot needs Pillow: pip install 'fastmaml[vision]'")
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(part, path, archive.namelist())
            images = np.empty((len(members), DRAWERS, SIDE, SIDE), np.uint8)
            with progress_line(f"reading {path.name}", len(members)) as advance:
                for row, files in zip(images, members.values()):
                    for drawing, member in zip(row, files):
                        drawing[:] = _read_image(archive.read(member), f"{member} in {path}", resize)
                    advance(1)
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{path} is damaged or incomplete ({error}): delete it, then run 'fastmaml data omniglot --download'"
        ) from error
    return list(members), images


def _members(part: Part, path: Path, entries: list[str]) -> dict[str, list[str]]:
    """Character -> its 20 files in drawer order. Characters are in alphabetical order."""
    pattern = re.compile(rf"{part.name}/([^/]+/character\d+)/\d+_(\d+)\.png")
    found: dict[str, dict[int, str]] = {}
    for entry in entries:
        match = pattern.fullmatch(entry)
        if match:
            found.setdefault(match[1], {})[int(match[2])] = entry
    if len(found) != part.characters:
        raise ValueError(
            f"{path} holds {len(found)} characters of {part.name}, not {part.characters}: it is not the public Omniglot zip"
        )
    for character, files in found.items():
        if len(files) != DRAWERS:
            raise ValueError(f"{path} holds {len(files)} drawings of {character}, not {DRAWERS}: it is incomplete")
    return {character: [found[character][k] for k in sorted(found[character])] for character in sorted(found)}


def _read_image(data: bytes, where: str, resize: str) -> np.ndarray:
    """One PNG (0 = ink in the files) at 28 by 28: uint8, 255 = ink."""
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(data))
        side = picture.size
        small = picture.convert("L").resize((SIDE, SIDE), Image.Resampling[resize.upper()])
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{where} is not a readable picture ({error})") from error
    if side != (ORIGINAL_SIDE, ORIGINAL_SIDE):
        raise ValueError(f"{where} is {side[0]}x{side[1]} pixels, not {ORIGINAL_SIDE}x{ORIGINAL_SIDE}")
    return 255 - np.asarray(small)
