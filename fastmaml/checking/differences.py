"""Central finite differences of a loss along directions in parameter space, and the sentences about a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from fastmaml.checking.compare import Named, inner, size
from fastmaml.checking.report import listed

# For losses and weights near 1 the error is 1e-16 / h from rounding and h^2 from the third derivative, both below 1e-10.
STEP = 3e-6

_KINKS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Hardtanh, nn.Threshold, nn.modules.pooling._MaxPoolNd)


class Slope(NamedTuple):
    """The derivative of a loss along a direction of length 1."""

    value: float
    noise: float  # disagreement of steps h and 2 h, in the first and second difference; large at a kink
    direction: Named

    def reach(self, grad: Named) -> float:
        """The norm of a gradient over the direction's parameters."""
        return size({name: grad[name] for name in self.direction if name in grad})

    def at_kink(self, grad: Named) -> bool:
        return not self.noise <= 1e-5 * self._scale(grad)

    def miss(self, grad: Named, scale: Named) -> float:
        """The error of the gradient's slope, as a share of `scale` over the direction's parameters."""
        return abs(self.value - inner(grad, self.direction)) / self._scale(scale)

    def fits(self, grad: Named, scale: Named) -> bool:
        """Within 1e-6 (rounding leaves 1e-10 of the loss), or ten times the noise."""
        return self.miss(grad, scale) <= 1e-6 + 10 * self.noise / self._scale(scale)

    def _scale(self, grad: Named) -> float:
        return self.reach(grad) or size(grad) or 1.0


def directions(grad: Named, count: int, seed: int, most: int, silent: Named | None = None) -> list[Named]:
    """`count` unit directions over all parameters, and one for each parameter whose gradient is above rounding.

    With more than `most` such parameters, neighbours share a direction. Each direction is the gradient plus half its
    length of random noise, so the slope is about as large as the gradient.
    silent: parameters without a gradient; each gets a random direction.
    """
    random = torch.Generator().manual_seed(seed)
    moved = [name for name in grad if float(grad[name].norm()) > 1e-8 * size(grad)]
    share = -(-len(moved) // most)
    parts = [moved[i : i + share] for i in range(0, len(moved), share or 1)]
    blocks = [moved] * count + (parts if len(parts) > 1 else [])
    along = [_unit({name: grad[name] for name in block}, random) for block in blocks if block]
    return along + [_unit({name: torch.zeros_like(leaf)}, random) for name, leaf in (silent or {}).items()]


def slopes(loss: Callable[[], float | None], leaves: Named, along: list[Named]) -> list[Slope]:
    """The slope of `loss` along each direction. Moves the leaves in place and restores them."""
    middle = loss()
    return [_slope(loss, leaves, direction, middle) for direction in along]


def _slope(loss: Callable[[], float | None], leaves: Named, direction: Named, middle: float | None) -> Slope:
    start = {name: leaves[name].detach().clone() for name in direction}

    def at(t: float) -> float:
        for name, d in direction.items():
            leaves[name].data.copy_(start[name] + t * d)
        value = loss()
        assert value is not None
        return value

    assert middle is not None
    h = STEP
    try:
        up, down, far_up, far_down = at(h), at(-h), at(2 * h), at(-2 * h)
    finally:
        for name, value in start.items():
            leaves[name].data.copy_(value)
    near, far = (up - down) / (2 * h), (far_up - far_down) / (4 * h)
    bend, far_bend = (up - 2 * middle + down) / h, (far_up - 2 * middle + far_down) / (2 * h)
    return Slope(near, max(abs(near - far), abs(2 * bend - far_bend)), direction)


def _unit(grad: Named, random: torch.Generator) -> Named:
    noise = {n: torch.randn(g.shape, generator=random, dtype=g.dtype).to(g.device) for n, g in grad.items()}
    mixed = {n: 0.5 * noise[n] / size(noise) + grad[n] / (size(grad) or 1.0) for n in grad}
    return {n: m / size(mixed) for n, m in mixed.items()}


def judged(found: list[Slope], given: Named, wanted: Named, right: bool, whose: str, model: nn.Module) -> list[str]:
    """Sentences: whether the slopes of `whose` loss fit the given gradient or the wanted one."""
    sure = [slope for slope in found if not slope.at_kink(wanted)]
    every = len(sure)
    mine, true = (sum(slope.fits(grad, wanted) for slope in sure) for grad in (given, wanted))
    start = f"Finite differences of {whose}"
    if right and mine == every:
        worst = max((slope.miss(given, wanted) for slope in sure), default=0.0)
        verdict = f"{start} agree with the gradient along {every} directions (worst difference {worst:.0e})."
    elif right:
        verdict = (
            f"{start} agree with the gradient along only {mine} of {every} directions: it belongs to another loss."
        )
    elif mine == every:
        verdict = (
            f"{start} agree with the gradient along {every} directions. The gradient fits this loss, so the loss is not "
            "the one described."
        )
    elif true == every:
        verdict = f"{start} agree with the oracle along all {every} directions."
    elif true == mine == 0:
        verdict = f"{start} agree with neither the gradient nor the oracle along {every} directions."
    else:
        verdict = (
            f"{start} agree with the oracle along {true} and with the gradient along {mine} of {every} directions."
        )
    return [verdict, *kinks(len(found) - every, len(found), model)]


def kinks(unsure: int, of: int, model: nn.Module) -> list[str]:
    """A sentence about the directions that cross a kink."""
    if not unsure:
        return []
    layers = [name for name, module in model.named_modules() if isinstance(module, _KINKS)]
    where = f" (as {listed(layers)} can make)" if layers else ""
    return [
        f"Along {unsure} of {of} directions finite differences cannot decide: the loss has a kink{where} within the step. "
        "There the oracle alone decides."
    ]
