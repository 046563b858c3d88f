"""JAX: Hessian-vector products as the jvp of grad, vmapped over tasks. For fixed parameters, jax.linearize."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.peers import jax_network
from fastmaml.benchmark.peers.hvp import Product
from fastmaml.benchmark.problem import HvpProblem


def jax_jvp(p: HvpProblem) -> Product:
    jax, slope, params, x, y = _parts(p)

    def product(params: Any, x: Any, y: Any, v: Any) -> Any:
        return jax.jvp(lambda at: slope(at, x, y), (params,), (v,))[1]

    compiled, v = jax.jit(jax.vmap(product)), jax_network.array(p.v)
    return lambda: torch.from_dlpack(jax.block_until_ready(compiled(params, x, y, v)))


def jax_linearize(p: HvpProblem, directions: Tensor) -> Product:
    jax, slope, params, x, y = _parts(p)

    def products(params: Any, x: Any, y: Any, vs: Any) -> Any:
        _, product = jax.linearize(lambda at: jax.vmap(slope)(at, x, y), params)
        return jax.lax.map(product, vs)

    compiled, vs = jax.jit(products), jax_network.array(directions)
    return lambda: torch.from_dlpack(jax.block_until_ready(compiled(params, x, y, vs)))


def _parts(p: HvpProblem) -> tuple[Any, Callable[..., Any], Any, Any, Any]:
    """(jax, the gradient as a function of a flat vector, parameters [T, P], x, y)."""
    loss = jax_network.loss_of(p.model, p.loss)
    jax = importlib.import_module("jax")
    shapes = [tuple(q.shape) for q in p.model.parameters()]

    def flat_loss(at: Any, x: Any, y: Any) -> Any:
        pieces, start = [], 0
        for shape in shapes:
            size = int(torch.Size(shape).numel())
            pieces.append(at[start : start + size].reshape(shape))
            start += size
        return loss(pieces, x, y)

    return jax, jax.grad(flat_loss), *(jax_network.array(t) for t in (p.params, p.x, p.y))


PEERS = {"jax_jvp": jax_jvp}
REPEATED = {"jax_linearize": jax_linearize}
