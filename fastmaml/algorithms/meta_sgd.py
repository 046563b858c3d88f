"""Meta-SGD: learns the start and one learning rate per parameter together (Li et al. 2017, algorithm 1)."""

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
    """phi = theta - alpha * grad L_support(theta), usually once. theta and alpha follow the gradient of L_query(phi).

    alpha has the shape of theta, and its sign is free (eq. 3 of the paper). All inner steps share alpha.
    The gradient of alpha is exact: -sum_k g_k * v[k+1] (ALGORITHMS 1.2).

        learner = MetaSGD(model)
        optimizer = torch.optim.Adam(learner.parameters(), 1e-3)   # the model and "inner_lr.NAME"

    inner_lr: the start of every rate, a number or a range (low, high) to draw from. Default: (0.005, 0.1).
    seed: the seed of the draws. torch's own generator is not used.
    inner: an optimizer of fm.inner, instead of inner_lr. Its lr gives the start of the rates.
    The other arguments are Learner's. Parameters that are frozen or not adapted have no rate.
    Raises ValueError if inner_lr is neither a number nor a range.
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
