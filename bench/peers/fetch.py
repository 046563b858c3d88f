"""Downloads the libraries that we only measure against. pip puts them into the cache folder, never into the environment."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import tarfile
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

from bench.peers import Missing
from fastmaml.tasks.cache import cache_folder


def folder(name: str) -> Path:
    """The folder of a downloaded library."""
    return cache_folder() / "peers" / name


def installed(package: str, version: str) -> types.ModuleType:
    """The package, from the environment or else from the cache folder. The first use downloads its wheel."""
    if importlib.util.find_spec(package) is None:
        place = folder(f"{package}-{version}")
        if not place.is_dir():
            _into(place, lambda part: _pip("install", "--no-deps", "--target", str(part), f"{package}=={version}"))
        sys.path.append(str(place))
        importlib.invalidate_caches()
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Missing(f"{package} cannot be imported: {error}") from error


def unpacked_source(package: str, version: str) -> Path:
    """The folder of a package's released sources. The first use downloads and unpacks them; nothing is built."""
    place = folder(f"{package}-{version}-source")
    if not place.is_dir():

        def unpack(part: Path) -> None:
            with tempfile.TemporaryDirectory() as downloads:
                _pip("download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", downloads,
                     f"{package}=={version}")  # fmt: skip
                (archive,) = Path(downloads).glob("*.tar.gz")
                with tarfile.open(archive) as sources:
                    sources.extractall(part, filter="data")

        _into(place, unpack)
    return place / f"{package}-{version}"


def _into(place: Path, fill: Callable[[Path], None]) -> None:
    """Fills a temporary folder and moves it to `place` when it is complete."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as part:
        inside = Path(part) / "new"
        inside.mkdir()
        fill(inside)
        inside.rename(place)


def _pip(*words: str) -> None:
    print(f"fetching: pip {' '.join(words)}", file=sys.stderr)
    done = subprocess.run([sys.executable, "-m", "pip", "--quiet", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        complaints = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = complaints[-1] if complaints else f"exit status {done.returncode}"
        raise Missing(f"pip could not fetch {words[-1]} ({reason})")
