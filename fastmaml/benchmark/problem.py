"""A benchmark case as data, and the network and tasks that every implementation gets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastmaml.problem.losses import Loss
from fastmaml.tasks import TaskBatch


@dataclass(frozen=True)
class Case:
    """One meta-gradient: T tasks of `support` and `query` examples each, K inner steps from one random start."""

    name: str
    network: str  # a description for the table
    model: Callable[[], nn.Module]
    loss: Loss  # "mse" | "cross_entropy" | a function (output, target) -> [examples]
    input_shape: tuple[int, ...]
    ways: int | None  # None: regression of `targets` numbers
    tasks: int
    support: int
    query: int
    inner_lr: float
    inner_steps: int = 1
    targets: int = 1
    workload: str = ""  # the name of a workload, W1 to W8
    common: bool = True  # whether peers that take minutes per case are measured by default

    def __str__(self) -> str:
        return self.name

    @property
    def sizes(self) -> str:
        """Tasks, examples and steps as text."""
        return f"{self.tasks} tasks, {self.support} support, {self.query} query, K = {self.inner_steps}"


@dataclass(frozen=True)
class Problem:
    """A case with its weights and data. Implementations may clone the model but must not change its weights."""

    case: Case
    model: nn.Module
    batch: TaskBatch

    def double(self) -> Problem:
        """The same problem in float64, so both types share one exact answer."""
        return replace(self, model=copy.deepcopy(self.model).double(), batch=self.batch.to(dtype=torch.float64))

    def to(self, device: str) -> Problem:
        """The same problem on a device."""
        return replace(self, model=copy.deepcopy(self.model).to(device), batch=self.batch.to(device))

    def own(self) -> Problem:
        """The problem with its own copy of the model, for an implementation that fills `.grad`."""
        return replace(self, model=copy.deepcopy(self.model))


def random_model(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network with weights from the seed. Its batch norms use batch statistics only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
    without_running_statistics(model)
    return model


def without_running_statistics(model: nn.Module) -> None:
    """Makes batch norms use batch statistics only, so no implementation pays for running averages."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None


def problem(case: Case, seed: int = 0) -> Problem:
    """The float32 weights and tasks of a case. The seed decides both.

    Classes are random prototypes with noisy examples, so losses and gradients have a usual size.
    """
    random = torch.Generator().manual_seed(seed)
    model = random_model(case.model, seed)
    sets = (case.support, case.query)
    if case.ways is None:
        x = [torch.rand(case.tasks, n, *case.input_shape, generator=random) * 10 - 5 for n in sets]
        amplitude, phase = torch.rand(2, case.tasks, 1, case.targets, generator=random)
        y = [(0.1 + 4.9 * amplitude) * torch.sin(x_.flatten(2)[..., :1] - torch.pi * phase) for x_ in x]
    else:
        y = [torch.arange(case.ways).repeat_interleave(n // case.ways).repeat(case.tasks, 1) for n in sets]
        prototypes = torch.rand(case.tasks, case.ways, *case.input_shape, generator=random)
        of_task = torch.arange(case.tasks)[:, None]
        x = [prototypes[of_task, y_] + 0.3 * torch.randn(*y_.shape, *case.input_shape, generator=random) for y_ in y]
    return Problem(case, model, TaskBatch(x[0], y[0], x[1], y[1]))


def forward_flops(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """(F, F1) per example of x [N, ...]: floating-point operations of all linear and conv layers, and of the first one."""
    layers: list[float] = []

    def count(module: nn.Module, inputs: object, output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        positions = output[0].numel() / weight.shape[0]
        layers.append(2.0 * weight.numel() * positions)

    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(x)
    return sum(layers), layers[0] if layers else 0.0


def arithmetic(problem: Problem) -> float:
    """Floating-point operations of the case's matrix products: 3F - F1 for a gradient, 9F - 5F1 for an exact inner step.

    F is the forward pass of one example. F1 is its first layer, which needs no gradient by x. Recomputation does not
    count, so an engine that recomputes does more work than this.
    """
    case = problem.case
    forward, first = forward_flops(problem.model, problem.batch.support_x[0])
    step, gradient = 9 * forward - 5 * first, 3 * forward - first
    return case.tasks * (case.inner_steps * case.support * step + case.query * gradient)


@dataclass(frozen=True)
class HvpProblem:
    """The network and loss, and for each task its weights, examples and direction."""

    name: str
    model: nn.Module
    loss: Loss
    params: Tensor  # [T, P]
    x: Tensor  # [T, N, ...]
    y: Tensor
    v: Tensor  # [T, P]

    @property
    def tasks(self) -> int:
        return len(self.params)

    def to(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> HvpProblem:
        """The same problem on another device or in another type."""
        moved = [t.to(device, dtype if t.is_floating_point() else None) for t in (self.params, self.x, self.y, self.v)]
        return HvpProblem(self.name, copy.deepcopy(self.model).to(device, dtype), self.loss, *moved)

    @property
    def gflop(self) -> float:
        """GFLOP of the matrix products: 9F - 5F1 per example, like an exact inner step."""
        forward, first = forward_flops(self.model, self.x[0])
        return self.tasks * self.x.shape[1] * (9 * forward - 5 * first) / 1e9
