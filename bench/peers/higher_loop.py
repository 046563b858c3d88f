"""higher 0.2.1: a functional copy of the model and a differentiable SGD, task by task."""

from __future__ import annotations

import torch

from bench.peers import fetch
from fastmaml.benchmark.exact import Answer, Call, gradients, mean_loss
from fastmaml.benchmark.problem import Problem

NAME = "higher"
VERSION = "0.2.1"


def version() -> str:
    fetch.installed("higher", VERSION)
    return VERSION


def prepare(problem: Problem) -> Call:
    higher = fetch.installed("higher", VERSION)
    problem, case = problem.own(), problem.case
    model, loss = problem.model, mean_loss(case.loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=case.inner_lr)

    parameters = list(model.parameters())

    def call() -> Answer:
        model.zero_grad(set_to_none=True)
        total = torch.zeros(())
        for support_x, support_y, query_x, query_y in zip(*problem.batch):
            with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (learner, inner):
                for _ in range(case.inner_steps):
                    inner.step(loss(learner(support_x), support_y))
                query_loss = loss(learner(query_x), query_y) / case.tasks
                query_loss.backward()
            total = total + query_loss.detach()
        return total, gradients(parameters)

    return call
