"""JAX: jit of the gradient of the vmapped meta-objective, for networks of linear layers and ReLU.

Not written for convolutions: measured once, they were 7 to 14 times slower than a torch loop on CPU. JAX chooses its own
thread count (the cores this process may use).
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import nn

from bench.baselines import Missing
from bench.cases import Problem
from bench.measure import Answer, Call

NAME = "jax"


def version() -> str:
    if importlib.util.find_spec("jax") is None:
        raise Missing("jax is not installed: pip install jax")
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    return jax.__version__


def prepare(problem: Problem) -> Call:
    case = problem.case
    if not all(isinstance(layer, (nn.Linear, nn.ReLU)) for layer in problem.model):  # type: ignore[attr-defined]
        raise Missing("not written for convolutions")
    version()
    jax, jnp = importlib.import_module("jax"), importlib.import_module("jax.numpy")

    def array(value: torch.Tensor) -> Any:
        return jnp.asarray(value.detach().cpu().numpy())

    theta = [array(p) for p in problem.model.parameters()]
    batch = [array(value) for value in problem.batch]

    def network(phi: Any, x: Any) -> Any:
        for weight, bias in zip(phi[:-2:2], phi[1:-2:2]):
            x = jax.nn.relu(x @ weight.T + bias)
        return x @ phi[-2].T + phi[-1]

    def loss(phi: Any, x: Any, y: Any) -> Any:
        output = network(phi, x)
        if case.loss == "mse":
            return ((output - y) ** 2).mean()
        return -jnp.take_along_axis(jax.nn.log_softmax(output), y[:, None], 1).mean()

    def task_loss(theta: Any, support_x: Any, support_y: Any, query_x: Any, query_y: Any) -> Any:
        phi = theta
        for _ in range(case.inner_steps):
            phi = [p - case.inner_lr * g for p, g in zip(phi, jax.grad(loss)(phi, support_x, support_y))]
        return loss(phi, query_x, query_y)

    def meta_loss(theta: Any, *batch: Any) -> Any:
        return jax.vmap(task_loss, in_axes=(None, 0, 0, 0, 0))(theta, *batch).mean()

    both = jax.jit(jax.value_and_grad(meta_loss))

    def call() -> Answer:
        value, grads = jax.block_until_ready(both(theta, *batch))
        return torch.from_dlpack(value), [torch.from_dlpack(g) for g in grads]

    return call
