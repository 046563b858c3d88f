"""The built-in cases: W1 to W4 (meta-gradients), W5 (Hessian-vector products), W6 (memory against inner steps)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from fastmaml import models
from fastmaml.benchmark.problem import Case

# Networks and sizes of the usual MAML papers. conv4: 3x3 convolution, batch norm, ReLU, halving by 2x2 max pooling or by
# the convolution's stride. The inner rates are lower than the papers', which changes no time. At the papers' rates, random
# weights and data amplify the adjoint of 5 steps, until single ReLU masks decide the float32 result.
_SINE_MLP = partial(models.mlp, [1, 40, 40, 1])
_MLP = partial(models.mlp, [784, 256, 128, 64, 64, 5])
_CONV64 = partial(models.conv4, filters=64)
_CONV64_STRIDE = partial(models.conv4, filters=64, pooling="stride")
_CONV32 = partial(models.conv4, in_channels=3, filters=32, image_size=84)


def _sinusoid(steps: int) -> Case:
    name = f"sinusoid-k{steps}"
    return Case(name, "MLP 1-40-40-1", _SINE_MLP, "mse", (1,), None, 25, 10, 10, 0.01, steps, workload="W1")


def _mlp(steps: int) -> Case:
    network = "MLP 784-256-128-64-64-5"
    return Case(f"mlp-k{steps}", network, _MLP, "cross_entropy", (784,), 5, 32, 5, 75, 0.1, steps, workload="W2")


def _omniglot(pooling: str, tasks: int, steps: int) -> Case:
    name = f"omniglot{'-stride' if pooling == 'stride' else ''}-t{tasks}-k{steps}"
    network = f"Conv4-64, 28x28, {'max pooling' if pooling == 'max' else 'stride 2'}"
    model = _CONV64 if pooling == "max" else _CONV64_STRIDE
    case = Case(name, network, model, "cross_entropy", (1, 28, 28), 5, tasks, 5, 75, 0.01, steps, workload="W3")
    return replace(case, common=pooling == "max" and tasks == 8)


def _mini(shots: int, tasks: int, steps: int) -> Case:
    name = f"mini-s{shots}-t{tasks}-k{steps}"
    case = Case(name, "Conv4-32, 84x84x3", _CONV32, "cross_entropy", (3, 84, 84), 5, tasks, 5 * shots, 75, 0.01, steps)
    return replace(case, workload="W4", common=(shots, tasks, steps) == (5, 2, 1))


META = {
    case.name: case
    for case in (
        *(_sinusoid(steps) for steps in (1, 5, 10)),
        *(_mlp(steps) for steps in (1, 5)),
        *(_omniglot(pooling, tasks, steps) for pooling in ("max", "stride") for tasks in (8, 32) for steps in (1, 5)),
        *(_mini(shots, tasks, steps) for shots in (1, 5) for tasks in (2, 4) for steps in (1, 5)),
    )
}


@dataclass(frozen=True)
class HvpCase:
    """Hessian-vector products of T tasks of N examples, each with its own weights.

    width: of an MLP with three equal layers and mean squared error; None: Conv4-64 on 28x28 with cross-entropy.
    """

    width: int | None
    tasks: int
    examples: int = 32

    def __str__(self) -> str:
        return f"{'conv4' if self.width is None else f'mlp{self.width}'}-t{self.tasks}-n{self.examples}"

    @property
    def compiled(self) -> bool:
        """Whether torch.compile is measured by default. It takes half a minute per case."""
        return self.width is not None and self.examples == 32 and self.tasks in (16, 64)

    @property
    def repeated(self) -> bool:
        """Whether to also measure several directions at fixed parameters."""
        return self.width is not None and self.examples == 32 and self.tasks == 16

    @property
    def common(self) -> bool:
        """Whether peers with slow vmapped convolutions (seconds) are measured by default."""
        return self.width is not None or self.tasks * self.examples < 100


# W5. Widths 512 and 2,048 with more tasks are left out: the parameters of all tasks would not fit into memory.
HVP = {
    str(case): case
    for case in (
        *(HvpCase(width, tasks) for width in (32, 128) for tasks in (1, 16, 64, 256)),
        *(HvpCase(512, tasks) for tasks in (1, 16, 64)),
        *(HvpCase(2048, tasks) for tasks in (1, 4)),
        *(HvpCase(width, 16, examples) for width in (32, 128, 512) for examples in (1, 8, 256)),
        HvpCase(None, 1, 32),
        HvpCase(None, 16, 5),
        HvpCase(None, 16, 32),
    )
}

# W6: four tasks of W3's network.
MEMORY_STEPS = (1, 5, 10, 20, 50, 100)
MEMORY = {"omniglot-t4": replace(_omniglot("max", 4, 1), name="omniglot-t4", workload="W6")}
BY_NAME = {**META, **MEMORY}
