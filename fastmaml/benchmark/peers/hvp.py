"""Hessian-vector products of many tasks in plain torch, by several methods.

A product is a function () -> [T, P], or [V, T, P] for V directions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, linearize, vmap

from fastmaml.benchmark.exact import mean_loss, network
from fastmaml.benchmark.peers import Missing
from fastmaml.benchmark.peers.torch_func_compiled import own_compiler
from fastmaml.benchmark.problem import HvpProblem

Product = Callable[[], Tensor]


def double_backward(p: HvpProblem) -> Product:
    """Reverse over reverse, one task at a time."""
    apply, loss = network(p.model, written_norms=False), mean_loss(p.loss)

    def call() -> Tensor:
        found = []
        for params, x, y, v in zip(p.params, p.x, p.y, p.v):
            at = params.detach().requires_grad_(True)
            (g,) = torch.autograd.grad(loss(apply(at, x), y), at, create_graph=True)
            found.append(torch.autograd.grad(g, at, v)[0])
        return torch.stack(found)

    return call


def double_backward_batched(p: HvpProblem) -> Product:
    """One double backward for all tasks: the layers of an MLP written as batched products."""
    losses = _batched_losses(p)

    def call() -> Tensor:
        at = p.params.detach().requires_grad_(True)
        (g,) = torch.autograd.grad(losses(at), at, create_graph=True)
        return torch.autograd.grad(g, at, p.v)[0]

    return call


def _batched_losses(p: HvpProblem) -> Callable[[Tensor], Tensor]:
    """Parameters [T, P] -> the sum of the tasks' losses. Raises Missing unless it is an MLP with mean squared error."""
    plain = (nn.Linear, nn.ReLU, nn.Tanh)
    if not isinstance(p.model, nn.Sequential) or p.loss != "mse" or not all(isinstance(m, plain) for m in p.model):
        raise Missing("written for MLPs of linear layers, ReLU and tanh with mean squared error")
    sizes = [q.numel() for q in p.model.parameters()]
    layers = list(p.model)

    def losses(flat: Tensor) -> Tensor:
        x, pieces, at = p.x, flat.split(sizes, dim=1), 0
        for layer in layers:
            if isinstance(layer, nn.Linear):
                weight = pieces[at].view(-1, layer.out_features, layer.in_features).transpose(1, 2)
                x, at = torch.baddbmm(pieces[at + 1][:, None], x, weight), at + 2
            else:
                x = layer(x)
        return (x - p.y).square().flatten(1).mean(1).sum()

    return losses


def func_jvp(p: HvpProblem) -> Product:
    """Forward over reverse by torch.func, vmapped over tasks."""
    slope = _slope(p)

    def product(params: Tensor, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return jvp(lambda at: slope(at, x, y), (params,), (v,))[1]

    batched = vmap(product)
    return lambda: batched(p.params, p.x, p.y, p.v)


def func_jvp_compiled(p: HvpProblem) -> Product:
    """Forward over reverse of the layers as batched products, through torch.compile.

    The vmapped form fails on torch 2.13 with "Tensor device mismatch" (cpu and meta).
    """
    slope = grad(_batched_losses(p))
    own_compiler()
    product = torch.compile(lambda params, v: jvp(slope, (params,), (v,))[1])
    return lambda: product(p.params, p.v)


def _slope(p: HvpProblem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    apply, loss = network(p.model), mean_loss(p.loss)
    return grad(lambda at, x, y: loss(apply(at, x), y))


def func_jvp_loop(p: HvpProblem) -> Product:
    """Forward over reverse by torch.func, one task at a time, because vmap would make grouped convolutions."""
    slope = _slope(p)

    def call() -> Tensor:
        tasks = zip(p.params, p.x, p.y, p.v)
        return torch.stack([jvp(lambda at: slope(at, x, y), (params,), (v,))[1] for params, x, y, v in tasks])  # noqa: B023

    return call


# ---------------------------------------------------------------- several directions at fixed parameters


def retained_graph(p: HvpProblem, directions: Tensor) -> Product:
    """Double backward, one task at a time. The graph of the gradient is kept for all directions."""
    apply, loss = network(p.model, written_norms=False), mean_loss(p.loss)

    def call() -> Tensor:
        found = []
        for params, x, y, vs in zip(p.params, p.x, p.y, directions.transpose(0, 1)):
            at = params.detach().requires_grad_(True)
            (g,) = torch.autograd.grad(loss(apply(at, x), y), at, create_graph=True)
            found.append(torch.stack([torch.autograd.grad(g, at, v, retain_graph=True)[0] for v in vs]))
        return torch.stack(found, 1)

    return call


def retained_graph_batched(p: HvpProblem, directions: Tensor) -> Product:
    """Double backward for all tasks at once. The graph of the gradient is kept for all directions."""
    losses = _batched_losses(p)

    def call() -> Tensor:
        at = p.params.detach().requires_grad_(True)
        (g,) = torch.autograd.grad(losses(at), at, create_graph=True)
        return torch.stack([torch.autograd.grad(g, at, v, retain_graph=True)[0] for v in directions])

    return call


def func_linearize(p: HvpProblem, directions: Tensor) -> Product:
    """torch.func.linearize of the vmapped gradient. It traces the gradient again at every new point."""
    slope = vmap(_slope(p))

    def call() -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Attempted to insert a get_attr Node")  # from torch.fx itself
            _, product = linearize(lambda params: slope(params, p.x, p.y), p.params)
        return torch.stack([product(v) for v in directions])

    return call


PEERS: dict[str, Callable[[HvpProblem], Product]] = {
    "double_backward": double_backward,
    "double_backward_batched": double_backward_batched,
    "func_jvp": func_jvp,
    "func_jvp_loop": func_jvp_loop,
    "func_jvp+compile": func_jvp_compiled,
}
REPEATED: dict[str, Callable[[HvpProblem, Tensor], Product]] = {
    "double_backward": retained_graph,
    "double_backward_batched": retained_graph_batched,
    "func_linearize": func_linearize,
}
