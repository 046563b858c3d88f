"""The cache of rendered and decoded images: atomic and checked. A broken cache never stops the user."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from fastmaml.tasks import cache

ARRAYS = {"images": np.arange(5000, dtype=np.uint8), "names": np.array(["a", "bé"])}


def refuse() -> dict[str, np.ndarray]:
    raise AssertionError("made again")


def test_arrays_are_made_once(tmp_path):
    for make in (lambda: ARRAYS, refuse):
        stored = cache.cached("x.npz", make, tmp_path)
        assert stored.keys() == ARRAYS.keys()
        assert all((stored[name] == ARRAYS[name]).all() for name in ARRAYS)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * 100, lambda b: b[:2000] + b"?" + b[2001:]]
)
def test_a_damaged_file_is_made_again(tmp_path, caplog, damage):
    path = tmp_path / "x.npz"
    cache.save_arrays(path, ARRAYS)
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING, "fastmaml"):
        stored = cache.cached("x.npz", lambda: ARRAYS, tmp_path)
    assert (stored["images"] == ARRAYS["images"]).all()
    assert "cannot be read" in caplog.text
    assert (cache.cached("x.npz", refuse, tmp_path)["images"] == ARRAYS["images"]).all()


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    cache.save_arrays(path, ARRAYS)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        cache.save_arrays(path, {"images": np.zeros(3)})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.npz"]


def test_a_folder_that_cannot_be_written_costs_a_warning_only(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with caplog.at_level(logging.WARNING, "fastmaml"):
        stored = cache.cached("x.npz", lambda: ARRAYS, tmp_path / "file" / "below")
    assert (stored["images"] == ARRAYS["images"]).all() and "cannot be written" in caplog.text


def test_the_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("FASTMAML_CACHE", "/somewhere")
    assert cache.cache_folder() == Path("/somewhere")
    monkeypatch.delenv("FASTMAML_CACHE")
    assert cache.cache_folder() == Path.home() / ".cache" / "fastmaml"
