"""torch.func: the whole meta-objective under grad, vmapped over tasks. With `compiled`, through torch.compile.

Batch norm is written out of elementary operations: torch 2.13's own is differentiated wrongly, without a message, by vmap
of reverse over reverse (relative error 1.7e-2 on a small Conv4).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap

from bench.baselines.torch_loop import LOSSES
from bench.cases import Problem
from bench.measure import Answer, Call
from tests import oracle

NAME = "torch_func"


def version() -> str:
    return torch.__version__


def prepare(problem: Problem, compiled: bool = False) -> Call:
    problem, case = problem.own(), problem.case
    network, loss = oracle.network(problem.model), LOSSES[case.loss]
    sizes = [p.numel() for p in problem.model.parameters()]
    theta = torch.cat([p.detach().reshape(-1) for p in problem.model.parameters()])

    def task_loss(theta: Tensor, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        phi = theta
        for _ in range(case.inner_steps):
            phi = phi - case.inner_lr * grad(lambda at: loss(network(at, support_x), support_y))(phi)
        return loss(network(phi, query_x), query_y)

    def meta_loss(theta: Tensor, *batch: Tensor) -> Tensor:
        return vmap(task_loss, in_dims=(None, 0, 0, 0, 0))(theta, *batch).mean()

    both = grad_and_value(meta_loss)
    if compiled:
        both = torch.compile(both)

    def call() -> Answer:
        gradient, value = both(theta, *problem.batch)
        return value, gradient.split(sizes)

    return call
