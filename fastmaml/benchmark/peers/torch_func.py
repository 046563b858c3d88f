"""torch.func: grad of the whole meta-objective, vmapped over tasks. With `compiled`, through torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap

from fastmaml.benchmark.exact import Answer, Call, flat, mean_loss, network
from fastmaml.benchmark.problem import Problem

NAME = "torch_func"


def version() -> str:
    return torch.__version__


def prepare(problem: Problem, compiled: bool = False) -> Call:
    case, apply, loss = problem.case, network(problem.model), mean_loss(problem.case.loss)
    sizes = [p.numel() for p in problem.model.parameters()]
    theta = flat(problem.model)

    def task_loss(theta: Tensor, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        phi = theta
        for _ in range(case.inner_steps):
            phi = phi - case.inner_lr * grad(lambda at: loss(apply(at, support_x), support_y))(phi)
        return loss(apply(phi, query_x), query_y)

    def meta_loss(theta: Tensor, *batch: Tensor) -> Tensor:
        return vmap(task_loss, in_dims=(None, 0, 0, 0, 0))(theta, *batch).mean()

    both = grad_and_value(meta_loss)
    if compiled:
        both = torch.compile(both)

    def call() -> Answer:
        gradient, value = both(theta, *problem.batch)
        return value, gradient.split(sizes)

    return call
