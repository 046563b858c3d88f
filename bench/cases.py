"""The workloads W7 and W8 as data. W1 to W6 are in the package (fastmaml/benchmark/cases.py)."""

from __future__ import annotations

from dataclasses import dataclass

from fastmaml.benchmark.cases import HVP, MEMORY, MEMORY_STEPS, META
from fastmaml.benchmark.problem import Case

CASES = META


@dataclass(frozen=True)
class LearnerCase:
    """W7: one step of a learner, `out.loss.backward()`, on the tasks of a W3 case."""

    algorithm: str  # "fomaml" | "reptile" | "maml++" | "imaml"
    on: Case
    inner_steps: int
    lam: float = 2.0  # iMAML's proximal strength
    cg_steps: int = 5

    def __str__(self) -> str:
        return f"{self.algorithm}-{self.on.name.rsplit('-', 1)[0]}-k{self.inner_steps}"


LEARNERS = {
    str(case): case
    for case in (
        LearnerCase(algorithm, META["omniglot-t8-k1"], steps)
        for algorithm, steps in (("fomaml", 5), ("reptile", 5), ("maml++", 5), ("imaml", 5))
    )
}


@dataclass(frozen=True)
class PolicyCase:
    """W8: the recorded batch of a MAML-TRPO iteration (tasks x rollouts x horizon), a tanh MLP with its own weights per task."""

    name: str
    tasks: int
    rollouts: int
    horizon: int
    observation: int = 17
    action: int = 6
    hidden: tuple[int, ...] = (64, 64)
    inner_lr: float = 0.1
    products: int = 10  # of the Fisher matrix, for conjugate gradients
    candidates: int = 5  # steps that the line search tries

    def __str__(self) -> str:
        return self.name

    @property
    def samples(self) -> int:
        """Samples per task in each of the two sampling phases."""
        return self.rollouts * self.horizon


POLICY = {
    case.name: case
    for case in (PolicyCase("policy-40x20x100", 40, 20, 100), PolicyCase("policy-10x10x100", 10, 10, 100))
}

WORKLOADS = {
    **{w: tuple(name for name, case in META.items() if case.workload == w) for w in ("W1", "W2", "W3", "W4")},
    "W5": tuple(HVP),
    "W6": tuple(f"{name}-k{steps}" for name in MEMORY for steps in MEMORY_STEPS),
    "W7": tuple(LEARNERS),
    "W8": tuple(POLICY),
}
