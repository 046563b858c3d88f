"""Loads the compiled module, and the CUDA library beside it; says in one sentence why one cannot be had."""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys

from fastmaml import build


@functools.lru_cache(maxsize=1)
def load_compiled() -> str:
    """Loads fastmaml._C, building it when it is missing; returns "" or the sentence that says why it cannot."""
    try:
        build.load()
    except build.BuildError as error:
        return f"the compiled module is not available: {error}"
    importlib.import_module("fastmaml.compiled.fake_operators")
    return ""


@functools.lru_cache(maxsize=1)
def load_cuda() -> str:
    """Loads the CUDA library beside the compiled module; returns "" or the sentence that says why it cannot run here."""
    if missing := load_compiled():
        return missing
    try:
        ctypes.CDLL("libcuda.so.1")  # before a library is built that could not run
    except OSError:
        return "no CUDA driver on this machine"
    try:
        build.load_cuda()
        sys.modules["fastmaml._C"].try_cuda()  # type: ignore[attr-defined]
    except (build.BuildError, RuntimeError) as error:
        return str(error)
    return ""
