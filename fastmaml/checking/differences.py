"""Central finite differences of a loss along directions in parameter space, and what they say about a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from fastmaml.checking.compare import Named, inner, size
from fastmaml.checking.report import listed

# With losses and weights near 1 rounding leaves 1e-16 / h and the third derivative h^2: both are below 1e-10 here.
STEP = 3e-6

_KINKS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Hardtanh, nn.Threshold, nn.modules.pooling._MaxPoolNd)


class Slope(NamedTuple):
    """The derivative of a loss along a direction of length 1."""

    value: float
    noise: float  # how far steps of h and 2 h disagree, in the first and in the second difference: a kink shows there
    direction: Named

    def reach(self, grad: Named) -> float:
        """The size of a gradient in the parameters of the direction."""
        return size({name: grad[name] for name in self.direction if name in grad})

    def at_kink(self, grad: Named) -> bool:
        return not self.noise <= 1e-5 * self._scale(grad)

    def miss(self, grad: Named, scale: Named) -> float:
        """How far the gradient's slope is from this one, as a share of `scale` there."""
        return abs(self.value - inner(grad, self.direction)) / self._scale(scale)

    def fits(self, grad: Named, scale: Named) -> bool:
        """Within 1e-6 (rounding leaves 1e-10 of the loss), or ten times the noise."""
        return self.miss(grad, scale) <= 1e-6 + 10 * self.noise / self._scale(scale)

    def _scale(self, grad: Named) -> float:
        return self.reach(grad) or size(grad) or 1.0


def directions(grad: Named, count: int, seed: int, most: int, silent: Named | None = None) -> list[Named]:
    """`count` unit directions over all parameters, and one for each whose gradient is more than rounding.

    If there are more than `most` of those, neighbours share a direction. Each is the gradient's own, turned by a random
    part of half its length: so the slope is of the gradient's size.
    silent: parameters without a gradient, each of which gets a random direction.
    """
    random = torch.Generator().manual_seed(seed)
    moved = [name for name in grad if float(grad[name].norm()) > 1e-8 * size(grad)]
    share = -(-len(moved) // most)
    parts = [moved[i : i + share] for i in range(0, len(moved), share or 1)]
    blocks = [moved] * count + (parts if len(parts) > 1 else [])
    along = [_unit({name: grad[name] for name in block}, random) for block in blocks if block]
    return along + [_unit({name: torch.zeros_like(leaf)}, random) for name, leaf in (silent or {}).items()]


def slopes(loss: Callable[[], float | None], leaves: Named, along: list[Named]) -> list[Slope]:
    """The slope of `loss` along each direction, by moving the leaves in place; they are put back."""
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
    """Sentences: whether the slopes of `whose` loss are those of the given gradient or of the wanted one."""
    sure = [slope for slope in found if not slope.at_kink(wanted)]
    every = len(sure)
    mine, true = (sum(slope.fits(grad, wanted) for slope in sure) for grad in (given, wanted))
    start = f"Finite differences of {whose}"
    if right and mine == every:
        worst = max((slope.miss(given, wanted) for slope in sure), default=0.0)
        verdict = f"{start} agree with it along {every} directions (worst difference {worst:.0e})."
    elif right:
        verdict = f"{start} agree along {mine} of {every} directions only: the loss is not that of the gradient."
    elif mine == every:
        verdict = (
            f"{start} agree with the gradient along {every} directions: it differentiates its loss rightly, so it is the "
            "loss that is not the one described."
        )
    elif true == every:
        verdict = f"{start} side with the oracle along all {every} directions."
    elif true == mine == 0:
        verdict = f"{start} agree with neither along {every} directions."
    else:
        verdict = (
            f"{start} agree with the oracle along {true} and with the gradient along {mine} of {every} directions."
        )
    return [verdict, *kinks(len(found) - every, len(found), model)]


def kinks(unsure: int, of: int, model: nn.Module) -> list[str]:
    """What to say of the directions along which a kink lies."""
    if not unsure:
        return []
    layers = [name for name, module in model.named_modules() if isinstance(module, _KINKS)]
    where = f" (such as {listed(layers)} make)" if layers else ""
    return [
        f"Along {unsure} of {of} directions finite differences cannot tell: the loss has a kink{where} within the step; "
        "there the oracle alone decides."
    ]
