"""MetaGradientOptions: every setting of one meta-gradient. CallTensors: the tensors that travel with a call."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from torch import Tensor

from fastmaml.autodiff.update_rules import UpdateRule
from fastmaml.inner import SGD, Adam, InnerLr, Optimizer, optimizer_of
from fastmaml.problem import checks


@dataclass(frozen=True)
class MetaGradientOptions:
    """Every setting of one meta-gradient. Tensors (rates, weights, rows) go to the call itself.

        options = fm.MetaGradientOptions(inner_steps=5, first_order=True)
        mg = engine.meta_gradient(theta, batch, inner_lr=0.4, options=options)

    Options are compared and hashed by value. Raises ValueError or TypeError for a value that is not allowed.
    """

    inner_steps: int = 1
    """K, the number of inner steps; 0 gives the plain gradient of the query loss."""
    first_order: bool = False
    """Drop the Hessian terms of every inner step (FOMAML)."""
    truncate: int | None = None
    """Keep the Hessian terms of the last `truncate` steps, and treat the earlier steps as constant. None: keep all."""
    inner: Optimizer | None = None
    """The inner optimizer; None: plain gradient descent. The call's inner_lr replaces its lr."""
    inner_lr_grad: bool = True
    """Compute the gradient by the inner rates too."""
    minibatch: int | None = None
    """B examples per step: the support set holds K B examples, and step k sees the k-th block of B. None: every step sees all."""
    adapted: tuple[str, ...] | None = None
    """Name patterns of the parameters that the inner loop moves ("head.*"); None: all."""
    per_task: bool = False
    """grad holds one gradient per task [T, P], not their weighted sum [P]. theta may then be [T, P]."""

    def __post_init__(self) -> None:
        checks.whole_number("inner_steps", self.inner_steps, 0)
        if self.truncate is not None:
            checks.whole_number("truncate", self.truncate, 0)
        if self.minibatch is not None:
            checks.whole_number("minibatch", self.minibatch, 1)
        if self.inner is not None and not isinstance(self.inner, (SGD, Adam)):
            raise TypeError(f"inner must be fm.inner.SGD, Adam or AdamW, not {type(self.inner).__name__}")
        if isinstance(self.adapted, (str, list)):
            object.__setattr__(self, "adapted", as_patterns(self.adapted))
        for name in ("first_order", "inner_lr_grad", "per_task"):
            object.__setattr__(self, name, bool(getattr(self, name)))

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:  # every call reads the hash
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # hashes differ between processes

    @functools.cached_property
    def is_simple(self) -> bool:
        """Whether all parameters adapt, every step sees all examples, and all tasks share one gradient."""
        return self.minibatch is None and self.adapted is None and not self.per_task

    @property
    def order(self) -> int | None:
        """The number of last steps whose Hessian terms are kept. None: all."""
        return 0 if self.first_order else self.truncate


class CallTensors(NamedTuple):
    """The tensors of one call, besides theta and the batch."""

    inner_lr: InnerLr | None = None  # None: the rate of options.inner
    support_weights: Tensor | None = None  # [T, S] of the examples in the loss; None: 1/S each
    query_weights: Tensor | None = None  # [T, Q]; None: 1/Q each
    task_weights: Tensor | None = None  # [T]; None: 1/T each
    loss_weights: Tensor | None = None  # [K+1] of L_Q(phi[k]); None: only phi[K]
    step_rows: Mapping[str, Tensor] | None = None  # {name: [K, *shape]}
    proximal: float | Tensor | None = None  # lam; each step's gradient gets lam (phi - theta)
    rule: UpdateRule | None = None  # replaces the optimizer's rule


# typed=True: True == 1 == 1.0 would share one entry, but not every type is allowed.
_remembered = functools.lru_cache(maxsize=256, typed=True)(MetaGradientOptions)


def options_of(*settings: Any) -> MetaGradientOptions:
    """MetaGradientOptions(*settings), checked once."""
    try:
        return _remembered(*settings)
    except TypeError:  # a setting without a hash, or of a wrong type
        return MetaGradientOptions(*settings)


def as_patterns(adapted: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """One pattern or several, as a tuple."""
    return (adapted,) if isinstance(adapted, str) else None if adapted is None else tuple(adapted)


def optimizer_for(options: MetaGradientOptions, inner_lr: InnerLr | None) -> Optimizer:
    """The inner optimizer of a call, with its rates."""
    if options.inner is None:
        return optimizer_of(inner_lr, None)
    return options.inner if inner_lr is None else options.inner.with_rates(inner_lr)
