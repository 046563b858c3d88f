"""JAX: forward over reverse, tasks by vmap."""

from __future__ import annotations

from bench.peers import jax_grad
from fastmaml.benchmark.exact import Call
from fastmaml.benchmark.problem import Problem

NAME = "jax_fo_rev"
version = jax_grad.version


def prepare(problem: Problem) -> Call:
    return jax_grad.prepare(problem, forward=True)
