"""Downloads one published file over HTTP, with a progress line. Resumes an interrupted download."""

from __future__ import annotations

import hashlib
import os
import ssl
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from .progress_line import progress_line

CHUNK = 1 << 16
ATTEMPTS = 5  # at most; each one must make progress
TIMEOUT = 30.0  # seconds without a byte
NETWORK_ERRORS = (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, HTTPException)  # not: disk full


def download_file(url: str, target: Path, md5: str) -> None:
    """Download `url` to `target`. The file appears only when it is complete and its MD5 is `md5`.

    A partial download stays in `target`.part, so a later call fetches only the rest.

    Raises:
        ConnectionError: the server cannot be reached, or stopped for good.
        ValueError: the server sent another file than the published one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    attempt = 1
    while True:
        before = _size(part)
        try:
            _fetch_rest(url, part)
            break
        except NETWORK_ERRORS as error:
            if attempt == ATTEMPTS or _size(part) == before:
                raise ConnectionError(
                    f"downloading it from {url} failed ({getattr(error, 'reason', error)})"
                ) from error
            attempt += 1
    found = _md5(part)
    if found != md5:
        part.unlink()
        raise ValueError(
            f"the file from {url} has MD5 {found}, not the published {md5}, and was deleted: run the command again"
        )
    os.replace(part, target)


def _fetch_rest(url: str, part: Path) -> None:
    """Append the missing bytes to `part`. Start again if the server cannot resume."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # no bytes are missing
            return
        raise
    with answer:
        resumed = answer.status == 206
        start = have if resumed else 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length else 0
        label = f"downloading {part.stem}"
        with progress_line(label, total, " bytes", start) as advance, open(part, "ab" if resumed else "wb") as out:
            while chunk := answer.read(CHUNK):
                out.write(chunk)
                advance(len(chunk))
            out.flush()
            if _size(part) < total:
                raise ConnectionError(f"the server stopped after {_size(part)} of {total} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
