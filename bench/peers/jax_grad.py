"""JAX: jit of the gradient of the meta-objective, reverse over reverse, tasks by vmap. Its variants are one line each."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from bench.peers import jax_network
from bench.peers.jax_network import array
from fastmaml.benchmark.exact import Answer, Call
from fastmaml.benchmark.problem import Problem

NAME = "jax"
version = jax_network.version


def prepare(problem: Problem, over_tasks: str = "vmap", forward: bool = False) -> Call:
    """over_tasks: "vmap" or "map" (lax.map, one task after the other). forward: the adjoint sweep, forward over reverse."""
    case = problem.case
    loss = jax_network.loss_of(problem.model, case.loss)
    jax = importlib.import_module("jax")
    theta = [array(p) for p in problem.model.parameters()]
    batch = [array(value) for value in problem.batch]

    def moved(phi: Any, direction: Any) -> Any:
        return [p - case.inner_lr * g for p, g in zip(phi, direction)]

    def task_loss(theta: Any, task: Any) -> Any:
        support_x, support_y, query_x, query_y = task
        phi = theta
        for _ in range(case.inner_steps):
            phi = moved(phi, jax.grad(loss)(phi, support_x, support_y))
        return loss(phi, query_x, query_y)

    def swept(theta: Any, task: Any) -> Any:
        support_x, support_y, query_x, query_y = task

        def slope(at: Any) -> Any:
            return jax.grad(loss)(at, support_x, support_y)

        phi = [theta]
        for _ in range(case.inner_steps):
            phi.append(moved(phi[-1], slope(phi[-1])))
        value, adjoint = jax.value_and_grad(loss)(phi[-1], query_x, query_y)
        for at in reversed(phi[:-1]):
            adjoint = moved(adjoint, jax.jvp(slope, (at,), (adjoint,))[1])
        return value, adjoint

    def over(function: Any, theta: Any, tasks: Any) -> Any:
        if over_tasks == "map":
            return jax.lax.map(lambda task: function(theta, task), tasks)
        return jax.vmap(function, in_axes=(None, 0))(theta, tasks)

    def by_sweep(theta: Any, *tasks: Any) -> Any:
        value, adjoint = over(swept, theta, tasks)
        return value.mean(), [a.mean(0) for a in adjoint]

    reverse = jax.value_and_grad(lambda theta, *tasks: over(task_loss, theta, tasks).mean())
    both = jax.jit(by_sweep if forward else reverse)

    def call() -> Answer:
        value, grads = jax.block_until_ready(both(theta, *batch))
        return torch.from_dlpack(value), [torch.from_dlpack(g) for g in grads]

    return call
