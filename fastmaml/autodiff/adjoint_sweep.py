"""Inner loops and their adjoint sweep on flat vectors [T, P], for any object with gradients and Hessian products.

    phi[0] = theta                    phi[k+1] = update(phi[k], g[k]),   g[k] = grad L_S(phi[k])
    v = w[K] grad L_Q(phi[K])         v <- (part of the update rule) + H[k] y + w[k] grad L_Q(phi[k]),   k = K-1 .. 0

y is the adjoint of g[k]; plain gradient descent has y = -a v (ALGORITHMS 1.1 and 1.2). Memory holds phi[0..K], the
state of the update rule, and one step's activations. The compiled engine runs the same sweep as one fused Schedule.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastmaml.autodiff.update_rules import UpdateRule
from fastmaml.problem.examples import Examples, Rows
from fastmaml.problem.inner_loop import InnerLoop
from fastmaml.problem.results import MetaGradient


class Derivatives(Protocol):
    """First and second derivatives of every task's loss. `step` selects the masks of random layers (dropout)."""

    hvp_gives_gradient: bool

    def grad(self, params: Tensor, examples: Examples, step: int) -> tuple[Tensor, Tensor]:
        """(loss [T], grad [T, P]) of a support set."""

    def query(
        self, params: Tensor, examples: Examples, step: int, support_x: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss [T], grad [T, P], output [T, N, ...]). support_x: the statistics source for batch_norm="support"."""

    def hvp(self, params: Tensor, examples: Examples, v: Tensor, step: int) -> tuple[Tensor | None, Tensor]:
        """(grad [T, P] where hvp_gives_gradient, H v [T, P])."""


def support_of_step(support: Examples, loop: InnerLoop, k: int) -> Examples:
    if loop.minibatch is None:
        return support
    rows = slice(k * loop.minibatch, (k + 1) * loop.minibatch)
    return support.rows(rows)


def adapt(
    derivatives: Derivatives,
    theta: Tensor,
    support: Examples,
    loop: InnerLoop,
    rule: UpdateRule,
    rows: Rows | None = None,
    lam: float | Tensor = 0.0,
) -> tuple[Tensor, Tensor]:
    """(phi[K] [T, P], support losses [T, K]). With K = 0 and rows, the result is theta with row 0."""
    phi, losses = theta if rows is None else rows.put(theta, 0), []
    for k in range(loop.steps):
        if rows is not None:
            phi = rows.put(phi, k)
        loss, g = derivatives.grad(phi, support_of_step(support, loop, k), k)
        phi = rule.update(k, phi, g + lam * (phi - theta) if loop.proximal else g)
        losses.append(loss)
    return phi, columns(losses, theta)


def meta_gradient(
    derivatives: Derivatives,
    theta: Tensor,
    support: Examples,
    query: Examples,
    loop: InnerLoop,
    rule: UpdateRule,
    rates: int,
    loss_weights: Tensor | None = None,
    rows: Rows | None = None,
    lam: float | Tensor = 0.0,
    statistics_of: Tensor | None = None,
) -> MetaGradient:
    """The meta-gradient of each task [T, P], by the sweep from theta [T, P].

    rates: number of rows of the rate tensor, 1 or K. statistics_of: support_x for batch_norm="support".
    In the result, inner_lr_grad is [T, 1 or K, P] and step_rows_grad [T, K, R].
    """
    K, first_order = loop.steps, loop.order == 0
    keep_g = rule.needs_gradient or (loop.rate_grad and (first_order or not derivatives.hvp_gives_gradient))
    weight = [1.0] * (K + 1) if loss_weights is None else loss_weights

    # phi[0] .. phi[K]
    phi, losses = [theta if rows is None else rows.put(theta, 0)], []
    gradients: list[Tensor | None] = []
    for k in range(K):
        if rows is not None:
            phi[k] = rows.put(phi[k], k)
        loss, g = derivatives.grad(phi[k], support_of_step(support, loop, k), k)
        g = g + lam * (phi[k] - theta) if loop.proximal else g
        phi.append(rule.update(k, phi[k], g))
        gradients.append(g if keep_g else None)
        losses.append(loss)

    # the query at phi[K]
    queries = set(loop.query_steps)
    query_losses: dict[int, Tensor] = {}
    query_losses[K], q, output = derivatives.query(phi[K], query, K, statistics_of)
    v = weight[K] * q
    phi.pop()

    # the sweep
    rate_grad = theta.new_zeros((len(theta), rates, theta.shape[1])) if loop.rate_grad else None
    rows_grad = None if rows is None else theta.new_zeros((len(theta), *rows.values.shape))
    anchor_grad = torch.zeros_like(theta)
    for k in reversed(range(K)):
        point = phi.pop()
        if k >= loop.sweep_from:
            before, kept = v, gradients.pop()
            v, y = rule.adjoint(k, v, point, kept)
            if loop.proximal:
                v = v + lam * y
                anchor_grad = anchor_grad - lam * y
            if k >= loop.hessian_from:
                of_loss, hy = derivatives.hvp(point, support_of_step(support, loop, k), y, k)
                v = v + hy
                if kept is None and of_loss is not None:
                    kept = of_loss + lam * (point - theta) if loop.proximal else of_loss
            if rate_grad is not None:
                assert kept is not None
                rate_grad[:, k if rates > 1 else 0] += rule.rate_grad(k, before, point, kept)
        if rows is not None and rows_grad is not None and k > 0:
            rows_grad[:, min(k, rows_grad.shape[1] - 1)] += v[:, rows.places]
            v = v.index_fill(1, rows.places, 0.0)
        if k in queries:
            judged = point if rows is None or k == 0 else rows.put(point, k - 1)
            query_losses[k], q, _ = derivatives.query(judged, query, k, statistics_of)
            v = v + weight[k] * q
    if loop.proximal:
        v = v + anchor_grad
    order = [query_losses[k] for k in loop.query_steps]
    loss = sum((weight[k] * query_losses[k] for k in loop.query_steps), torch.zeros_like(order[0]))
    return MetaGradient(loss, v, output, rate_grad, columns(losses, theta), rows_grad, columns(order, theta))


def columns(losses: list[Tensor], like: Tensor) -> Tensor:
    """[T] tensors side by side: [T, n]."""
    return torch.stack(losses, dim=1) if losses else like.new_zeros((like.shape[0], 0))
