"""Implementations of other libraries, one file each, in the form of fastmaml/benchmark/baselines (NAME, version, prepare)."""

from __future__ import annotations

from fastmaml.benchmark.baselines import Missing

__all__ = ["Missing"]
