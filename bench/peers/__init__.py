"""Implementations of other libraries, one file each, in the form of fastmaml/benchmark/peers (NAME, version, prepare)."""

from __future__ import annotations

from fastmaml.benchmark.peers import Missing

__all__ = ["Missing"]
