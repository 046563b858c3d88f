"""Meta-SGD: the start and a learning rate for every parameter are learned together (Li et al. 2017, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastmaml.algorithms.learner import Learner
from fastmaml.inner import Optimizer, optimizer_of
from fastmaml.problem.losses import Loss
from fastmaml.problem.parameters import ParameterLayout


class MetaSGD(Learner):
    """phi = theta - alpha * grad L_support(theta), usually once; theta and alpha follow the gradient of L_query(phi).

    alpha has the shape of theta and no constraint on its sign (eq. 3 of the paper). Its gradient is -sum_k g_k * v[k+1]
    (ALGORITHMS 1.2): exact, for any number of inner steps, which all share it.

        learner = MetaSGD(model)
        optimizer = torch.optim.Adam(learner.parameters(), 1e-3)   # of the model and of "inner_lr.NAME"

    inner_lr: where every rate starts, a number or a range (low, high) to draw from, by default (0.005, 0.1); drawn with
    `seed`, without touching torch's own generator. Or `inner`, an optimizer of fm.inner whose lr says that. The rest is
    Learner's; parameters that are frozen or not adapted have no rate. Raises ValueError for a range that is not one.
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: float | tuple[float, float] | None = None,
        inner_steps: int = 1,
        loss: Loss = "cross_entropy",
        *,
        seed: int = 0,
        inner: Optimizer | None = None,
        adapted: str | Sequence[str] = "*",
        **options: Any,
    ):
        start: Any = (0.005, 0.1) if inner_lr is None and inner is None else inner_lr
        optimizer = optimizer_of(start, inner)
        generator = torch.Generator().manual_seed(seed)
        named = dict(model.named_parameters())
        rates = {
            name: nn.Parameter(_start(optimizer.lr, named[name], generator))
            for name in ParameterLayout(model).fitting([adapted] if isinstance(adapted, str) else adapted)
            if named[name].requires_grad
        }
        super().__init__(model, None, inner_steps, loss, inner=replace(optimizer, lr=rates), adapted=adapted, **options)


def _start(inner_lr: Any, like: Tensor, generator: torch.Generator) -> Tensor:
    if isinstance(inner_lr, (int, float)):
        return torch.full_like(like, inner_lr)
    if not isinstance(inner_lr, (tuple, list)) or len(inner_lr) != 2 or not inner_lr[0] <= inner_lr[1]:
        raise ValueError(f"inner_lr is {inner_lr!r}; it must be a number or a range (low, high)")
    low, high = inner_lr
    drawn = torch.rand(like.shape, generator=generator, dtype=torch.float64)
    return (low + (high - low) * drawn).to(like)
