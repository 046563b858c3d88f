"""An inner loop as plain data: the optimizer, the number of steps, and the terms of its adjoint sweep.

The compiled engine parses `InnerLoop.text()` (csrc/meta). update_rules.py and adjoint_sweep.py read the fields.
"""

from __future__ import annotations

from typing import NamedTuple

from fastmaml.inner import SGD, Adam, Optimizer


class InnerLoop(NamedTuple):
    """K inner steps and how to differentiate them (ALGORITHMS 1.1 to 1.4). LoopTensors holds the tensors."""

    optimizer: Optimizer
    steps: int
    order: int | None = None  # Hessian terms for the last `order` steps only; 0: first order; None: all
    minibatch: int | None = None  # step k sees the support rows k B .. k B + B - 1
    queries: tuple[int, ...] = ()  # the query loss is taken at these phi[k]; (): at phi[K]
    rows: tuple[int, ...] = ()  # indices of parameters with their own values at every step
    proximal: bool = False  # + lam (phi - theta) to every step's gradient
    per_task: bool = False  # gradients of each task instead of their mean
    rate_grad: bool = False

    @property
    def query_steps(self) -> tuple[int, ...]:
        """The steps k at whose phi[k] the query loss is taken. The last is K."""
        return self.queries or (self.steps,)

    @property
    def hessian_from(self) -> int:
        """The first step with a Hessian term in the sweep."""
        return 0 if self.order is None else max(self.steps - self.order, 0)

    @property
    def sweep_from(self) -> int:
        """The step at which the sweep ends. The adjoint passes through earlier steps unchanged (truncation)."""
        return 0 if self.order == 0 else self.hessian_from

    def text(self) -> str:
        """One line of words for the compiled engine's parser, without defaults."""
        o = self.optimizer
        words = [f"steps={self.steps}"]
        if isinstance(o, SGD):
            if o.momentum:
                words += [f"momentum={o.momentum!r}", f"dampening={o.dampening!r}", f"nesterov={int(o.nesterov)}"]
        elif isinstance(o, Adam):
            words += ["rule=adam", f"beta1={o.betas[0]!r}", f"beta2={o.betas[1]!r}", f"eps={o.eps!r}"]
            words += ["decoupled=1"] if o.decoupled else []
        else:
            raise TypeError(f"the compiled engine has no update rule for {type(o).__name__}")
        if o.weight_decay:
            words.append(f"weight_decay={o.weight_decay!r}")
        if o.clip_value is not None:
            words.append(f"clip_value={o.clip_value!r}")
        if o.clip_norm is not None:
            words.append(f"clip_norm={o.clip_norm!r}")
        if self.order is not None and self.order < self.steps:
            words.append(f"order={self.order}")
        if self.minibatch is not None:
            words.append(f"minibatch={self.minibatch}")
        if self.queries:
            words.append(f"queries={','.join(map(str, self.queries))}")
        if self.rows:
            words.append(f"rows={','.join(map(str, self.rows))}")
        if self.proximal:
            words.append("proximal=1")
        if self.per_task:
            words.append("per_task=1")
        if self.rate_grad:
            words.append("rate_grad=1")
        return " ".join(words)
