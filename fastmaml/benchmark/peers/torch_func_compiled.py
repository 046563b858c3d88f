"""torch.func through torch.compile: half a minute to two minutes of compilation a case."""

from __future__ import annotations

import os

import torch

from fastmaml.benchmark.exact import Call
from fastmaml.benchmark.peers import torch_func
from fastmaml.benchmark.problem import Problem

NAME = "torch_func+compile"
version = torch_func.version


def prepare(problem: Problem) -> Call:
    own_compiler()
    return torch_func.prepare(problem, compiled=True)


def own_compiler() -> None:
    """A fresh start of torch's compiler, or the ninth case and type of a process would run uncompiled.

    It takes $CXX for the name of one program: of "ccache g++" it gets the compiler alone.
    """
    torch._dynamo.reset()
    words = os.environ.get("CXX", "").split()
    if len(words) > 1:
        from torch._inductor import config

        config.cpp.cxx = (None, words[-1])
