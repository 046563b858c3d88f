"""Forward over reverse in torch.func with a loop over tasks: vmap turns per-task filters into grouped convolutions."""

from __future__ import annotations

from fastmaml.benchmark.exact import Call
from fastmaml.benchmark.peers import fo_rev_torch
from fastmaml.benchmark.problem import Problem

NAME = "fo_rev_torch_loop"
version = fo_rev_torch.version


def prepare(problem: Problem) -> Call:
    return fo_rev_torch.prepare(problem, "loop")
