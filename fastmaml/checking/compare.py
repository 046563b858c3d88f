"""Gradients as tensors by name, and the distance of two gradients. A missing name counts as zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Named = dict[str, Tensor]


def size(named: Named) -> float:
    """The 2-norm of all entries together."""
    return math.sqrt(sum(float(value.square().sum()) for value in named.values()))


def inner(a: Named, b: Named) -> float:
    """The scalar product."""
    return sum(float((a[name] * value).sum()) for name, value in b.items() if name in a)


def relative(given: Named, wanted: Named) -> float:
    """|given - wanted| / |wanted|."""
    error, whole = size({name: _error(name, given, wanted) for name in {*given, *wanted}}), size(wanted)
    return error / whole if whole else (math.inf if error else 0.0)


def cosine(given: Named, wanted: Named) -> float:
    norms = size({name: given[name] for name in given if name in wanted}) * size(wanted)
    return inner(given, wanted) / norms if norms else math.nan


def agrees_in(name: str, given: Named, wanted: Named, tolerance: float, whole: float) -> bool:
    """Whether the error is within tolerance x (the parameter's own norm + 1e-3 x `whole`, the whole gradient's norm)."""
    own = float(wanted[name].norm()) if name in wanted else 0.0
    return float(_error(name, given, wanted).norm()) <= tolerance * (own + 1e-3 * whole)


def agrees(given: Named, wanted: Named, tolerance: float) -> bool:
    """`agrees_in` for every parameter."""
    whole = size(wanted)
    return all(agrees_in(name, given, wanted, tolerance, whole) for name in {*given, *wanted})


def finite(named: Named) -> bool:
    return all(bool(value.isfinite().all()) for value in named.values())


def zero(named: Named) -> bool:
    return not any(bool(value.any()) for value in named.values())


def pick(named: Named, names: list[str]) -> Named:
    return {name: named[name] for name in names if name in named}


def _error(name: str, given: Named, wanted: Named) -> Tensor:
    if name not in wanted:
        return given[name]
    return wanted[name] if name not in given else given[name] - wanted[name].to(torch.float64)
