"""The small networks that measure a machine: many sizes around usual ones, but none of a benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastmaml import inner, models
from fastmaml.algorithms.maml import MAML
from fastmaml.engine.engine import Engine

LANES = 16  # tasks per worker for the smallest networks, enough to fill all lanes


@dataclass(frozen=True)
class Sample:
    """A small network with its sizes: near the benchmarks' sizes, but not equal."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int  # 0: mean squared error on the network's outputs
    support: int
    query: int
    tasks: int = 1  # for each worker
    inner: inner.Optimizer = field(default_factory=lambda: inner.SGD(0.01))
    products: tuple[int, ...] = ()  # also measure Hessian products of so many examples

    @property
    def steps(self) -> int:
        """Two if cheap: the end of one sweep step and the start of the next may be fused into one operation."""
        return 2 if self.tasks > 1 else 1

    @property
    def loss(self) -> str:
        return "cross_entropy" if self.classes else "mse"

    def make(self, memory: str) -> MAML:
        return MAML(
            self.model(), inner=self.inner, inner_steps=self.steps, loss=self.loss, backend="cpu", memory=memory
        )

    def batch(self, tasks: int, engine: Engine) -> tuple[Any, ...]:
        """Support and query sets for `tasks` tasks."""
        return (*self.examples(tasks, self.support, engine, 0), *self.examples(tasks, self.query, engine, 1))

    def examples(self, tasks: int, count: int, engine: Engine, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Random examples. Regression targets lie near the network's outputs, to keep losses in range."""
        x = torch.rand(tasks, count, *self.shape, generator=torch.Generator().manual_seed(seed))
        if self.classes:
            return x, torch.arange(count).remainder(self.classes).repeat(tasks, 1)
        return x, engine.forward(engine.flatten(), x) + 0.1


def _functions() -> nn.Module:
    layers: list[nn.Module] = []
    for function in (nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.LeakyReLU):
        layers += [nn.Linear(48, 48), function()]
    return nn.Sequential(*layers, nn.Linear(48, 6))


SAMPLES = (
    Sample(lambda: models.mlp([1, 32, 32, 1]), (1,), 0, 8, 12, tasks=LANES, products=(8,)),
    Sample(lambda: models.mlp([2, 56, 56, 2]), (2,), 0, 12, 8, tasks=LANES, products=(12,)),
    Sample(_functions, (48,), 6, 6, 20, inner=inner.SGD(0.01, momentum=0.9)),
    Sample(lambda: models.mlp([40, 96, 96, 10]), (40,), 10, 24, 40, inner=inner.Adam(0.01)),
    Sample(lambda: models.mlp([600, 300, 150, 75, 10]), (600,), 10, 10, 60, tasks=4),
    Sample(lambda: models.mlp([1000, 360, 90, 6]), (1000,), 6, 6, 90, tasks=4),
    Sample(lambda: models.mlp([24, 24, 24, 24]), (24,), 0, 40, 24, tasks=4, products=(2, 12, 40, 160)),
    Sample(lambda: models.mlp([48, 48, 48, 48]), (48,), 0, 40, 24, tasks=4, products=(2, 12, 40, 160)),
    Sample(lambda: models.mlp([160, 160, 160, 160]), (160,), 0, 40, 12, tasks=4, products=(2, 12, 40, 160)),
    Sample(lambda: models.mlp([640, 640, 640, 640]), (640,), 0, 40, 6, products=(2, 12, 40, 160)),
    Sample(lambda: models.conv4(filters=64, image_size=24), (1, 24, 24), 5, 5, 30),
    Sample(lambda: models.conv4(3, filters=32, image_size=64), (3, 64, 64), 5, 5, 25),
    Sample(lambda: models.conv4(3, filters=32, image_size=96), (3, 96, 96), 5, 8, 3),
    Sample(lambda: models.conv4(filters=64, image_size=32, pooling="stride"), (1, 32, 32), 5, 5, 40),
    Sample(lambda: models.conv4(filters=16, image_size=16, norm="group"), (1, 16, 16), 4, 4, 12),
)
