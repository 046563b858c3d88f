"""Plain conjugate gradients from zero, without a stopping rule. Shared by the implementations of W7 and W8."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradients(system: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """An approximate solution x [P] of system(x) = b, b [P]."""
    solution, residual, direction = torch.zeros_like(b), b, b
    size = residual @ residual
    for _ in range(steps):
        image = system(direction)
        length = size / (direction @ image)
        solution, residual = solution + length * direction, residual - length * image
        before, size = size, residual @ residual
        direction = residual + size / before * direction
    return solution
