"""W8: the computations of MAML-TRPO on one recorded batch: meta-policy-gradient, 10 Fisher products, line search.

The policy is a Gaussian of unit deviation whose mean is a tanh MLP. Every task has its own adapted weights. The policy
gradient's surrogate is -A log pi. For unit deviation it equals squared error weighted by 3 A / N (6 action dimensions), so
fastmaml's built-in loss is exact. The engine needs nothing else of reinforcement learning. A Fisher product is
(I - aH) G (I - aH) v. H is the Hessian of the support surrogate, G the Hessian of the divergence from the adapted policy.
Batch: recorded sizes, random numbers. The loop in float64 is the exact answer; all implementations are checked first.
"""

from __future__ import annotations

import argparse
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastmaml as fm
from bench.cases import POLICY, PolicyCase
from bench.conjugate_gradients import conjugate_gradients
from bench.measure import RESULTS, known, open_results
from fastmaml.benchmark.exact import disagreement, distance, flat
from fastmaml.benchmark.meta import OURS
from fastmaml.benchmark.problem import forward_flops, random_model
from fastmaml.benchmark.text import number, share, table
from fastmaml.benchmark.timing import interleaved, sgemm

DAMPING = 1e-5
SHRINK = 0.8  # of the line search's steps
PARTS = ("meta-gradient", "fisher products", "line search")
BATCHED, LOOP = "batched autograd", "loop over tasks"


@dataclass(frozen=True)
class Batch:
    """Observations, actions and advantages of both phases, [T, N, ...], and the policy."""

    case: PolicyCase
    model: nn.Module
    support: tuple[Tensor, Tensor, Tensor]
    query: tuple[Tensor, Tensor, Tensor]

    def double(self) -> Batch:
        model = random_model(lambda: make_policy(self.case), 0).double()
        model.load_state_dict({name: value.double() for name, value in self.model.state_dict().items()})
        return Batch(self.case, model, *(tuple(t.double() for t in of) for of in (self.support, self.query)))


def make_policy(case: PolicyCase) -> nn.Module:
    return fm.models.mlp([case.observation, *case.hidden, case.action], activation="tanh")


def recorded(case: PolicyCase, seed: int = 0) -> Batch:
    """The batch of a case. The seed decides all numbers. Actions are the policy's with unit noise; advantages are normalised."""
    random = torch.Generator().manual_seed(seed)
    model = random_model(lambda: make_policy(case), seed)

    def phase() -> tuple[Tensor, Tensor, Tensor]:
        observations = torch.randn(case.tasks, case.samples, case.observation, generator=random)
        noise = torch.randn(case.tasks, case.samples, case.action, generator=random)
        advantages = torch.randn(case.tasks, case.samples, generator=random)
        advantages = (advantages - advantages.mean(1, keepdim=True)) / advantages.std(1, keepdim=True)
        with torch.no_grad():
            return observations, model(observations) + noise, advantages

    return Batch(case, model, phase(), phase())


def gflop(case: PolicyCase) -> dict[str, float]:
    """GFLOP of the matrix products of each part, for all tasks."""
    forward, first = forward_flops(make_policy(case), torch.zeros(1, case.observation))
    gradient, product = 3 * forward - first, 9 * forward - 5 * first
    samples = case.tasks * case.samples / 1e9
    return {
        PARTS[0]: samples * (product + gradient),
        PARTS[1]: samples * case.products * 3 * product,
        PARTS[2]: samples * case.candidates * (gradient + forward),
    }


class Parts(ABC):
    """One implementation: the three parts as calls. `gradient` [P]; `product` [P] of a direction; `judged` [2]."""

    def __init__(self, batch: Batch):
        self.batch, self.case = batch, batch.case
        self.theta = flat(batch.model)
        self.direction = torch.randn(self.theta.shape, generator=torch.Generator().manual_seed(2)).to(self.theta)

    @abstractmethod
    def gradient(self) -> Tensor: ...

    @abstractmethod
    def fisher(self) -> Callable[[Tensor], Tensor]:
        """Prepares the shared work of all products of one outer step. Returns v -> product."""
        ...

    @abstractmethod
    def judged(self, theta: Tensor) -> Tensor:
        """(surrogate, divergence from the policies that sampled the query phase) after adapting from theta."""
        ...

    def solved(self) -> Tensor:
        """[P]: the solution after `products` steps of conjugate gradients on the damped Fisher matrix."""
        product = self.fisher()
        return conjugate_gradients(lambda v: product(v) + DAMPING * v, self.direction, self.case.products)

    def searched(self) -> Tensor:
        """[candidates, 2]: tries every step of the line search, as if only the last were accepted."""
        steps = [0.01 * SHRINK**j * self.direction for j in range(self.case.candidates)]
        return torch.stack([self.judged(self.theta - step) for step in steps])


class Fastmaml(Parts):
    def __init__(self, batch: Batch, backend: str = "cpu"):
        super().__init__(batch)
        self.engine = fm.Engine(batch.model, "mse", backend)
        half = 0.5 * self.case.action / self.case.samples
        (self.x, self.actions, advantages), (self.query_x, self.query_actions, query_advantages) = (
            batch.support,
            batch.query,
        )
        self.weights, self.query_weights = half * advantages, half * query_advantages
        self.even = torch.full_like(self.weights, half)
        self.adapted = self.moved(self.theta)
        self.means = self.engine.forward(self.adapted, self.query_x)

    def moved(self, theta: Tensor) -> Tensor:
        return self.engine.adapt(theta, self.x, self.actions, self.case.inner_lr, 1, self.weights)

    def gradient(self) -> Tensor:
        batch = (self.x, self.actions, self.query_x, self.query_actions)
        return self.engine.meta_gradient(
            self.theta, batch, self.case.inner_lr, 1, support_weights=self.weights, query_weights=self.query_weights,
            inner_lr_grad=False,
        ).grad  # fmt: skip

    def fisher(self) -> Callable[[Tensor], Tensor]:
        step = self.engine.curvature(self.theta, self.x, self.actions, self.weights)
        divergence = self.engine.curvature(self.adapted, self.query_x, self.means, self.even, gauss_newton=True)

        def through_step(v: Tensor) -> Tensor:
            return v - self.case.inner_lr * step.product(v)

        def product(v: Tensor) -> Tensor:
            u = through_step(v.expand(self.case.tasks, -1))
            return through_step(divergence.product(u)).mean(0)

        return product

    def judged(self, theta: Tensor) -> Tensor:
        means = self.engine.forward(self.moved(theta), self.query_x)
        return judgement(means, self.means, *self.batch.query[1:])


def judgement(means: Tensor, before: Tensor, actions: Tensor, advantages: Tensor) -> Tensor:
    """(surrogate with likelihood ratios, KL divergence), averaged over samples and tasks."""
    apart = 0.5 * ((actions - before).square() - (actions - means).square()).sum(-1)
    return torch.stack([-(apart.exp() * advantages).mean(), 0.5 * (means - before).square().sum(-1).mean()])


class Batched(Parts):
    """All tasks at once: layers as batched products, derivatives by autograd through the inner step.

    The graph of the divergence's gradient is built once for all products of an outer step.
    """

    def __init__(self, batch: Batch):
        super().__init__(batch)
        self.shapes = [p.shape for p in batch.model.parameters()]
        self.sizes = [p.numel() for p in batch.model.parameters()]
        with torch.no_grad():
            self.means = self.network(self.moved(self.theta, False), batch.query[0])

    def network(self, params: Tensor, x: Tensor) -> Tensor:
        """params [T, P], x [T, N, D]."""
        pieces = params.split(self.sizes, dim=1)
        for i in range(0, len(pieces), 2):
            weight = pieces[i].view(-1, *self.shapes[i]).transpose(1, 2)
            x = torch.baddbmm(pieces[i + 1][:, None], x, weight)
            x = x if i + 2 == len(pieces) else x.tanh()
        return x

    def surrogate(self, params: Tensor, x: Tensor, actions: Tensor, advantages: Tensor) -> Tensor:
        """[T]."""
        return (0.5 * (actions - self.network(params, x)).square().sum(-1) * advantages).mean(1)

    def moved(self, theta: Tensor, create_graph: bool) -> Tensor:
        with torch.enable_grad():
            start = theta.expand(self.case.tasks, -1)
            start = start if create_graph else start.detach().requires_grad_()
            loss = self.surrogate(start, *self.batch.support).sum()
            (g,) = torch.autograd.grad(loss, start, create_graph=create_graph)
            return start - self.case.inner_lr * g

    def gradient(self) -> Tensor:
        theta = self.theta.clone().requires_grad_()
        loss = self.surrogate(self.moved(theta, True), *self.batch.query).mean()
        return torch.autograd.grad(loss, theta)[0]

    def fisher(self) -> Callable[[Tensor], Tensor]:
        theta = self.theta.clone().requires_grad_()
        means = self.network(self.moved(theta, True), self.batch.query[0])
        divergence = 0.5 * (means - self.means).square().sum(-1).mean()
        (g,) = torch.autograd.grad(divergence, theta, create_graph=True)
        return lambda v: torch.autograd.grad(g, theta, v, retain_graph=True)[0]

    def judged(self, theta: Tensor) -> Tensor:
        with torch.no_grad():
            means = self.network(self.moved(theta, False).detach(), self.batch.query[0])
            return judgement(means, self.means, *self.batch.query[1:])


class Loop(Parts):
    """One task at a time, like the published implementations."""

    def __init__(self, batch: Batch):
        super().__init__(batch)
        self.tasks = []
        for t in range(self.case.tasks):
            support, query = (tuple(value[t : t + 1] for value in of) for of in (batch.support, batch.query))
            self.tasks.append(Batched(Batch(_one_task(self.case), batch.model, support, query)))

    def gradient(self) -> Tensor:
        return torch.stack([task.gradient() for task in self.tasks]).mean(0)

    def fisher(self) -> Callable[[Tensor], Tensor]:
        products = [task.fisher() for task in self.tasks]
        return lambda v: torch.stack([product(v) for product in products]).mean(0)

    def judged(self, theta: Tensor) -> Tensor:
        return torch.stack([task.judged(theta) for task in self.tasks]).mean(0)


def _one_task(case: PolicyCase) -> PolicyCase:
    return PolicyCase(
        case.name, 1, case.rollouts, case.horizon, case.observation, case.action, case.hidden, case.inner_lr,
        case.products, case.candidates,
    )  # fmt: skip


IMPLEMENTATIONS: dict[str, Callable[[Batch], Parts]] = {OURS: Fastmaml, BATCHED: Batched, LOOP: Loop}


def measure(case: PolicyCase, rounds: int, seed: int, budget: float) -> dict[str, Any]:
    """Checks and times every part. Returns the entry for the result file."""
    batch = recorded(case, seed)
    double = batch.double()

    def answers(of: Parts) -> list[Tensor]:
        return [of.gradient(), of.fisher()(of.direction), of.searched()]

    wanted = [a.detach() for a in answers(Loop(double))]
    yardstick = [distance(a, w) for a, w in zip(answers(Loop(batch)), wanted)]
    calls: dict[str, Callable[[], Any]] = {}
    errors: dict[str, tuple[float, float]] = {}
    absent: dict[str, str] = {}
    for name, make in IMPLEMENTATIONS.items():
        parts = make(batch)
        found = max(distance(a, w) for a, w in zip(answers(make(double)), wanted))
        found32 = max(distance(a, w) for a, w in zip(answers(parts), wanted))
        complaint = disagreement(found, found32, max(yardstick))
        if complaint:
            absent[name] = complaint
            continue
        errors[name] = found, found32
        for part, call in zip(PARTS, (parts.gradient, parts.solved, parts.searched)):
            calls[f"{name}|{part}"] = call
    product, operations = sgemm()
    times = interleaved({**calls, "sgemm": product}, rounds, budget_s=budget)
    work = gflop(case)
    rows = []
    for name, (error64, error32) in errors.items():
        of_parts = {part: times[f"{name}|{part}"] for part in PARTS}
        total = sum(t.median for t in of_parts.values())
        rows.append({
            "name": name, "total_ms": 1e3 * total, "gflop_per_s": sum(work.values()) / total,
            "parts": {part: t.to_json() for part, t in of_parts.items()},
            "error_float64": error64, "error_float32": error32,
        })  # fmt: skip
    ours = next((row["total_ms"] for row in rows if row["name"] == OURS), None)
    for row in rows:
        row["ratio_to_fastmaml"] = row["total_ms"] / ours if ours else None
    sizes = {"tasks": case.tasks, "samples": case.samples, "products": case.products, "candidates": case.candidates}
    return {"case": case.name, "workload": "W8", **sizes, "gflop": work,
            "sgemm_gflop_per_s": operations / times["sgemm"].median / 1e9, "rows": rows, "absent": absent}  # fmt: skip


def show(entry: dict[str, Any]) -> str:
    """The table of one case as aligned text."""
    work = ", ".join(f"{part} {count:.1f}" for part, count in entry["gflop"].items())
    head = [
        entry["case"],
        *(f"{part}, ms" for part in PARTS),
        "all, ms",
        "GFLOP/s",
        "of sgemm",
        "error 64",
        "error 32",
        "ratio",
    ]
    rows = [
        [r["name"], *(number(r["parts"][part]["median_ms"]) for part in PARTS), number(r["total_ms"]),
         f"{r['gflop_per_s']:.1f}", share(r["gflop_per_s"] / entry["sgemm_gflop_per_s"]), f"{r['error_float64']:.0e}",
         f"{r['error_float32']:.0e}", f"{r['ratio_to_fastmaml'] or 0:.2f}"]
        for r in entry["rows"]
    ]  # fmt: skip
    notes = [f"{name}: not measured, {why}" for name, why in entry["absent"].items()]
    return "\n".join([f"GFLOP: {work}", table(head, rows), *notes])


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print, write. Returns 1 if fastmaml disagrees somewhere, 2 for a file of another run."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    settings = {"rounds": args.rounds, "seed": args.seed, "budget": args.budget}
    try:
        results = open_results(args.out, __doc__ or "", settings, args.again, __file__)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    good = True
    for name in known(args.cases, POLICY):
        if results.done(name):
            print(f"{name}: done before, in {args.out}")
            continue
        entry = measure(POLICY[name], args.rounds, args.seed, args.budget)
        results.save(name, entry)
        good &= OURS not in entry["absent"]
        print(show(entry) + "\n", flush=True)
    if all(results.done(name) for name in POLICY):
        results.finish()
    return 0 if good else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.policy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(POLICY)}")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each part (default 7)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default 2)")
    parser.add_argument(
        "--budget", type=float, default=300.0, metavar="S", help="seconds to time one case (default 300)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batch (default 0)")
    parser.add_argument("--again", action="store_true", help="forget the results of an earlier run")
    parser.add_argument("--out", default=str(RESULTS / "policy.json"), help='JSON file; "" writes none')
    return parser


if __name__ == "__main__":
    sys.exit(main())
