"""Hessian-free Newton for many tasks at once: directions by conjugate gradients, step lengths by Armijo's rule.

    solve H d = -g,    phi <- phi + t d,    t = 1, 1/2, 1/4, ... until f(phi + t d) <= f(phi) + 1e-4 t <g, d>

Every task has its own system and its own t (Nocedal & Wright 2006, algorithms 3.1 and 7.1).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastmaml.problem.results import Solution

SUFFICIENT, SHRINK, TRIES = 1e-4, 0.5, 10  # Rajeswaran et al. 2019 do not print theirs


class Objective(Protocol):
    """A function f of phi [T, P] for every task, and its derivatives."""

    def value(self, phi: Tensor) -> Tensor:
        """f [T]."""

    def grad(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        """(f [T], gradient [T, P])."""

    def solve(self, phi: Tensor, v: Tensor, steps: int) -> Solution:
        """d with (Hessian at phi) d = v [T, P], by at most `steps` conjugate gradient steps from d = 0."""


def newton_cg(f: Objective, phi: Tensor, steps: int, cg_steps: int) -> Tensor:
    """Minimises f from phi [T, P] in `steps` steps with at most cg_steps Hessian products each; returns phi [T, P].

    Where the curvature is negative along the gradient itself, the direction is -g. A task that finds no decrease in
    ten tries stays where it is.
    """
    for _ in range(steps):
        value, g = f.grad(phi)
        solved = f.solve(phi, -g, cg_steps)
        d = torch.where((solved.iterations > 0).unsqueeze(1), solved.solution, -g)
        phi = armijo(f, phi, d, value, (g * d).sum(1))
    return phi


def armijo(f: Objective, phi: Tensor, d: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """phi + t d with the largest of ten t that decreases f enough; value f(phi) [T], slope <g, d> [T]."""
    # Beside the minimum a full step gains less than f's rounding, which must not refuse it.
    rounding = 10 * torch.finfo(value.dtype).eps * value.abs()
    t, pending = torch.ones_like(value), torch.ones_like(value, dtype=torch.bool)
    for _ in range(TRIES):
        trial = f.value(phi + t.unsqueeze(1) * d)
        pending = pending & ~(trial <= value + SUFFICIENT * t * slope + rounding)
        if not bool(pending.any()):
            break
        t = torch.where(pending, SHRINK * t, t)
    t = torch.where(pending, 0.0, t)
    return torch.where(pending.unsqueeze(1), phi, phi + t.unsqueeze(1) * d)
