"""Meta-gradients in settings and sizes that an Engine has run before: what was checked then is not checked again.

A small network's checks take as long as its meta-gradient. Those of a known call are one look-up, and the operator's own
look at the numbers. Whatever is out of the ordinary is no known call.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fastmaml.compiled import Compiled
from fastmaml.engine_results import MetaGradient
from fastmaml.inner import SGD, Adam, AdamW, Optimizer
from fastmaml.inner_loop import InnerLoop
from fastmaml.parameters import InnerLr

Key = tuple[Hashable, ...]

_KEPT = 32
_OPTIMIZERS = (SGD, Adam, AdamW)


class KnownCall(NamedTuple):
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


class KnownCalls:
    """Those of one Engine, in the host's memory."""

    def __init__(self) -> None:
        self._calls: dict[Key, KnownCall] = {}

    def key(
        self,
        chosen: tuple[str, str, str],
        theta: Sequence[Any],
        batch: Any,
        rates: InnerLr | Optimizer | None,
        inner_steps: Any,
        order: Any,
        inner_lr_grad: bool,
    ) -> Key | None:
        """All that the checks of a call depend on, but numbers in tensors; None where it cannot become a known one.

        chosen: the engine's backend, memory and precision. theta: [P], or a part for each parameter, whose shapes and
        types the operator checks.
        """
        lr = rates.lr if isinstance(rates, _OPTIMIZERS) else rates
        # By type, as True == 1 == 1.0 and not all of them are allowed.
        if type(lr) is not float or type(inner_steps) is not int or not (order is None or type(order) is int):
            return None
        if not isinstance(batch, (tuple, list)) or len(batch) != 4 or torch.is_inference_mode_enabled():
            return None
        if not all(type(part) is Tensor or type(part) is Parameter for part in theta):
            return None
        forms: list[Hashable] = [len(theta), theta[0].shape, theta[0].dtype]
        for x in batch:
            if type(x) is not Tensor or x.requires_grad or x.is_inference() or not x.is_cpu:
                return None
            forms += (x.shape, x.dtype)
        return (chosen, rates, inner_steps, order, bool(inner_lr_grad), *forms)

    def find(self, key: Key) -> KnownCall | None:
        return self._calls.get(key)

    def add(self, key: Key, ran: Compiled, loop: InnerLoop, lr: Any) -> None:
        """Remembers a call that went well, unless it depends on more than its key."""
        if ran.program.buffers or ran.caller is not None or ran.backend == "reference":
            return
        if len(self._calls) >= _KEPT:
            self._calls.clear()
        self._calls[key] = KnownCall(ran, loop.text(), lr, loop.rate_grad)
