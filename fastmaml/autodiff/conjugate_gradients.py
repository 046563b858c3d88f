"""Conjugate gradients for many tasks at once, each with its own symmetric operator and its own stopping point."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

STOP = 1e-10  # on |r|^2 (Rajeswaran et al. 2019, released code)


class Solved(NamedTuple):
    """An approximate solution of A s = v for every task, and how it was reached."""

    solution: Tensor  # [T, P]
    residual: Tensor  # [T] |v - A s| / |v|
    iterations: Tensor  # [T] steps taken
    negative_curvature: Tensor  # [T] whether the task ended at a direction with p.Ap <= 0
    curve: Tensor  # [T, 1 + steps of the slowest task] the residual before the first step and after each


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor], v: Tensor, steps: int, stop: float | Tensor = STOP
) -> Solved:
    """Solves A s = v from s = 0 with at most `steps` products; v [T, P].

    A task stops at |r|^2 < stop (a number, or one for each task [T]), or where p.Ap <= 0 (A is not positive definite
    there), and keeps its current s.
    """
    s = torch.zeros_like(v)
    r, p = v.clone(), v.clone()
    rr = (r * r).sum(1)
    size = rr.sqrt()
    iterations, negative = torch.zeros_like(rr, dtype=torch.int64), torch.zeros_like(rr, dtype=torch.bool)
    curve = [(rr > 0).to(rr)]
    active = rr != 0  # a small v takes its first step too; a NaN goes on, and shows in the solution
    for _ in range(steps):
        if not bool(active.any()):
            break
        ap = operator(p)
        curvature = (p * ap).sum(1)
        negative = negative | (active & (curvature <= 0))
        active = active & ~negative
        step = torch.where(active, rr / torch.where(active, curvature, 1.0), 0.0).unsqueeze(1)
        s = s + step * p
        r = r - step * ap
        rr_next = torch.where(active, (r * r).sum(1), rr)
        beta = torch.where(active, rr_next / torch.where(active, rr, 1.0), 0.0).unsqueeze(1)
        p = torch.where(active.unsqueeze(1), r + beta * p, p)
        rr = rr_next
        iterations = iterations + active
        active = active & ~(rr < stop) & (rr != 0)
        curve.append(_relative(rr.sqrt(), size))
    return Solved(s, _relative(rr.sqrt(), size), iterations, negative, torch.stack(curve, dim=1))


def _relative(residual: Tensor, size: Tensor) -> Tensor:
    return torch.where(size > 0, residual / torch.where(size > 0, size, 1.0), 0.0)
