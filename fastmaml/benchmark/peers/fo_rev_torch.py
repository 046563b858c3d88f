"""Forward over reverse in torch.func, vmapped over tasks: the adjoint sweep, with the jvp of grad as Hessian product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vmap

from fastmaml.benchmark.exact import Answer, Call, flat, mean_loss, network
from fastmaml.benchmark.problem import Problem

NAME = "fo_rev_torch"


def version() -> str:
    return torch.__version__


def prepare(problem: Problem, over_tasks: str = "vmap") -> Call:
    """over_tasks: "vmap", or "loop" for a loop in Python."""
    case, apply, loss = problem.case, network(problem.model), mean_loss(problem.case.loss)
    sizes = [p.numel() for p in problem.model.parameters()]
    theta = flat(problem.model)

    def of_task(
        theta: Tensor, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> tuple[Tensor, Tensor]:
        slope = grad(lambda at: loss(apply(at, support_x), support_y))
        phi = [theta]
        for _ in range(case.inner_steps):
            phi.append(phi[-1] - case.inner_lr * slope(phi[-1]))
        adjoint, value = grad_and_value(lambda at: loss(apply(at, query_x), query_y))(phi[-1])
        for at in reversed(phi[:-1]):
            adjoint = adjoint - jvp(slope, (at,), (case.inner_lr * adjoint,))[1]
        return adjoint, value

    def looped(theta: Tensor, *batch: Tensor) -> tuple[Tensor, Tensor]:
        adjoints, values = zip(*(of_task(theta, *task) for task in zip(*batch)))
        return torch.stack(adjoints), torch.stack(values)

    run = vmap(of_task, in_dims=(None, 0, 0, 0, 0)) if over_tasks == "vmap" else looped

    def call() -> Answer:
        adjoints, values = run(theta, *problem.batch)
        return values.mean(), adjoints.mean(0).split(sizes)

    return call
