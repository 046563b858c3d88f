"""Prepared calls: the first call with given options and shapes is checked; later calls skip the checks.

For a small network the checks take as long as the derivatives. A later call is one look-up. The compiled operator still
rejects NaN, infinity and labels out of range; the checks then run and raise their error. A call is never prepared if it
has weights, rates in tensors, frozen parameters, buffers or a loss written in Python. The key does not cover these.
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
    """A meta-gradient on CPU tensors, with one rate and no further tensors."""

    compiled: Compiled
    loop: str
    lr: float
    inner_lr_grad: bool

    def run(self, theta: Sequence[Tensor], batch: Sequence[Tensor]) -> MetaGradient | None:
        """The meta-gradient. None if the operator rejects the numbers; the checks then raise the error."""
        try:
            found = self.compiled.plain_meta_gradient(theta, batch, self.lr, self.loop)
        except (ValueError, RuntimeError):
            return None
        loss, grad, output, losses, rate_grad, _, query_losses, total = found
        return MetaGradient(
            loss, grad, output, rate_grad.sum() if self.inner_lr_grad else None, losses, None, query_losses, total
        )


class PreparedHvp(NamedTuple):
    """A Hessian-vector product on CPU tensors, without weights."""

    compiled: Compiled

    def run(self, params: Tensor, x: Tensor, y: Tensor, v: Tensor) -> Tensor | None:
        """The product [T, P]. None if the operator rejects the numbers."""
        try:
            return self.compiled.plain_hvp(params.detach() if params.requires_grad else params, x, y, v)
        except (ValueError, RuntimeError):
            return None


Call = TypeVar("Call", PreparedCall, PreparedHvp)


class PreparedCalls(Generic[Call]):
    """The prepared calls of one method of one Engine."""

    def __init__(self) -> None:
        self._calls: dict[Key, Call] = {}

    def find(self, settings: Key, params: Iterable[Any], data: Any) -> tuple[Key | None, Call | None]:
        """(the key of this call, the prepared call or None). The key is None if the call cannot be prepared.

        The key holds everything that the checks depend on.
        settings: the engine's and the call's. data: tensors.
        params: one vector, or one part per parameter. The operator checks their shapes and types.
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
        """Remembers a successful call, unless it depends on more than its key."""
        ran = call.compiled
        if ran.program.buffers or ran.python_loss is not None or ran.backend == "reference":
            return
        if len(self._calls) >= _KEPT:
            self._calls.clear()
        self._calls[key] = call
