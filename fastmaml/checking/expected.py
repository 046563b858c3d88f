"""The expected meta-gradient: inner loop, losses and batch norm mode as plain data, given or taken from a learner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmaml.algorithms.anil import ANIL
from fastmaml.algorithms.learner import Learner
from fastmaml.algorithms.mamlpp import MAMLPlusPlus
from fastmaml.inner import SGD, Optimizer
from fastmaml.problem import batch_norm as batch_norm_modes
from fastmaml.problem.checks import whole_number
from fastmaml.problem.inner_rates import expand_rates
from fastmaml.problem.losses import Loss, per_example
from fastmaml.problem.parameters import ParameterLayout

# The tensors of a call that the oracle can unroll with. A learner with others is compared with finite differences.
_UNROLLED = {"loss_weights", "proximal", "step_rows"}


@dataclass(frozen=True)
class Expected:
    """The meta-loss (K steps of `inner` on the support loss, then the query loss) and how to differentiate it."""

    loss: Loss
    inner: Optimizer  # with its rates
    inner_steps: int
    batch_norm: str = "transductive"
    label_smoothing: float = 0.0
    first_order: bool = False
    truncate: int | None = None  # exact through the last `truncate` steps, identity before them
    adapted: Sequence[str] | None = None  # name patterns of the parameters that the inner loop moves
    loss_weights: Tensor | None = None  # [K+1] of the query losses at phi[0] .. phi[K]
    minibatch: int | None = None  # step k sees support rows k B .. k B + B - 1
    proximal: float = 0.0  # + proximal (phi - theta) to each step's gradient
    step_rows: Mapping[str, Tensor] | None = None  # [K, *shape]: parameters with a value of their own at every step
    reduction: str = "mean"  # of the tasks' losses: "mean" | "sum"

    def checked(self, model: nn.Module) -> Expected:
        """Returns self. Raises ValueError or TypeError if it does not fit the model."""
        layout = ParameterLayout(model)
        like = next(model.parameters())
        per_example(self.loss, self.label_smoothing)
        batch_norm_modes.check_mode(model, self.batch_norm)
        whole_number("inner_steps", self.inner_steps, 0)
        if self.truncate is not None:
            whole_number("truncate", self.truncate, 0)
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction {self.reduction!r} is neither 'mean' nor 'sum'")
        expand_rates(self.inner.lr, layout, self.moved_mask(model), like, self.inner_steps)
        return self

    def moved_mask(self, model: nn.Module) -> Tensor | None:
        """[P]: 1 on the entries that the inner loop moves; None: all."""
        layout, like = ParameterLayout(model), next(model.parameters())
        mask = layout.trainable(model.parameters(), like)
        if self.adapted is None:
            return mask
        chosen = layout.matching(self.adapted, like)
        return chosen if mask is None else mask * chosen

    def moved(self, model: nn.Module) -> list[str]:
        """The names of the parameters that the inner loop moves."""
        layout, mask = ParameterLayout(model), self.moved_mask(model)
        names = [n for n in layout.names if n not in (self.step_rows or {})]
        return names if mask is None else [n for n in names if bool(layout.split(mask)[n].flatten()[:1].any())]

    @property
    def plain(self) -> bool:
        """Whether an inner step is phi - lr * g and nothing else."""
        i = self.inner
        extra = i.weight_decay, i.clip_value, i.clip_norm, self.proximal
        return isinstance(i, SGD) and not i.momentum and not any(extra)

    def words(self) -> str:
        """For the report's first line: "2 inner steps of SGD at rate 0.1"."""
        rate = self.inner.lr
        given = f"at rate {rate:g}" if isinstance(rate, (int, float)) else "at the given rates"
        steps = "1 inner step" if self.inner_steps == 1 else f"{self.inner_steps} inner steps"
        order = "first order, " if self.first_order else ""
        norm = "" if self.batch_norm == "transductive" else f", batch_norm='{self.batch_norm}'"
        return f"{order}{steps} of {type(self.inner).__name__} {given}{norm}"


def expected_of_learner(learner: Learner) -> Expected | str:
    """The expected meta-gradient of a learner, or the reason why the oracle cannot unroll it."""
    name, kind = type(learner).__name__, type(learner)
    own_sweep = kind.meta_step not in [known.meta_step for known in (Learner, MAMLPlusPlus, ANIL)]
    if own_sweep or kind.start is not Learner.start:
        return f"{name} defines its own gradient"
    options, tensors = learner.options(), learner.call_tensors()
    more = [given for given, value in tensors.items() if given not in _UNROLLED and value is not None]
    if more:
        return f"{name} uses {', '.join(more)}"
    engine = learner.engine
    return Expected(
        engine.loss_name,
        learner.inner,
        learner.inner_steps,
        engine.batch_norm,
        engine.label_smoothing,
        first_order=options.first_order,
        truncate=options.truncate,
        adapted=options.adapted,
        minibatch=options.minibatch,
        **{given: value for given, value in tensors.items() if value is not None},
    )


class Rates:
    """Inner learning rates as leaves of a graph, and the rate of one parameter at one step.

    leaves: by their names in the report, "inner_lr" or "inner_lr.NAME".
    """

    def __init__(self, lr: Any, model: nn.Module, dtype: torch.dtype):
        self.leaves: dict[str, Tensor] = {}
        self.by_name = isinstance(lr, Mapping)
        device = next(model.parameters()).device
        for name, rate in lr.items() if isinstance(lr, Mapping) else [(None, lr)]:
            value = rate.detach() if isinstance(rate, Tensor) else torch.tensor(float(rate), dtype=torch.float64)
            key = "inner_lr" if name is None else f"inner_lr.{name}"
            self.leaves[key] = value.to(device, dtype, copy=True).requires_grad_()
        self.at, start = {}, 0
        for name, parameter in model.named_parameters():
            self.at[name] = slice(start, start + parameter.numel()), tuple(parameter.shape)
            start += parameter.numel()
        self.size = start

    def of(self, name: str, step: int) -> Tensor:
        """Broadcasts to the parameter's shape."""
        where, shape = self.at[name]
        if not self.by_name:
            rate = self.leaves["inner_lr"]
            row = rate[min(step, len(rate) - 1)] if rate.dim() == 2 else rate
            return row[where].reshape(shape) if row.dim() == 1 and len(row) == self.size > 1 else row.reshape(())
        if f"inner_lr.{name}" not in self.leaves:
            return next(iter(self.leaves.values())).new_zeros(())
        rate = self.leaves[f"inner_lr.{name}"]
        rows = rate.dim() > 0 and rate.dim() == len(shape) + 1
        return rate[min(step, len(rate) - 1)] if rows else rate

    @property
    def one_number(self) -> bool:
        """Whether every entry of every parameter has the same rate."""
        return not self.by_name and self.leaves["inner_lr"].numel() == 1
