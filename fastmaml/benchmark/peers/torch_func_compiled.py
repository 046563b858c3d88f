"""torch.func through torch.compile. Compilation takes half a minute to two minutes per case."""

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
    """Resets torch's compiler. Otherwise the ninth case and type of a process would run uncompiled.

    torch expects one program in $CXX, so "ccache g++" becomes the compiler alone.
    """
    torch._dynamo.reset()
    words = os.environ.get("CXX", "").split()
    if len(words) > 1:
        from torch._inductor import config

        config.cpp.cxx = (None, words[-1])
