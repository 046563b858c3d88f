"""Batch norm statistics of one network as vectors [R]: computes them from a batch, and writes them into the model.

R counts the channels of all batch norms, in the order of model.modules(). MAML++ keeps a row [R] for each inner step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from fastmaml.problem.batch_norm import check_mode, statistics


def channels(model: nn.Module) -> int:
    """R, the number of channels. Raises ValueError if the model has no batch norm, or one without running statistics."""
    check_mode(model, "frozen")
    total = sum(norm.num_features for norm in _norms(model))
    if total == 0:
        raise ValueError(f"the model ({type(model).__name__}) has no batch norm whose statistics could be kept")
    return total


@torch.no_grad()
def of_batch(model: nn.Module, params: Mapping[str, Tensor], x: Any) -> tuple[Tensor, Tensor]:
    """(mean [R], unbiased variance [R]) of the inputs of each batch norm, for one task's examples x [N, ...]."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def see(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        over = [d for d in range(inputs[0].dim()) if d != 1]
        seen[norm] = inputs[0].mean(over), inputs[0].var(over, unbiased=True)

    handles = [norm.register_forward_pre_hook(see) for norm in _norms(model)]
    try:
        with statistics(model, "transductive"):
            functional_call(model, dict(params), x if isinstance(x, tuple) else (x,))
    finally:
        for handle in handles:
            handle.remove()
    means, variances = zip(*(seen[norm] for norm in _norms(model)))
    return torch.cat(means), torch.cat(variances)


def put(model: nn.Module, mean: Tensor, var: Tensor) -> None:
    """Writes mean [R] and var [R] into the running statistics of the model's batch norms."""
    sizes = [norm.num_features for norm in _norms(model)]
    for norm, of_mean, of_var in zip(_norms(model), mean.split(sizes), var.split(sizes)):
        norm.running_mean, norm.running_var = of_mean.clone(), of_var.clone()


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]
