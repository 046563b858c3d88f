"""torch.func through torch.compile: 40 s to compile a case, so it runs only where it is named."""

from __future__ import annotations

from bench.baselines import torch_func
from bench.cases import Problem
from bench.measure import Call

NAME = "torch_func+compile"
version = torch_func.version


def prepare(problem: Problem) -> Call:
    return torch_func.prepare(problem, compiled=True)
