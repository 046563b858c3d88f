"""The same random layers (dropout) in several calls of an Engine, each of which draws its own masks otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def replayed(state: Tensor) -> Iterator[None]:
    """Runs a block from torch's generator state `state` (torch.get_rng_state()) and puts the generator back."""
    before = torch.get_rng_state()
    torch.set_rng_state(state)
    try:
        yield
    finally:
        torch.set_rng_state(before)
