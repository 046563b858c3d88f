"""The benchmark cases as data, and the network and tasks that every implementation of a case gets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

import fastmaml as fm


@dataclass(frozen=True)
class Case:
    """One meta-gradient: T tasks of `support` and `query` examples each, K inner steps from one random start."""

    name: str
    network: str  # in words, for the table
    model: Callable[[], nn.Module]
    loss: str  # "mse" | "cross_entropy"
    input_shape: tuple[int, ...]
    ways: int | None  # None: regression of one number
    tasks: int
    support: int
    query: int
    inner_lr: float
    inner_steps: int = 1

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Problem:
    """A case with its weights and data. Implementations may clone the model, but leave its weights as they are."""

    case: Case
    model: nn.Module
    batch: fm.TaskBatch

    def double(self) -> Problem:
        """The same numbers in float64, so both types share one exact answer."""
        return replace(self, model=copy.deepcopy(self.model).double(), batch=self.batch.to(dtype=torch.float64))

    def to(self, device: str) -> Problem:
        """The same numbers on a device."""
        return replace(self, model=copy.deepcopy(self.model).to(device), batch=self.batch.to(device))

    def own(self) -> Problem:
        """With an own copy of the model, for an implementation that fills `.grad`."""
        return replace(self, model=copy.deepcopy(self.model))


# The networks and sizes are those of the usual MAML papers. conv4: 3x3 convolution, batch norm, ReLU, 2x2 max pooling.
# The inner rates keep random starts and random data in the range where float32 can be judged: at the papers' rates the
# adjoint of 5 steps is amplified until masks that fall the other way decide the result. Rates cost no time.
_SINUSOID = Case(
    "sinusoid", "MLP 1-40-40-1", lambda: fm.models.mlp([1, 40, 40, 1]), "mse", (1,), None, 25, 10, 10, 0.01
)
_MLP = Case(
    "mlp",
    "MLP 784-256-128-64-64-5",
    lambda: fm.models.mlp([784, 256, 128, 64, 64, 5]),
    "cross_entropy",
    (784,),
    5,
    32,
    5,
    75,
    0.1,
)
_OMNIGLOT = Case(
    "omniglot", "Conv4-64, 28x28", lambda: fm.models.conv4(), "cross_entropy", (1, 28, 28), 5, 8, 5, 75, 0.01
)
_MINI = Case(
    "mini",
    "Conv4-32, 84x84x3",
    lambda: fm.models.conv4(in_channels=3, filters=32, image_size=84),
    "cross_entropy",
    (3, 84, 84),
    5,
    2,
    25,
    75,
    0.01,
)


def _with_steps(case: Case, inner_steps: int) -> Case:
    return replace(case, name=f"{case.name}-k{inner_steps}", inner_steps=inner_steps)


CASES = {
    case.name: case
    for case in (
        _with_steps(_SINUSOID, 1),
        _with_steps(_SINUSOID, 5),
        _with_steps(_MLP, 1),
        _with_steps(_MLP, 5),
        _with_steps(_OMNIGLOT, 1),
        _with_steps(_OMNIGLOT, 5),
        _with_steps(_MINI, 1),
    )
}


def problem(case: Case, seed: int = 0) -> Problem:
    """The float32 weights and tasks of a case; the seed decides both.

    Classes are random prototypes with noisy examples around them, so that losses and gradients are of a usual size.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = case.model()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # batch statistics only: no implementation pays for running averages
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    if case.ways is None:
        x = [
            torch.rand(case.tasks, n, *case.input_shape, generator=random) * 10 - 5 for n in (case.support, case.query)
        ]
        amplitude, phase = torch.rand(2, case.tasks, 1, 1, generator=random)
        y = [(0.1 + 4.9 * amplitude) * torch.sin(x_ - torch.pi * phase) for x_ in x]
    else:
        y = [torch.arange(case.ways).repeat_interleave(n // case.ways).repeat(case.tasks, 1)
             for n in (case.support, case.query)]  # fmt: skip
        prototypes = torch.rand(case.tasks, case.ways, *case.input_shape, generator=random)
        of_task = torch.arange(case.tasks)[:, None]
        x = [prototypes[of_task, y_] + 0.3 * torch.randn(*y_.shape, *case.input_shape, generator=random) for y_ in y]
    return Problem(case, model, fm.TaskBatch(x[0], y[0], x[1], y[1]))


def arithmetic(problem: Problem) -> float:
    """Floating-point operations of the case's matrix products: 3F - F1 for a gradient, 9F - 5F1 for an exact inner step.

    F is the forward pass of one example and F1 that of its first layer (no gradient in x is needed there). Nothing that
    is computed twice counts twice, so an engine that recomputes does more than this.
    """
    layers: list[float] = []

    def count(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        positions = output[0].numel() / weight.shape[0]
        layers.append(2.0 * weight.numel() * positions)

    model = copy.deepcopy(problem.model)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(problem.batch.support_x[0])
    case, forward, first = problem.case, sum(layers), layers[0]
    step, gradient = 9 * forward - 5 * first, 3 * forward - first
    return case.tasks * (case.inner_steps * case.support * step + case.query * gradient)
