"""Gives several calls of an Engine the same dropout masks. Otherwise each call draws its own masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def replayed(state: Tensor) -> Iterator[None]:
    """Runs a block from torch's generator state `state` (torch.get_rng_state()), then restores the generator."""
    before = torch.get_rng_state()
    torch.set_rng_state(state)
    try:
        yield
    finally:
        torch.set_rng_state(before)
