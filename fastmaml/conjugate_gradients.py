"""Conjugate gradients for many tasks at once, each with its own symmetric operator and its own stopping point."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STOP = 1e-10  # on |r|^2 (Rajeswaran et al. 2019, released code)


def conjugate_gradients(operator: Callable[[Tensor], Tensor], v: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Solves A s = v from s = 0 with at most `steps` products; v [T, P] -> (s [T, P], |v - A s| / |v| [T]).

    A task stops at |r|^2 < 1e-10, or where p.Ap <= 0 (A not positive definite there), and keeps its current s.
    """
    s = torch.zeros_like(v)
    r = v.clone()
    p = v.clone()
    rr = (r * r).sum(1)
    active = rr >= STOP
    for _ in range(steps):
        if not bool(active.any()):
            break
        ap = operator(p)
        curvature = (p * ap).sum(1)
        active = active & (curvature > 0)
        step = torch.where(active, rr / torch.where(active, curvature, 1.0), 0.0).unsqueeze(1)
        s = s + step * p
        r = r - step * ap
        rr_next = (r * r).sum(1)
        beta = torch.where(active, rr_next / torch.where(active, rr, 1.0), 0.0).unsqueeze(1)
        p = torch.where(active.unsqueeze(1), r + beta * p, p)
        rr = rr_next
        active = active & (rr >= STOP)
    norm = v.norm(dim=1)
    return s, torch.where(norm > 0, r.norm(dim=1) / torch.where(norm > 0, norm, 1.0), 0.0)
