"""torchopt 0.7.3's MetaSGD as in its examples: differentiable inner steps, with the state restored after every task."""

from __future__ import annotations

import torch

from bench.peers import fetch
from fastmaml.benchmark.exact import Answer, Call, gradients, mean_loss
from fastmaml.benchmark.problem import Problem

NAME = "torchopt"
VERSION = "0.7.3"


def version() -> str:
    return fetch.installed("torchopt", VERSION).__version__


def prepare(problem: Problem) -> Call:
    torchopt = fetch.installed("torchopt", VERSION)
    problem, case = problem.own(), problem.case
    model, loss = problem.model, mean_loss(case.loss)
    inner = torchopt.MetaSGD(model, lr=case.inner_lr)
    meta_params = list(model.parameters())  # MetaSGD replaces them by adapted tensors, and recover restores them

    parameters = list(model.parameters())

    def call() -> Answer:
        for p in meta_params:
            p.grad = None
        total = torch.zeros(())
        start = torchopt.extract_state_dict(model, by="reference"), torchopt.extract_state_dict(inner, by="reference")
        for support_x, support_y, query_x, query_y in zip(*problem.batch):
            for _ in range(case.inner_steps):
                inner.step(loss(model(support_x), support_y))
            query_loss = loss(model(query_x), query_y) / case.tasks
            query_loss.backward()
            total = total + query_loss.detach()
            torchopt.recover_state_dict(model, start[0])
            torchopt.recover_state_dict(inner, start[1])
        return total, gradients(parameters)

    return call
