"""Checked examples of all tasks, and the tensors of an inner loop."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Examples(NamedTuple):
    """x [T, N, ...], y [T, N, ...] and the weights of the examples in the loss, w [T, N]. w None: equal weights."""

    x: Tensor
    y: Tensor
    w: Tensor | None

    def weighted(self, minibatch: int | None = None) -> Examples:
        """The same examples with explicit weights: 1/N each, or 1/minibatch if a step sees a minibatch."""
        if self.w is not None:
            return self
        return self._replace(w=self.x.new_full(self.x.shape[:2], 1.0 / (minibatch or self.x.shape[1])))

    def rows(self, chosen: slice) -> Examples:
        """A slice of each task's examples."""
        return Examples(self.x[:, chosen], self.y[:, chosen], None if self.w is None else self.w[:, chosen])


class Rows(NamedTuple):
    """Parameters with their own values at every step: places [R] in theta, values [K, R]."""

    places: Tensor
    values: Tensor

    def put(self, phi: Tensor, k: int) -> Tensor:
        """phi with the values of step k. Steps beyond the last row reuse the last row."""
        return phi.index_copy(1, self.places, self.values[min(k, len(self.values) - 1)].expand(len(phi), -1))


class LoopTensors(NamedTuple):
    """The tensors of an inner loop; InnerLoop.text() holds its other settings."""

    rates: Tensor  # [1 or K, P]
    rows: Rows | None = None
    lam: float = 0.0
    mask: Tensor | None = None  # [P] entries that the loop moves; used by clip_norm
