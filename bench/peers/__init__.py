"""Implementations with other libraries, one file each, with the interface of fastmaml/benchmark/peers."""

from __future__ import annotations

from fastmaml.benchmark.peers import Missing

__all__ = ["Missing"]
