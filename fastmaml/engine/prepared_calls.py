"""What an Engine keeps after it has checked a set of options with given shapes: the first call prepares, later ones run.

For a small network the checks take as long as the derivatives. A later call is one look-up. The compiled operator still
refuses NaN, infinity and labels out of range, and the checks then say why. A call that depends on more than its key
(weights, rates in tensors, frozen parameters, buffers, a loss written in Python) is never prepared.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from fastmaml.compiled.operators import Compiled
from fastmaml.problem.results import MetaGradient

Key = tuple[Hashable, ...]

_KEPT = 32


class PreparedCall(NamedTuple):
    """A meta-gradient with one rate and no further tensors, in the host's memory."""

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
        loss, grad, output, losses, rate_grad, _, query_losses, total = found
        return MetaGradient(
            loss, grad, output, rate_grad.sum() if self.inner_lr_grad else None, losses, None, query_losses, total
        )


class PreparedHvp(NamedTuple):
    """A Hessian-vector product without weights, in the host's memory."""

    compiled: Compiled

    def run(self, params: Tensor, x: Tensor, y: Tensor, v: Tensor) -> Tensor | None:
        """None where the operator refuses the numbers."""
        try:
            return self.compiled.plain_hvp(params.detach() if params.requires_grad else params, x, y, v)
        except (ValueError, RuntimeError):
            return None


Call = TypeVar("Call", PreparedCall, PreparedHvp)


class PreparedCalls(Generic[Call]):
    """Those of one Engine and one of its methods."""

    def __init__(self) -> None:
        self._calls: dict[Key, Call] = {}

    def find(self, settings: Key, params: Iterable[Any], data: Any) -> tuple[Key | None, Call | None]:
        """(all that the checks of this call depend on, the call where it is prepared).

        settings: the engine's and the call's. params: one vector, or a part for each parameter, whose shapes and types
        the operator checks. data: tensors. The key is None for a call that cannot be prepared.
        """
        if torch.is_inference_mode_enabled() or not isinstance(data, (tuple, list)):
            return None, None
        first = None
        for part in params:
            if type(part) is not Tensor and type(part) is not Parameter:
                return None, None
            first = part if first is None else first
        if first is None:
            return None, None
        forms: list[Hashable] = [settings, first.shape, first.dtype]
        for x in data:
            if type(x) is not Tensor or x.requires_grad or x.is_inference() or not x.is_cpu:
                return None, None
            forms += (x.shape, x.dtype)
        key = tuple(forms)
        return key, self._calls.get(key)

    def keep(self, key: Key, call: Call) -> None:
        """Remembers a call that went well, unless it depends on more than its key."""
        ran = call.compiled
        if ran.program.buffers or ran.python_loss is not None or ran.backend == "reference":
            return
        if len(self._calls) >= _KEPT:
            self._calls.clear()
        self._calls[key] = call
