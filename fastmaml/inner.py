"""Inner optimizers: how one inner step follows from the gradient of the support loss.

    maml = fm.MAML(model, inner=fm.inner.Adam(lr=1e-3), inner_steps=5)

The forward updates equal torch.optim's. The meta-gradient goes through every update, including the moments.
lr is a number, a tensor or a dict by parameter name; Engine.meta_gradient lists the shapes. An nn.Parameter in lr is
learned.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

InnerLr = float | Tensor | Mapping[str, Any]  # one rate, rates in a tensor, or by parameter name


@dataclass(frozen=True)
class _Clipped:
    """Clips each step's raw gradient, by value (each entry) or by norm (over a task's adapted entries)."""

    def with_rates(self, lr: InnerLr) -> Any:
        """The same optimizer with other learning rates."""
        return replace(self, lr=lr)  # type: ignore[call-arg]

    @functools.cached_property
    def without_rates(self) -> Any:
        """The same optimizer with lr=0.0: what is left when the rates travel by themselves."""
        return self.with_rates(0.0)

    def _check(self) -> None:
        clip_value, clip_norm = getattr(self, "clip_value", None), getattr(self, "clip_norm", None)
        for name, limit in (("clip_value", clip_value), ("clip_norm", clip_norm)):
            if limit is not None and not (_number(name, limit) > 0):
                raise ValueError(f"{name} is {limit}; it must be above 0")
        if clip_value is not None and clip_norm is not None:
            raise ValueError(f"clip_value={clip_value} and clip_norm={clip_norm} are both given; choose one")


@dataclass(frozen=True)
class SGD(_Clipped):
    """theta' = theta - lr d, with torch.optim.SGD's momentum, dampening, Nesterov and coupled weight decay.

    clip_value, clip_norm: limit each step's raw gradient by value or by norm, before weight decay; give only one.
    Raises ValueError for values out of range.
    """

    lr: InnerLr
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    clip_value: float | None = None
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        self._check()
        _in_range("momentum", self.momentum, 0.0)
        _in_range("dampening", self.dampening, 0.0, 1.0)
        _in_range("weight_decay", self.weight_decay, 0.0)
        if self.nesterov and (not self.momentum or self.dampening):
            raise ValueError(
                f"nesterov needs momentum above 0 and no dampening, not {self.momentum} and {self.dampening}"
            )
        if self.dampening and not self.momentum:
            raise ValueError(f"dampening={self.dampening} does nothing without momentum")

    @property
    def vectors(self) -> int:
        """Number of state vectors [P] that a task carries from step to step."""
        return 1 if self.momentum else 0


@dataclass(frozen=True)
class Adam(_Clipped):
    """torch.optim.Adam, bias-corrected, with weight decay added to the gradient (Kingma & Ba 2015, algorithm 1).

    The adjoint follows ALGORITHMS 1.4: a second moment of exactly zero contributes nothing.
    clip_value, clip_norm: as in SGD. Raises ValueError for values out of range.
    """

    lr: InnerLr = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_value: float | None = None
    clip_norm: float | None = None

    decoupled = False
    vectors = 2

    def __post_init__(self) -> None:
        self._check()
        if len(self.betas) != 2 or not all(0.0 <= _number("betas", b) < 1.0 for b in self.betas):
            raise ValueError(f"betas {self.betas!r} must be two numbers from 0 to below 1")
        _in_range("eps", self.eps, 0.0)
        _in_range("weight_decay", self.weight_decay, 0.0)


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay: theta' = theta (1 - lr wd) - lr m / D (Loshchilov & Hutter 2019, algorithm 2)."""

    weight_decay: float = 1e-2

    decoupled = True


Optimizer = SGD | Adam


def optimizer_of(inner_lr: InnerLr | None, inner: Optimizer | None) -> Optimizer:
    """The inner optimizer: SGD at inner_lr, or `inner`. Raises TypeError unless exactly one of the two is given."""
    if (inner_lr is None) == (inner is None):
        raise TypeError("give either inner_lr (plain gradient descent) or inner (an optimizer with its lr), not both")
    if inner is None:
        assert inner_lr is not None
        return _plain(inner_lr) if isinstance(inner_lr, float) else SGD(inner_lr)
    if not isinstance(inner, (SGD, Adam)):
        raise TypeError(f"inner must be fm.inner.SGD, Adam or AdamW, not {type(inner).__name__}")
    return inner


@functools.lru_cache(maxsize=16)
def _plain(inner_lr: float) -> SGD:
    return SGD(inner_lr)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; it must be a finite number")
    return float(value)


def _in_range(name: str, value: Any, least: float, most: float = math.inf) -> None:
    if not least <= _number(name, value) <= most:
        end = f"at least {least}" if most == math.inf else f"between {least} and {most}"
        raise ValueError(f"{name} is {value}; it must be {end}")
