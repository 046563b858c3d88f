"""W7: one step of FOMAML, Reptile, MAML++ and iMAML on W3's tasks, against a loop in plain torch.

The loop in float64 is the exact answer. Both are compared with it before timing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastmaml as fm
from bench.cases import LEARNERS, LearnerCase
from bench.conjugate_gradients import conjugate_gradients
from bench.measure import RESULTS, known, open_results
from fastmaml.benchmark.exact import disagreement, distance, flat, mean_loss, network
from fastmaml.benchmark.problem import Problem, problem
from fastmaml.benchmark.text import number, share, table
from fastmaml.benchmark.timing import interleaved, sgemm

Step = Callable[[], Tensor]  # the gradient of the network's parameters [P]
SOLVED = 1e-6  # conjugate gradients amplify rounding by the system's condition number
LOOP = "torch_loop"


def learner_step(case: LearnerCase, of: Problem, backend: str = "cpu") -> Step:
    """fastmaml's learner, as its users call it."""
    of = of.own()
    rate, steps, loss = case.on.inner_lr, case.inner_steps, of.case.loss
    if case.algorithm == "fomaml":
        learner: Any = fm.FOMAML(of.model, rate, steps, loss=loss, backend=backend)
    elif case.algorithm == "reptile":
        learner = fm.Reptile(of.model, inner_lr=rate, inner_steps=steps, minibatch=None, loss=loss, backend=backend)
    elif case.algorithm == "maml++":
        learner = fm.MAMLPlusPlus(
            of.model, rate, steps, loss=loss, learn_rates=False, per_step_norm=False, adapt_norm=True, backend=backend
        )
    else:
        learner = fm.IMAML(
            of.model, rate, steps, loss=loss, lam=case.lam, cg_steps=case.cg_steps, cg_stop=0.0, backend=backend
        )

    def call() -> Tensor:
        learner.zero_grad(set_to_none=True)
        learner(*of.batch).loss.backward()
        return torch.cat([p.grad.reshape(-1) for p in of.model.parameters()])

    return call


def loop_step(case: LearnerCase, of: Problem) -> Step:
    """The learner's step in plain torch, one task at a time."""
    apply, loss, rate = network(of.model, written_norms=False), mean_loss(of.case.loss), case.on.inner_lr
    theta = flat(of.model)

    def inner(at: Tensor, x: Tensor, y: Tensor, create_graph: bool, proximal: float = 0.0) -> list[Tensor]:
        phi = [at]
        for _ in range(case.inner_steps):
            here = phi[-1] if create_graph else phi[-1].detach().requires_grad_()
            (g,) = torch.autograd.grad(loss(apply(here, x), y), here, create_graph=create_graph)
            phi.append(here - rate * (g + proximal * (here - at)))
        return phi

    def fomaml(task: Sequence[Tensor]) -> Tensor:
        last = inner(theta, *task[:2], create_graph=False)[-1].detach().requires_grad_()
        return torch.autograd.grad(loss(apply(last, task[2]), task[3]), last)[0]

    def reptile(task: Sequence[Tensor]) -> Tensor:
        return theta - inner(theta, *task[:2], create_graph=False)[-1].detach()

    def mamlpp(task: Sequence[Tensor]) -> Tensor:
        at = theta.clone().requires_grad_()
        phi = inner(at, *task[:2], create_graph=True)[1:]
        total = sum(loss(apply(p, task[2]), task[3]) for p in phi) / len(phi)  # the first epoch's weights are equal
        return torch.autograd.grad(total, at)[0]

    def imaml(task: Sequence[Tensor]) -> Tensor:
        x, y, query_x, query_y = task
        last = inner(theta, x, y, create_graph=False, proximal=case.lam)[-1].detach().requires_grad_()
        (b,) = torch.autograd.grad(loss(apply(last, query_x), query_y), last)

        def system(v: Tensor) -> Tensor:
            (g,) = torch.autograd.grad(loss(apply(last, x), y), last, create_graph=True)
            return v + torch.autograd.grad(g, last, v)[0] / case.lam

        return conjugate_gradients(system, b, case.cg_steps)

    of_task = {"fomaml": fomaml, "reptile": reptile, "maml++": mamlpp, "imaml": imaml}[case.algorithm]
    return lambda: torch.stack([of_task(task) for task in zip(*of.batch)]).mean(0)


def measure(case: LearnerCase, rounds: int, seed: int, budget: float) -> dict[str, Any]:
    """Checks and times one case. Returns the entry for the result file."""
    single = problem(case.on, seed)
    double = single.double()
    answer = loop_step(case, double)().detach()
    makes: dict[str, Callable[[Problem], Step]] = {
        "fastmaml": lambda of: learner_step(case, of),
        LOOP: lambda of: loop_step(case, of),
    }
    calls, errors, absent = {}, {}, {}
    yardstick = distance(loop_step(case, single)(), answer)
    limit = SOLVED if case.algorithm == "imaml" else 1e-8
    for name, make in makes.items():
        found = distance(make(double)(), answer)
        call = make(single)
        started = time.perf_counter()
        errors[name] = found, distance(call(), answer), time.perf_counter() - started
        complaint = disagreement(*errors[name][:2], yardstick, limit)
        if complaint:
            absent[name] = complaint
        else:
            calls[name] = call
    product, operations = sgemm()
    times = interleaved({**calls, "sgemm": product}, rounds, budget_s=budget)
    ours = times["fastmaml"].median if "fastmaml" in calls else None
    rows = [
        {"name": name, **times[name].to_json(), "error_float64": errors[name][0], "error_float32": errors[name][1],
         "first_call_s": errors[name][2], "tasks_per_s": case.on.tasks / times[name].median,
         "ratio_to_fastmaml": times[name].median / ours if ours else None}
        for name in calls
    ]  # fmt: skip
    return {"case": str(case), "workload": "W7", "network": case.on.network, "tasks": case.on.tasks,
            "inner_steps": case.inner_steps, "sgemm_gflop_per_s": operations / times["sgemm"].median / 1e9,
            "rows": rows, "absent": absent}  # fmt: skip


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
    for name in known(args.cases, LEARNERS):
        if results.done(name):
            print(f"{name}: done before, in {args.out}")
            continue
        entry = measure(LEARNERS[name], args.rounds, args.seed, args.budget)
        results.save(name, entry)
        good &= "fastmaml" not in entry["absent"]
        head = [name, "ms", "+-", "error 64", "error 32", "ratio"]
        print(table(head, [[r["name"], number(r["median_ms"]), share(r["spread"]), f"{r['error_float64']:.0e}",
                            f"{r['error_float32']:.0e}", f"{r['ratio_to_fastmaml'] or 0:.2f}"] for r in entry["rows"]]))  # fmt: skip
        print("".join(f"{who}: not measured, {why}\n" for who, why in entry["absent"].items()), flush=True)
    if all(results.done(name) for name in LEARNERS):
        results.finish()
    return 0 if good else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.learners", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(LEARNERS)}")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each implementation (default 15)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default 2)")
    parser.add_argument("--budget", type=float, default=90.0, metavar="S", help="seconds to time one case (default 90)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and tasks (default 0)")
    parser.add_argument("--again", action="store_true", help="forget the results of an earlier run")
    parser.add_argument("--out", default=str(RESULTS / "learners.json"), help='JSON file; "" writes none')
    return parser


if __name__ == "__main__":
    sys.exit(main())
