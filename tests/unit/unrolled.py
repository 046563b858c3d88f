"""The reference meta-gradient: unrolled inner steps with double backward, one task after the other.

Also the small networks and batches of the engine's unit tests, and the backends that can run here.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn
from torch.func import functional_call

_compiled = importlib.util.find_spec("fastmaml._C") is not None
_skip = pytest.mark.skipif(not _compiled, reason="fastmaml._C is not built")
BACKENDS = ["autodiff", pytest.param("cpu", marks=_skip), pytest.param("reference", marks=_skip)]


def cross_entropy(output, y):
    return nn.functional.cross_entropy(output, y)


def mse(output, y):
    return ((output - y) ** 2).mean()


def meta_gradient(model, batch, rates, steps, loss=cross_entropy, first_order=False, task_weights=None, forward=None):
    """Losses [T], {name: gradient} of the weighted task losses, gradient of the rates {name: tensor like the parameter}.

    `rates` {name: tensor of the parameter's shape}. `forward(params, x, support_x)` replaces the model's own forward.
    """
    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    rates = {n: r.detach().clone().requires_grad_() for n, r in rates.items()}

    def run(params, x, support_x):
        if forward is not None:
            return forward(params, x, support_x)
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        return functional_call(model, {**params, **buffers}, (x,))

    losses = []
    for support_x, support_y, query_x, query_y in zip(*batch):
        phi = dict(theta)
        for _ in range(steps):
            value = loss(run(phi, support_x, support_x), support_y)
            grads = torch.autograd.grad(
                value, list(phi.values()), create_graph=not first_order, allow_unused=True, materialize_grads=True
            )
            phi = {n: p - rates[n] * g for (n, p), g in zip(phi.items(), grads)}
        losses.append(loss(run(phi, query_x, support_x), query_y))
    losses = torch.stack(losses)
    weights = torch.full_like(losses, 1 / len(losses)) if task_weights is None else task_weights
    leaves = [*theta.values(), *rates.values()]
    grads = torch.autograd.grad(losses @ weights, leaves, allow_unused=True, materialize_grads=True)
    return losses.detach(), dict(zip(theta, grads)), dict(zip(rates, grads[len(theta) :]))


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def rates_like(model, rate):
    return {n: torch.full_like(p, rate) for n, p in model.named_parameters()}


def relative_error(result, expected):
    assert result.shape == expected.shape, (result.shape, expected.shape)
    return float((result - expected).norm() / expected.norm().clamp_min(1e-30))


def image_batch(tasks=3, support=4, query=5, shape=(1, 8, 8), classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)

    def x(n):
        return torch.randn(tasks, n, *shape, dtype=torch.float64, generator=g)

    def y(n):
        return torch.randint(0, classes, (tasks, n), generator=g)

    return x(support), y(support), x(query), y(query)


def regression_batch(tasks=3, support=4, query=5, seed=0):
    g = torch.Generator().manual_seed(seed)

    def r(n):
        return torch.randn(tasks, n, 1, dtype=torch.float64, generator=g)

    return r(support), r(support), r(query), r(query)


def small_conv(norm=True, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4) if norm else nn.Identity(),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 3),
    ).double()


def small_mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(1, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 1)).double()


class Residual(nn.Module):
    """Two linear layers with a skip connection, layer norm and GELU."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        h = nn.functional.gelu(self.norm(self.first(x)))
        return self.head(h + torch.tanh(self.second(h)))
