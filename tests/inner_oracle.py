# The oracle for every row of ALGORITHMS 1.2 to 1.4: unrolled inner loops in plain torch, one task at a time, by double
# backward. It uses no engine code. The optimizers follow torch.optim's rules.
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LossOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # (phi [P], x, y) -> scalar


@dataclass
class Unrolled:
    """The weighted sum over tasks of the query loss, and its gradients."""

    losses: Tensor  # [T]
    grad: Tensor  # [P]
    rate_grad: Tensor  # as rates
    rows_grad: Tensor | None  # [K, R]


def unrolled(
    loss_of: LossOf,
    theta: Tensor,
    batch: tuple[Tensor, ...],
    rates: Tensor,
    steps: int,
    rule: dict[str, float] | None = None,
    loss_weights: list[float] | None = None,
    order: int | None = None,
    minibatch: int | None = None,
    proximal: float = 0.0,
    moved: Tensor | None = None,
    rows: tuple[Tensor, Tensor] | None = None,
    task_weights: Tensor | None = None,
) -> Unrolled:
    """theta [P], rates [1 or K, P]. rule: {"momentum": .9, ...} for SGD, {"adam": 1, "beta1": ...} for Adam.

    order J: the steps before the last J count as a constant start, and the gradient passes straight to theta. order 0
    stops the gradient at every raw g. rows: (places [R], values [K, R]).
    """
    rule = rule or {}
    theta = theta.detach().requires_grad_()
    rates = rates.detach().clone().requires_grad_()
    values = None if rows is None else rows[1].detach().clone().requires_grad_()
    weights = loss_weights or [0.0] * steps + [1.0]
    losses = []
    for support_x, support_y, query_x, query_y in zip(*batch):
        start, phi, state = theta, theta, {}
        loss = weights[0] * loss_of(theta, query_x, query_y) if weights[0] else torch.zeros((), dtype=theta.dtype)
        for k in range(steps):
            if rows is not None:
                phi = phi.index_copy(0, rows[0], values[k])
            at = slice(None) if minibatch is None else slice(k * minibatch, (k + 1) * minibatch)
            value = loss_of(phi, support_x[at], support_y[at])
            (g,) = torch.autograd.grad(value, phi, create_graph=True)
            g = g.detach() if order == 0 else g
            rate = rates[k if len(rates) > 1 else 0]
            if moved is not None:
                rate = rate * moved
            g = clipped(g, rule, moved) + proximal * (phi - start)
            phi = adam(phi, g, rate, rule, state, k) if "adam" in rule else sgd(phi, g, rate, rule, state)
            if order and k < steps - order:  # truncation: the identity instead of this step's Jacobian
                phi = phi.detach() + (theta - theta.detach())
                state = {name: value.detach() for name, value in state.items()}
            if weights[k + 1]:
                loss = loss + weights[k + 1] * loss_of(phi, query_x, query_y)
        losses.append(loss)
    stacked = torch.stack(losses)
    of_task = torch.full_like(stacked, 1 / len(losses)) if task_weights is None else task_weights
    leaves = [theta, rates] + ([] if values is None else [values])
    grads = torch.autograd.grad(stacked @ of_task, leaves, allow_unused=True, materialize_grads=True)
    return Unrolled(stacked.detach(), grads[0], grads[1], None if values is None else grads[2])


def clipped(g: Tensor, rule: dict[str, float], moved: Tensor | None) -> Tensor:
    if "clip_value" in rule:
        return g.clamp(-rule["clip_value"], rule["clip_value"])
    if "clip_norm" in rule:
        norm = (g if moved is None else g * moved).square().sum().sqrt()
        return g * (rule["clip_norm"] / norm) if norm > rule["clip_norm"] else g
    return g


def sgd(phi: Tensor, g: Tensor, rate: Tensor, rule: dict[str, float], state: dict[str, Tensor]) -> Tensor:
    """torch.optim.SGD: the first buffer is the undamped gradient."""
    d = g + rule.get("weight_decay", 0.0) * phi
    momentum = rule.get("momentum", 0.0)
    if momentum:
        buffer = state.get("b")
        state["b"] = d if buffer is None else momentum * buffer + (1 - rule.get("dampening", 0.0)) * d
        d = d + momentum * state["b"] if rule.get("nesterov") else state["b"]
    return phi - rate * d


def adam(phi: Tensor, g: Tensor, rate: Tensor, rule: dict[str, float], state: dict[str, Tensor], k: int) -> Tensor:
    """torch.optim.Adam and AdamW. If the second moment is zero, the square root has derivative zero."""
    beta1, beta2, decay = rule.get("beta1", 0.9), rule.get("beta2", 0.999), rule.get("weight_decay", 0.0)
    if not rule.get("decoupled"):
        g = g + decay * phi
    m = beta1 * state.get("m", torch.zeros_like(g)) + (1 - beta1) * g
    s = beta2 * state.get("s", torch.zeros_like(g)) + (1 - beta2) * g * g
    state.update(m=m, s=s)
    second = s / (1 - beta2 ** (k + 1))
    root = torch.where(second > 0, torch.where(second > 0, second, 1.0).sqrt(), 0.0)
    step = m / (1 - beta1 ** (k + 1)) / (root + rule.get("eps", 1e-8))
    return (phi * (1 - rate * decay) if rule.get("decoupled") else phi) - rate * step
