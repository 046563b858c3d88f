"""What comes back: a meta-gradient, adapted parameters, the solution of a linear system."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class MetaGradient(NamedTuple):
    """A meta-gradient and what was computed on the way. No field carries a graph.

    Engine.meta_gradient returns it as written here. The backends below it leave the two gradients marked with * in rows
    of the flat vector, and `autodiff` has not yet summed over tasks: the engine brings them into this form.
    """

    loss: Tensor  # [T] query losses after the inner steps, weighted by loss_weights where given
    grad: Tensor  # [P] gradient of the weighted sum of the losses, by default their mean; [T, P] with per_task
    query_output: Tensor  # [T, N, ...]
    inner_lr_grad: Any  # * as the rates (a 0-d tensor for a number), None if not asked for; below [1 or K, P]
    support_losses: Tensor  # [T, K] before each inner step
    step_rows_grad: Any = None  # * {name: as step_rows}; below [K, R]
    query_losses: Tensor | None = None  # [T, n] at every phi[k] with a weight, by default at phi[K] alone
    total_loss: Tensor | None = None  # scalar: the weighted sum of the losses, where it costs nothing


class Solution(NamedTuple):
    """An approximate solution s of A s = v for every task, and how conjugate gradients reached it (Engine.solve)."""

    solution: Tensor  # [T, P]
    residual: Tensor  # [T] |v - A s| / |v|
    iterations: Tensor  # [T] steps taken
    negative_curvature: Tensor  # [T] whether the task ended at a direction with p.Ap <= 0
    history: Tensor  # [T, 1 + steps] the residual before the first step and after each; a task that has ended repeats its last


class Adaptation(NamedTuple):
    """What Engine.adapt_with returns."""

    params: Tensor  # [T, P]
    losses: Tensor  # [T, K] before each inner step
    state: Tensor | None  # [T, S P] the optimizer's vectors after the last step; None for plain gradient descent
