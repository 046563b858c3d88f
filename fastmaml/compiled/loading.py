"""Loads the compiled module and the CUDA library. If one is not available, returns the reason in one sentence."""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys

from fastmaml import build


@functools.lru_cache(maxsize=1)
def load_compiled() -> str:
    """Loads fastmaml._C, and builds it first if it is missing. Returns "", or the reason for a failure in one sentence."""
    try:
        build.load()
    except build.BuildError as error:
        return f"the compiled module is not available: {error}"
    importlib.import_module("fastmaml.compiled.fake_operators")
    return ""


@functools.lru_cache(maxsize=1)
def load_cuda() -> str:
    """Loads the CUDA library after the compiled module. Returns "", or the reason for a failure in one sentence."""
    if missing := load_compiled():
        return missing
    try:
        ctypes.CDLL("libcuda.so.1")  # first, so that no library is built that cannot run
    except OSError:
        return "no CUDA driver on this machine"
    try:
        build.load_cuda()
        sys.modules["fastmaml._C"].try_cuda()  # type: ignore[attr-defined]
    except (build.BuildError, RuntimeError) as error:
        return str(error)
    return ""
