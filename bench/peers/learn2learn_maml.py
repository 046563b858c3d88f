"""learn2learn 0.2.0's MAML wrapper, used as in its examples: clone, adapt, backward, task by task.

The release does not build on Python 3.11 and later, because a Cython file includes a removed header. The whole package
also needs gym. So we unpack the sources and load only algorithms/maml.py with its imports.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import torch

from bench.peers import Missing, fetch
from fastmaml.benchmark.exact import Answer, Call, gradients, mean_loss
from fastmaml.benchmark.problem import Problem

NAME = "learn2learn"
VERSION = "0.2.0"


def version() -> str:
    wrapper()
    return VERSION


def wrapper() -> Any:
    """The class learn2learn.algorithms.MAML, from sources in the cache folder."""
    if "learn2learn.algorithms.maml" not in sys.modules:
        package = fetch.unpacked_source("learn2learn", VERSION) / "learn2learn"
        for name, path in (("learn2learn", package), ("learn2learn.algorithms", package / "algorithms")):
            empty = types.ModuleType(name)  # replaces an __init__.py that imports everything
            empty.__path__ = [str(path)]
            sys.modules[name] = empty
    try:
        return importlib.import_module("learn2learn.algorithms.maml").MAML
    except ImportError as error:
        raise Missing(f"learn2learn's MAML wrapper cannot be imported: {error}") from error


def prepare(problem: Problem) -> Call:
    problem, case = problem.own(), problem.case
    maml = wrapper()(problem.model, lr=case.inner_lr)
    loss = mean_loss(case.loss)

    parameters = list(maml.parameters())

    def call() -> Answer:
        maml.zero_grad(set_to_none=True)
        total = torch.zeros(())
        for support_x, support_y, query_x, query_y in zip(*problem.batch):
            learner = maml.clone()
            for _ in range(case.inner_steps):
                learner.adapt(loss(learner(support_x), support_y))
            query_loss = loss(learner(query_x), query_y) / case.tasks
            query_loss.backward()
            total = total + query_loss.detach()
        return total, gradients(parameters)

    return call
