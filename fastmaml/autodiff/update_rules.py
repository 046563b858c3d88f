"""The inner optimizers on flat vectors [T, P]: each step's update and its exact adjoint (ALGORITHMS 1.1 to 1.4).

The compiled engine has the same rules as fused Steps. autodiff uses the rules here, and so do custom rules.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from fastmaml.inner import SGD, Adam, Optimizer


class UpdateRule(Protocol):
    """Computes phi[k+1] from phi[k] and the gradient g[k], and the adjoint of this update.

    A rule serves one inner loop. The sweep calls `update` for k = 0 .. K-1, then `adjoint` for k = K-1 .. 0.
    """

    needs_gradient: bool  # whether the adjoint reads g[k] before the Hessian term

    def update(self, k: int, phi: Tensor, g: Tensor) -> Tensor:
        """phi[k+1] [T, P]."""

    def adjoint(self, k: int, v: Tensor, phi: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
        """(v without the Hessian term, y the adjoint of g[k]). The sweep continues with v + H[k] y."""

    def rate_grad(self, k: int, v: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        """The gradient [T, P] by the rates of step k. v: the value before `adjoint`."""


class _Rule:
    """The shared part of the rules: rates, clipping and coupled weight decay."""

    def __init__(self, optimizer: Optimizer, rates: Tensor, mask: Tensor | None):
        self.optimizer = optimizer
        self.rates = rates  # [1, P] or [K, P]
        self.mask = mask
        self.needs_gradient = optimizer.clip_value is not None or optimizer.clip_norm is not None

    def rate(self, k: int) -> Tensor:
        return self.rates[k if len(self.rates) > 1 else 0]

    def prepared(self, phi: Tensor, g: Tensor) -> Tensor:
        """The gradient that the optimizer sees: clipped, then decayed."""
        o = self.optimizer
        if o.clip_value is not None:
            g = g.clamp(-o.clip_value, o.clip_value)
        if o.clip_norm is not None:
            g = g * (o.clip_norm / self._norm(g)).clamp(max=1.0)
        if o.weight_decay and not getattr(o, "decoupled", False):
            g = g + o.weight_decay * phi
        return g

    def _norm(self, g: Tensor) -> Tensor:
        return (g if self.mask is None else g * self.mask).norm(dim=1, keepdim=True)

    def prepared_adjoint(self, v: Tensor, y: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
        """(v with the weight decay's term, the adjoint of the raw gradient). y: the adjoint of the prepared gradient."""
        o = self.optimizer
        if o.weight_decay and not getattr(o, "decoupled", False):
            v = v + o.weight_decay * y
        if o.clip_value is not None:
            assert g is not None
            y = y * (g.abs() <= o.clip_value)
        if o.clip_norm is not None:
            assert g is not None
            norm = self._norm(g)
            direction = (g if self.mask is None else g * self.mask) / norm
            scaled = o.clip_norm / norm * (y - direction * (g / norm * y).sum(1, keepdim=True))
            y = torch.where(norm > o.clip_norm, scaled, y)
        return v, y


class SGDRule(_Rule):
    """Gradient descent with torch.optim.SGD's momentum: the first buffer is the gradient without dampening."""

    def __init__(self, optimizer: SGD, rates: Tensor, mask: Tensor | None, state: Tensor | None = None, taken: int = 0):
        super().__init__(optimizer, rates, mask)
        self.buffer = state if taken else None
        self.carried = taken > 0 and state is not None
        self.buffers: list[Tensor] = []
        self.p: Tensor | None = None

    @property
    def state(self) -> Tensor | None:
        return self.buffer

    def update(self, k: int, phi: Tensor, g: Tensor) -> Tensor:
        o = self.optimizer
        assert isinstance(o, SGD)
        d = self.prepared(phi, g)
        if o.momentum:
            self.buffer = d if self.buffer is None else o.momentum * self.buffer + (1 - o.dampening) * d
            self.buffers.append(self.buffer)
            d = d + o.momentum * self.buffer if o.nesterov else self.buffer
        return phi - self.rate(k) * d

    def adjoint(self, k: int, v: Tensor, phi: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
        o = self.optimizer
        assert isinstance(o, SGD)
        av = self.rate(k) * v
        if not o.momentum:
            return self.prepared_adjoint(v, -av, g)
        p = torch.zeros_like(v) if self.p is None else self.p
        p = p - (o.momentum * av if o.nesterov else av)
        first = k == 0 and not self.carried
        y = p if first else (1 - o.dampening) * p
        y = y - av if o.nesterov else y
        self.p = o.momentum * p
        return self.prepared_adjoint(v, y, g)

    def rate_grad(self, k: int, v: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        o = self.optimizer
        assert isinstance(o, SGD)
        if not o.momentum:
            return -self.prepared(phi, g) * v
        d = self.prepared(phi, g) + o.momentum * self.buffers[k] if o.nesterov else self.buffers[k]
        return -d * v


class AdamRule(_Rule):
    """Adam and AdamW with bias correction; eps is outside the square root."""

    def __init__(self, optimizer: Any, rates: Tensor, mask: Tensor | None, state: Tensor | None = None, taken: int = 0):
        super().__init__(optimizer, rates, mask)
        self.needs_gradient = True
        self.taken = taken
        self.m: Tensor | None = None
        self.s: Tensor | None = None
        if state is not None:
            self.m, self.s = state.chunk(2, dim=1)
        self.moments: list[tuple[Tensor, Tensor]] = []
        self.p: Tensor | None = None
        self.r: Tensor | None = None

    @property
    def state(self) -> Tensor | None:
        return None if self.m is None or self.s is None else torch.cat([self.m, self.s], dim=1)

    def _corrected(self, k: int) -> tuple[Tensor, Tensor, float, float]:
        """(m / c1, s / c2, c1, c2) after step k."""
        (b1, b2), (m, s) = self.optimizer.betas, self.moments[k]  # type: ignore[union-attr]
        c1, c2 = 1 - b1 ** (self.taken + k + 1), 1 - b2 ** (self.taken + k + 1)
        return m / c1, s / c2, c1, c2

    def update(self, k: int, phi: Tensor, g: Tensor) -> Tensor:
        o = self.optimizer
        assert isinstance(o, Adam)
        g = self.prepared(phi, g)
        zeros = torch.zeros_like(g)
        b1, b2 = o.betas
        self.m = b1 * (zeros if self.m is None else self.m) + (1 - b1) * g
        self.s = b2 * (zeros if self.s is None else self.s) + (1 - b2) * g * g
        self.moments.append((self.m, self.s))
        mh, sh, _, _ = self._corrected(k)
        rate = self.rate(k)
        decayed = phi * (1 - rate * o.weight_decay) if o.decoupled else phi
        return decayed - rate * mh / (sh.sqrt() + o.eps)

    def adjoint(self, k: int, v: Tensor, phi: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
        o = self.optimizer
        assert g is not None and isinstance(o, Adam)
        b1, b2 = o.betas
        mh, sh, c1, c2 = self._corrected(k)
        root = sh.sqrt()
        d = root + o.eps
        av = self.rate(k) * v
        zeros = torch.zeros_like(v)
        p = (zeros if self.p is None else self.p) - av / (c1 * d)
        through_root = torch.where(sh > 0, av * mh / (2 * torch.where(sh > 0, root, 1.0) * d * d * c2), 0.0)
        r = (zeros if self.r is None else self.r) + through_root
        y = (1 - b1) * p + (1 - b2) * 2 * self.prepared(phi, g) * r
        self.p, self.r = b1 * p, b2 * r
        if o.decoupled:
            v = v - o.weight_decay * av
        return self.prepared_adjoint(v, y, g)

    def rate_grad(self, k: int, v: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        o = self.optimizer
        assert isinstance(o, Adam)
        mh, sh, _, _ = self._corrected(k)
        d = mh / (sh.sqrt() + o.eps)
        return -(d + o.weight_decay * phi if o.decoupled else d) * v


def rule_for(
    optimizer: Optimizer, rates: Tensor, mask: Tensor | None, state: Tensor | None = None, taken: int = 0
) -> SGDRule | AdamRule:
    """The rule of an optimizer. state [T, S P] and `taken` steps continue an earlier loop."""
    if isinstance(optimizer, SGD):
        return SGDRule(optimizer, rates, mask, state, taken)
    if isinstance(optimizer, Adam):
        return AdamRule(optimizer, rates, mask, state, taken)
    raise TypeError(f"there is no update rule for {type(optimizer).__name__}")
