"""Plain torch: a loop over tasks, unrolled inner steps with create_graph, backward through it all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from fastmaml.benchmark.exact import Answer, Call, gradients, mean_loss
from fastmaml.benchmark.problem import Problem

NAME = "torch_loop"


def version() -> str:
    return torch.__version__


def prepare(problem: Problem) -> Call:
    problem, case = problem.own(), problem.case
    model, loss = problem.model, mean_loss(case.loss)
    names, start = zip(*model.named_parameters())

    parameters = list(model.parameters())

    def call() -> Answer:
        model.zero_grad(set_to_none=True)
        total = torch.zeros((), device=start[0].device)
        for support_x, support_y, query_x, query_y in zip(*problem.batch):
            phi: tuple[Tensor, ...] = start
            for _ in range(case.inner_steps):
                support_loss = loss(functional_call(model, dict(zip(names, phi)), (support_x,)), support_y)
                grads = torch.autograd.grad(support_loss, phi, create_graph=True, materialize_grads=True)
                phi = tuple(p - case.inner_lr * g for p, g in zip(phi, grads))
            query_loss = loss(functional_call(model, dict(zip(names, phi)), (query_x,)), query_y) / case.tasks
            query_loss.backward()
            total = total + query_loss.detach()
        return total, gradients(parameters)

    return call
