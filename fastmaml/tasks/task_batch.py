"""TaskBatch: the batch that every task source returns, and every engine and learner takes."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TaskBatch(NamedTuple):
    """T tasks. The support examples adapt, the query examples judge.

    Shapes: `support_x` [T, S, *input], `support_y` [T, S] (int64 labels) or [T, S, *output] (regression targets).
    `query_x` and `query_y` have Q query examples instead of S.
    """

    support_x: torch.Tensor
    support_y: torch.Tensor
    query_x: torch.Tensor
    query_y: torch.Tensor

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TaskBatch:
        """The batch on `device`, with floating-point tensors as `dtype`. Labels stay int64."""
        return TaskBatch(*(t.to(device, dtype if t.is_floating_point() else None) for t in self))
