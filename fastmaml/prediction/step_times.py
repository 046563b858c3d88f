"""Predicts the time of a Step on this machine from measured Steps of the same op with similar sizes.

Each measured time is divided by a yardstick: the time of its arithmetic and bytes at fixed round rates. This ratio varies
slowly with the sizes. A new Step gets a weighted mean of its neighbours' ratios; distances are between log sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

STEP_S, FLOPS, OTHER_FLOPS, BYTES = 5e-8, 5e10, 1e10, 2e10  # the yardstick; only the order of magnitude matters
NEIGHBOURS = 5
MATRIX_SIZES = 4  # rows, depth, columns, width; other ops have a count and a length (introspection.costs)

Step = Mapping[str, Any]  # a Step as introspection.costs describes it


def yardstick(step: Step, lanes: int) -> float:
    """Seconds of one call of the Step at the round rates, for all tasks in its lanes."""
    work = step["products"] / FLOPS + step["other"] / OTHER_FLOPS + step["bytes"] / BYTES
    return STEP_S + lanes * work


def key(step: Step, lanes: int) -> str:
    """Only Steps of equal key are compared: the op, a pointwise function's name, and the layout."""
    own = " " + step["layer"].split(" ")[0] if step["op"].startswith("pointwise") else ""
    return f"{step['op']}{own}{' in lanes' if lanes > 1 else ''}"


def features(step: Step) -> list[float]:
    """The base-2 logarithms of a Step's sizes."""
    sizes = [max(float(size), 1.0) for size in step["sizes"]]
    sizes += [1.0] * (MATRIX_SIZES - len(sizes))
    terms = step["products"] / max(2.0 * sizes[0] * sizes[1] * sizes[2], 1.0)
    return [*(math.log2(size) for size in sizes), math.log2(max(step["bytes"], 1.0)), 2.0 * max(terms, 0.0)]


class Rates:
    """Predicts Step times from measured Steps, for one number of workers at once."""

    def __init__(self, measured: Iterable[tuple[str, list[float], float]]):
        """measured: (key, features, seconds over the yardstick)."""
        self._at: dict[str, tuple[Any, Any]] = {}
        by_key: dict[str, list[tuple[list[float], float]]] = {}
        for name, at, ratio in measured:
            by_key.setdefault(name, []).append((at, math.log(ratio)))
        for name, rows in by_key.items():
            self._at[name] = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
        if not self._at:
            raise ValueError("no Step has been measured")

    def seconds(self, step: Step, lanes: int) -> float:
        """Seconds of one call of the Step in a walk, by one worker."""
        name = key(step, lanes)
        at = np.array(features(step))
        found = self._at.get(name)
        if found is None:  # an op without a measurement: use all ops with products, or all without
            matrix = step["products"] > 0
            alike = [v for k, v in self._at.items() if k.startswith(("linear", "conv2d")) == matrix] or list(
                self._at.values()
            )
            found = np.concatenate([a for a, _ in alike]), np.concatenate([r for _, r in alike])
        distance = ((found[0] - at) ** 2).sum(axis=1)
        nearest = np.argsort(distance, kind="stable")[:NEIGHBOURS]
        weight = 1.0 / (distance[nearest] + 0.05) ** 1.5
        ratio = math.exp(float((weight * found[1][nearest]).sum() / weight.sum()))
        return ratio * yardstick(step, lanes)

    def knows(self, step: Step, lanes: int) -> bool:
        return key(step, lanes) in self._at

    def to_json(self) -> dict[str, Any]:
        return {name: [[*map(float, a), float(r)] for a, r in zip(at, ratio)] for name, (at, ratio) in self._at.items()}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Rates:
        return cls((name, row[:-1], math.exp(row[-1])) for name, rows in kept.items() for row in rows)
