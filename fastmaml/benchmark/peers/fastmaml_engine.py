"""fastmaml as a function of arrays: `Engine.meta_gradient`, without filling a module's `.grad`."""

from __future__ import annotations

import fastmaml as fm
from fastmaml.benchmark.exact import Answer, Call
from fastmaml.benchmark.peers import Missing
from fastmaml.benchmark.problem import Problem

NAME = "fastmaml engine"


def version() -> str:
    return fm.__version__


def prepare(problem: Problem, backend: str = "cpu", memory: str = "auto") -> Call:
    case = problem.case
    try:
        engine = fm.Engine(problem.model, case.loss, backend, memory=memory)
    except ValueError as error:
        raise Missing(str(error)) from error
    theta = engine.flatten(problem.model)

    def call() -> Answer:
        result = engine.meta_gradient(theta, problem.batch, case.inner_lr, case.inner_steps, inner_lr_grad=False)
        return result.loss.mean() if result.total_loss is None else result.total_loss, [result.grad]

    return call
