"""Curvature: products with each task's Hessian or Gauss-Newton matrix at fixed parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmaml.problem import checks
from fastmaml.problem.arrays import any_arrays


class Curvature:
    """Products with the matrix M[t] of every task's loss at fixed parameters. Make one with Engine.curvature.

    On compiled backends the object holds the activations of all tasks, and for the Hessian the gradients by the
    activations. A product then computes only tangents. `bytes`: the memory that the object holds.
    """

    def __init__(self, product: Callable[[Tensor], Tensor], tasks: int, like: Tensor, kept: tuple[Tensor, ...]):
        self._product, self._tasks, self._like = product, tasks, like
        self.bytes = sum(part.numel() * part.element_size() for part in kept)

    @any_arrays
    def product(self, v: Tensor) -> Tensor:
        """M[t] v[t] for v [T, P]: [T, P]. Rows and columns of frozen parameters are zero."""
        v = checks.weights("v", v, (self._tasks, self._like.shape[-1]), self._like)
        with torch.no_grad():
            return self._product(v.detach().contiguous())
