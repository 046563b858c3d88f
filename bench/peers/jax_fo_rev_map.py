"""JAX: forward over reverse, tasks one after the other by lax.map."""

from __future__ import annotations

from bench.peers import jax_grad
from fastmaml.benchmark.exact import Call
from fastmaml.benchmark.problem import Problem

NAME = "jax_fo_rev_map"
version = jax_grad.version


def prepare(problem: Problem) -> Call:
    return jax_grad.prepare(problem, over_tasks="map", forward=True)
