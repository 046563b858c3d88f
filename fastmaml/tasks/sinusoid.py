"""Sinusoid regression: Finn et al., "Model-Agnostic Meta-Learning", ICML 2017, section 5.1."""

from __future__ import annotations

from math import pi
from typing import NamedTuple

import numpy as np
import torch

from .sampler import random_stream
from .source import TaskSource, check_count
from .task_batch import TaskBatch

AMPLITUDE = (0.1, 5.0)
PHASE = (0.0, pi)
INPUT = (-5.0, 5.0)


class Waves(NamedTuple):
    """The curves behind a batch: y = amplitude * sin(x - phase); both are float64 [T]."""

    amplitude: torch.Tensor
    phase: torch.Tensor

    def at(self, x: torch.Tensor) -> torch.Tensor:
        """True values at `x`, in its dtype. `x` broadcasts against [T, 1, 1]: [T, N, 1] or [N, 1]."""
        shape = (-1, 1, 1)
        return (self.amplitude.view(shape) * torch.sin(x.double() - self.phase.view(shape))).to(x.dtype)


class Sinusoid(TaskSource):
    """Regression of sine waves: amplitude in [0.1, 5], phase in [0, pi], x in [-5, 5], all uniform.

    `sample(tasks)` gives float32 `support_x`, `support_y` [T, shots, 1] and `query_x`, `query_y` [T, query_shots, 1].
    The waves and query points depend on (seed, split, step), but not on `shots`. So tests with 5, 10 and 20 shots see the
    same curves: `Sinusoid(shots=5, query_shots=100, split="test").sample(600, step=0)`.
    """

    name = "sinusoid"
    ways = None
    input_shape = (1,)
    output_size = 1
    loss = "mse"

    def __init__(self, shots: int = 10, query_shots: int = 10, split: str = "train", seed: int = 0) -> None:
        super().__init__(split, shots, query_shots, seed)

    def sample_with_parameters(self, tasks: int, step: int | None = None) -> tuple[TaskBatch, Waves]:
        """`sample(tasks, step)`, with its waves."""
        number = self.position if step is None else check_count("step", step, least=0)
        return self.sample(tasks, step), self._waves(tasks, number)

    def _draw(self, tasks: int, step: int) -> TaskBatch:
        waves = self._waves(tasks, step)
        support_x = self._points(tasks, step, 1, self.shots)
        query_x = self._points(tasks, step, 2, self.query_shots)
        return TaskBatch(support_x, waves.at(support_x), query_x, waves.at(query_x))

    def _waves(self, tasks: int, step: int) -> Waves:
        low, high = np.array([AMPLITUDE, PHASE]).T
        drawn = torch.from_numpy(random_stream(self.seed, self.split, step).uniform(low, high, (tasks, 2)))
        return Waves(drawn[:, 0].clone(), drawn[:, 1].clone())

    def _points(self, tasks: int, step: int, part: int, count: int) -> torch.Tensor:
        points = random_stream(self.seed, self.split, step, part).uniform(*INPUT, (tasks, count, 1))
        return torch.from_numpy(points.astype(np.float32))
