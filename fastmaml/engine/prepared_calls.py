"""Meta-gradients and HVPs in settings and sizes that an Engine has run before: what was checked then is not checked again.

A small network's checks take as long as its derivatives. Those of a known call are one look-up, and the operator's own
look at the numbers. Whatever is out of the ordinary is no known call.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from fastmaml.compiled.operators import Compiled
from fastmaml.problem.results import MetaGradient
from fastmaml.inner import SGD, Adam, AdamW, InnerLr, Optimizer

Key = tuple[Hashable, ...]

_KEPT = 32
_OPTIMIZERS = (SGD, Adam, AdamW)


class KnownMetaGradient(NamedTuple):
    """What such a call takes besides tensors."""

    compiled: Compiled
    loop: str
    lr: float
    inner_lr_grad: bool

    def run(self, theta: Sequence[Tensor], batch: Sequence[Tensor]) -> MetaGradient | None:
        """None where the operator refuses the numbers: the checks have the sentence that says why."""
        try:
            found = self.compiled.plain_meta_gradient(theta, batch, self.lr, self.loop)
        except (ValueError, RuntimeError):
            return None
        loss, grad, output, losses, by_rate, _, query_losses, total = found
        of_rate = by_rate.sum() if self.inner_lr_grad else None
        return MetaGradient(loss, grad, output, of_rate, losses, None, query_losses, total)


class KnownHvp(NamedTuple):
    """The kernels that such a call runs on."""

    compiled: Compiled

    def run(self, params: Tensor, x: Tensor, y: Tensor, v: Tensor) -> Tensor | None:
        """None as of KnownMetaGradient."""
        try:
            return self.compiled.plain_hvp(params.detach() if params.requires_grad else params, x, y, v)
        except (ValueError, RuntimeError):
            return None


Call = TypeVar("Call", KnownMetaGradient, KnownHvp)


class KnownCalls(Generic[Call]):
    """Those of one Engine and one of its methods, in the host's memory."""

    def __init__(self) -> None:
        self._calls: dict[Key, Call] = {}

    def find(self, key: Key) -> Call | None:
        return self._calls.get(key)

    def add(self, key: Key, call: Call) -> None:
        """Remembers a call that went well, unless it depends on more than its key."""
        ran = call.compiled
        if ran.program.buffers or ran.caller is not None or ran.backend == "reference":
            return
        if len(self._calls) >= _KEPT:
            self._calls.clear()
        self._calls[key] = call


Settings = tuple[str, str, str]  # an engine's backend, memory and precision, on which the checks of every call depend


def key_of_meta_gradient(
    settings: Settings,
    theta: Sequence[Any],
    batch: Any,
    rates: InnerLr | Optimizer | None,
    inner_steps: Any,
    order: Any,
    inner_lr_grad: bool,
) -> Key | None:
    """All that the checks of a call depend on, but numbers in tensors; None where it cannot become a known one.

    theta: [P], or a part for each parameter, whose shapes and types the operator checks.
    """
    lr = rates.lr if isinstance(rates, _OPTIMIZERS) else rates
    # By type, as True == 1 == 1.0 and not all of them are allowed.
    if type(lr) is not float or type(inner_steps) is not int or not (order is None or type(order) is int):
        return None
    if not isinstance(batch, (tuple, list)) or len(batch) != 4 or not _all_plain(theta):
        return None
    forms = _forms(batch)
    if forms is None:
        return None
    return (
        settings,
        rates,
        inner_steps,
        order,
        bool(inner_lr_grad),
        len(theta),
        theta[0].shape,
        theta[0].dtype,
        *forms,
    )


def key_of_hvp(settings: Settings, params: Any, x: Any, y: Any, v: Any) -> Key | None:
    """As key_of_meta_gradient."""
    forms = _forms((x, y, v)) if _all_plain((params,)) else None
    return None if forms is None else (settings, params.shape, params.dtype, *forms)


def _all_plain(params: Sequence[Any]) -> bool:
    return all(type(part) is Tensor or type(part) is Parameter for part in params)


def _forms(tensors: Sequence[Any]) -> list[Hashable] | None:
    if torch.is_inference_mode_enabled():
        return None
    forms: list[Hashable] = []
    for x in tensors:
        if type(x) is not Tensor or x.requires_grad or x.is_inference() or not x.is_cpu:
            return None
        forms += (x.shape, x.dtype)
    return forms
