"""fastmaml as its users call it: the MAML learner and `out.loss.backward()`, gradients into `.grad`."""

from __future__ import annotations

import fastmaml as fm
from fastmaml.benchmark.exact import Answer, Call, gradients
from fastmaml.benchmark.peers import Missing
from fastmaml.benchmark.problem import Problem

NAME = "fastmaml"


def version() -> str:
    return fm.__version__


def prepare(problem: Problem, backend: str = "cpu", memory: str = "auto") -> Call:
    problem, case = problem.own(), problem.case
    try:
        maml = fm.MAML(problem.model, case.inner_lr, case.inner_steps, case.loss, backend=backend, memory=memory)
    except ValueError as error:
        raise Missing(str(error)) from error

    parameters = list(problem.model.parameters())

    def call() -> Answer:
        maml.zero_grad(set_to_none=True)
        out = maml(*problem.batch)
        out.loss.backward()
        return out.loss, gradients(parameters)

    return call
