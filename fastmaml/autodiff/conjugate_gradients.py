"""Conjugate gradients for many tasks at once, each with its own symmetric operator and its own stopping point."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmaml.problem.results import Solution

STOP = 1e-10  # on |r|^2 (Rajeswaran et al. 2019, released code)


def conjugate_gradients(operator: Callable[[Tensor], Tensor], v: Tensor, steps: int, stop: float = STOP) -> Solution:
    """Solves A s = v from s = 0 with at most `steps` products; v [T, P].

    A task stops at |r|^2 < stop, or where p.Ap <= 0 (A is not positive definite there), and keeps its current s.
    """
    s, r, p = torch.zeros_like(v), v.clone(), v.clone()
    rr = _dot(r, r)
    size = rr.sqrt()
    iterations, negative = torch.zeros_like(rr, dtype=torch.int64), torch.zeros_like(rr, dtype=torch.bool)
    history = [_relative(size, size)]
    active = rr != 0  # a small v takes its first step too; a NaN goes on, and shows in the solution
    for _ in range(steps):
        if not bool(active.any()):
            break
        ap = operator(p)
        curvature = _dot(p, ap)
        negative |= active & (curvature <= 0)
        active = active & ~negative
        step = torch.where(active, rr / curvature, 0.0).unsqueeze(1)
        s.addcmul_(step, p)
        r.addcmul_(step, ap, value=-1.0)
        after = torch.where(active, _dot(r, r), rr)
        p.mul_(torch.where(active, after / rr, 0.0).unsqueeze(1)).add_(r)
        rr = after
        iterations += active
        active = active & ~(rr < stop) & (rr != 0)
        history.append(_relative(rr.sqrt(), size))
    history += history[-1:] * (1 + steps - len(history))
    return Solution(s, history[-1], iterations, negative, torch.stack(history, dim=1))


def _relative(residual: Tensor, size: Tensor) -> Tensor:
    return torch.where(size != 0, residual / size, 0.0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)
