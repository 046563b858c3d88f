"""Keeps arrays that are slow to make (rendered or decoded images) in a file of the user's cache folder."""

from __future__ import annotations

import logging
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

log = logging.getLogger("fastmaml")


def cache_folder() -> Path:
    """$FASTMAML_CACHE, or ~/.cache/fastmaml."""
    return Path(os.environ.get("FASTMAML_CACHE") or Path.home() / ".cache" / "fastmaml")


def cached(
    file_name: str, make: Callable[[], dict[str, np.ndarray]], folder: Path | None = None
) -> dict[str, np.ndarray]:
    """The arrays of `folder`/`file_name`, or of `make()`, which are then saved there. Default folder: the cache folder.

    `file_name` must include everything that the arrays depend on. A damaged file is made again. If the folder cannot be
    written, a warning is logged and the arrays are made again next time.
    """
    path = (folder or cache_folder()) / file_name
    try:
        return load_arrays(path)
    except FileNotFoundError:
        pass
    except ValueError as error:
        log.warning("%s; making it again", error)
    arrays = make()
    try:
        save_arrays(path, arrays)
    except OSError as error:
        log.warning("%s cannot be written (%s), so it will be made again next time", path, error)
    return arrays


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Arrays of an .npz file, with verified checksums.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"the cache file {path} cannot be read ({error})") from error


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz file. At any time `path` holds the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as out:
            np.savez(out, **arrays)  # type: ignore[arg-type]
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
