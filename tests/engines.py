# An Engine and the oracle for a network case. The exact results are cached: every backend is compared with the same numbers.
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import oracle
import torch
from cases import Data, NetworkCase, build, draw_data, flatten
from torch import Tensor, nn

import fastmaml as fm


@dataclass(frozen=True)
class Setup:
    model: nn.Module
    theta: Tensor  # [P]
    data: Data
    loss: Callable[..., Tensor]
    mask: Tensor  # [P]

    @property
    def P(self) -> int:
        return self.theta.numel()

    def batch(self, dtype: torch.dtype = torch.float64) -> fm.TaskBatch:
        return fm.TaskBatch(*self.data.to(dtype).tuple)


@cache
def setup(case: NetworkCase, seed: int = 0) -> Setup:
    model = build(case, seed)
    theta = flatten(model).float().double()
    return Setup(
        model,
        theta,
        draw_data(case, seed),
        oracle.loss_function(case.loss, case.label_smoothing),
        oracle.trainable(model),
    )


def engine(case: NetworkCase, backend, seed: int = 0, **how) -> fm.Engine:
    """The case's Engine. Fails if another backend than the requested one runs."""
    made = fm.Engine(
        setup(case, seed).model, loss=case.loss, backend=backend.name, label_smoothing=case.label_smoothing, **how
    )
    assert made.backend == backend.name, f"{case} runs on {made.backend}: {made.why}"
    assert made.fused == (backend.name != "autodiff"), made.why
    return made


def rates(case: NetworkCase, per_parameter: bool = False, seed: int = 0) -> Tensor:
    """[P]: one rate everywhere, or a different one for each parameter."""
    P = setup(case, seed).P
    if not per_parameter:
        return torch.full((P,), case.inner_lr, dtype=torch.float64)
    return case.inner_lr * (0.5 + torch.rand(P, generator=torch.Generator().manual_seed(5)).double()).float().double()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@cache
def exact(
    case: NetworkCase,
    inner_steps: int,
    *,
    per_parameter: bool = False,
    first_order: bool = False,
    batch_norm: str = "transductive",
    seed: int = 0,
) -> oracle.Result:
    s = setup(case, seed)
    apply = oracle.network(s.model, batch_norm)
    return oracle.meta_gradient(
        apply, s.theta, s.data.tuple, s.loss, rates(case, per_parameter, seed), inner_steps,
        first_order=first_order, mask=s.mask, support_statistics=batch_norm == "support",
    )  # fmt: skip
