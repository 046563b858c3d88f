"""fastmaml bench hvp|meta|memory: speed and memory against plain torch, on built-in cases or on your own model."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from fastmaml.benchmark import ceilings, hvp, memory, meta, own_model, peak, profile
from fastmaml.benchmark.cases import HVP, MEMORY, META
from fastmaml.benchmark.peers import fastmaml_maml
from fastmaml.benchmark.problem import Problem, problem
from fastmaml.benchmark.results import Results, facts
from fastmaml.benchmark.text import progress
from fastmaml.benchmark.timing import device_seconds
from fastmaml.cli.text import command
from fastmaml.compiled.loading import load_cuda
from fastmaml.engine.backend import BACKENDS
from fastmaml.engine.engine import Engine

DEFAULT_CASES = {
    "hvp": ("mlp32-t16-n32", "mlp128-t16-n32", "mlp512-t16-n32"),
    "meta": ("sinusoid-k1", "sinusoid-k5", "mlp-k1", "omniglot-t8-k1"),
    "memory": ("omniglot-t4",),
}
CASES: dict[str, dict[str, Any]] = {"hvp": HVP, "meta": META, "memory": MEMORY}
PEERS: dict[str, dict[str, Any]] = {"hvp": hvp.PEERS, "meta": meta.PEERS, "memory": meta.PEERS}
MEMORY_STEPS = (1, 5, 20)
SHOWN_ROWS = 30  # of a profile; all others are summed into one row

WHAT = """\
Every implementation gets the same weights and tasks. Its result is first compared with unrolled autograd in float64.
An implementation that disagrees is listed with its error and is not timed. The others are timed in turn, round by round.
A sample is repeated if other processes used more than a tenth of the machine.

  hvp      Hessian-vector products, every task with its own weights
  meta     one exact meta-gradient of all tasks
  memory   peak memory and time of a meta-gradient for several numbers of inner steps, each in its own process

Columns:
  ms         median of the rounds, +- half the distance between the quartiles
  GFLOP/s    the matrix products of an exact computation, each counted once
  of sgemm   GFLOP/s as a share of a 1,024 cubed float32 product, timed in the same rounds
  others     share of the machine that other processes used
  ratio      how many times faster fastmaml is

fastmaml's memory is "stash" (activations are kept for the adjoint sweep) or "low" (activations are recomputed).
"""


def add_parser(subparsers: Any) -> None:
    """Add this command to the parser."""
    parser = subparsers.add_parser(
        "bench",
        help="measure speed and memory against plain torch",
        description=WHAT + "\nWith --model, " + own_model.IN_SHORT,
        epilog="Exit code 0: measured. 1: fastmaml could not be measured, and a sentence says why. 2: usage. 130: stopped by "
        "Ctrl-C; --out holds the results so far.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=list(RUNS), metavar="hvp|meta|memory", help="what to measure")
    parser.add_argument(
        "--cases", nargs="+", default=[], metavar="CASE", help="built-in cases; --list shows them (default: a few)"
    )
    parser.add_argument("--list", action="store_true", help="show the built-in cases and the peers, and stop")
    parser.add_argument("--model", metavar="FILE.py:FUNCTION", help="your own model instead of built-in cases")
    parser.add_argument("--backend", default="auto", choices=BACKENDS, metavar="NAME", help=f"{', '.join(BACKENDS)}")
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="device of all implementations (default cpu)"
    )
    parser.add_argument("--memory", default="auto", choices=("auto", "low", "stash"), help="fastmaml's memory mode")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads (default: torch's own choice)")
    parser.add_argument("--tasks", type=int, metavar="T", help="tasks in a batch (default: the case's)")
    parser.add_argument("--inner-steps", type=int, nargs="+", metavar="K",
                        help=f"inner steps; bench memory takes several (default {' '.join(map(str, MEMORY_STEPS))})")  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, default=10, metavar="N", help="samples of each implementation (default 10)"
    )
    parser.add_argument("--budget", type=float, default=60.0, metavar="S",
                        help="seconds to time one case; slow peers get fewer rounds (default 60)")  # fmt: skip
    parser.add_argument(
        "--profile", action="store_true", help="show instead where fastmaml's own time goes, by operation"
    )
    parser.add_argument(
        "--peers", nargs="*", metavar="PEER", help="peers to measure (default: all that need no compilation)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and tasks (default 0)")
    parser.add_argument("--out", metavar="FILE", help="also write the results as JSON, case by case")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print. After Ctrl-C the results so far are still written."""
    if args.list:
        print(f"cases: {', '.join(CASES[args.kind])}\npeers: {', '.join(PEERS[args.kind])}")
        return 0
    _check(args)
    before = torch.get_num_threads()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    done: list[str] = []
    try:
        results = Results(args.out or "", f"fastmaml bench {args.kind}", {}, facts(), again=True)
        runs = run_profile if args.profile else RUNS[args.kind]
        good = runs(args, results, done)
        if args.out:
            results.finish()
        return 0 if good else 1
    except KeyboardInterrupt:
        place = f", in {args.out}" if args.out and done else ""
        print(f"\nstopped; measured so far: {', '.join(done) or 'nothing'}{place}", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(before)


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError, in one sentence, for arguments that do not fit together."""
    if args.model is not None and args.cases:
        raise ValueError(f"--model measures your own model and {args.cases[0]} is a built-in case; give only one")
    for name in args.cases:
        if name not in CASES[args.kind]:
            raise ValueError(
                f"there is no case '{name}' of bench {args.kind}; {command('bench', args.kind, '--list')} shows them"
            )
    for name in args.peers or ():
        if name not in PEERS[args.kind]:
            raise ValueError(f"there is no peer '{name}' of bench {args.kind}; there are {', '.join(PEERS[args.kind])}")
    for name in ("threads", "tasks", "rounds"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
    if any(steps < 0 for steps in args.inner_steps or ()):
        raise ValueError(f"--inner-steps is {min(args.inner_steps)}; it must not be negative")
    if args.kind == "hvp" and args.inner_steps:
        raise ValueError("bench hvp has no inner steps; leave out --inner-steps")
    if args.kind == "meta" and len(args.inner_steps or ()) > 1:
        raise ValueError(f"bench meta takes one value of --inner-steps, not {len(args.inner_steps)}")
    if args.profile and (args.device != "cpu" or args.backend not in ("auto", "cpu", "reference")):
        raise ValueError(f"--profile takes the cpu or reference backend, not {args.backend} on {args.device}")
    if args.profile and args.peers:
        raise ValueError(f"--profile measures only fastmaml; leave out --peers {' '.join(args.peers)}")
    if args.device == "cuda":
        if missing := load_cuda():
            raise ValueError(f"--device cuda: {missing}")
        if not torch.cuda.is_available():
            raise ValueError(f"--device cuda: torch {torch.__version__} sees no CUDA device")


# ---------------------------------------------------------------- the three kinds


def run_meta(args: argparse.Namespace, results: Results, done: list[str]) -> bool:
    steps = None if args.inner_steps is None else args.inner_steps[0]
    good = True
    for name in _names(args):
        given, source = _problem(args, name, steps)
        how = meta.How(
            args.rounds, _backend(args, given), args.memory, args.device, args.budget, _clock(args), peak=_peaks(args)
        )
        say = progress(name)
        result = meta.measure(given, _peers(args), how, None, say, source)
        say("")
        good &= bool(result.rows) and result.rows[0].name == meta.OURS
        results.save(name, meta.to_json(result))
        done.append(name)
        print(meta.show(result) + "\n", flush=True)
    return good


def run_hvp(args: argparse.Namespace, results: Results, done: list[str]) -> bool:
    good = True
    for name in _names(args):
        given = _hvp_problem(args, name)
        backend = _fused(args.backend, args.device, given.model, given.loss)
        how = hvp.How(args.rounds, backend, args.device, args.budget, _clock(args), repeated=args.device == "cpu")
        say = progress(given.name)
        result = hvp.measure(given, _peers(args), how, None, say)
        say("")
        good &= bool(result.rows) and result.rows[0].name == meta.OURS
        results.save(given.name, hvp.to_json(result))
        done.append(given.name)
        print(hvp.show(result) + "\n", flush=True)
    return good


def run_memory(args: argparse.Namespace, results: Results, done: list[str]) -> bool:
    points: list[memory.Point] = []
    for name in _names(args):
        of_case: list[memory.Point] = []
        for steps in args.inner_steps or MEMORY_STEPS:
            given, source = _problem(args, name, steps)
            modes = ("low",) if _backend(args, given) == "autodiff" else memory.MODES
            how = (_peers(args), fastmaml_maml, _backend(args, given), None, progress(name), modes, args.device)
            of_case += memory.measure_steps(steps, of_case, source, *how)
            progress(name)("")
            results.save(f"{name}-k{steps}", {"points": [p.to_json() for p in of_case if p.inner_steps == steps]})
            done.append(f"{name} with K = {steps}")
        print(
            f"{name}, {torch.get_num_threads()} threads: time, and peak memory above the process' memory before the call"
        )
        print(memory.show(of_case) + "\n", flush=True)
        points += of_case
    return all(p.peak is not None for p in points if p.name.startswith(meta.OURS))


def run_profile(args: argparse.Namespace, results: Results, done: list[str]) -> bool:
    """Profiles whole outer steps (meta, and memory for every K) or Hessian products (hvp)."""
    limits = ceilings.measure()
    for name in _names(args):
        for steps in (args.inner_steps or MEMORY_STEPS) if args.kind == "memory" else (args.inner_steps or [None])[:1]:
            if args.kind == "hvp":
                given = _hvp_problem(args, name)
                title, call = given.name, profile.hessian_products(given, args.backend)
            else:
                problem, _ = _problem(args, name, steps)
                title = (
                    problem.case.name if args.kind == "meta" else f"{problem.case.name}, K = {problem.case.inner_steps}"
                )
                call = profile.outer_step(problem, args.backend, args.memory)
            found = profile.measure(call)
            limits = limits.best(ceilings.measure())
            results.save(title, profile.to_json(found, limits))
            done.append(title)
            print(f"{title}: {profile.show(found, limits, SHOWN_ROWS)}\n", flush=True)
    return True


RUNS: dict[str, Callable[[argparse.Namespace, Results, list[str]], bool]] = {
    "hvp": run_hvp,
    "meta": run_meta,
    "memory": run_memory,
}


# ---------------------------------------------------------------- what the arguments say


def _names(args: argparse.Namespace) -> Sequence[str]:
    return [args.model] if args.model is not None else args.cases or DEFAULT_CASES[args.kind]


def _peers(args: argparse.Namespace) -> dict[str, Any]:
    known = PEERS[args.kind]
    return {
        name: peer
        for name, peer in known.items()
        if (name in args.peers if args.peers is not None else "+" not in name)
    }


def _hvp_problem(args: argparse.Namespace, name: str) -> hvp.HvpProblem:
    if args.model is not None:
        return own_model.hvp_problem_of(args.model, args.seed, args.tasks)
    return hvp.problem(HVP[name] if args.tasks is None else replace(HVP[name], tasks=args.tasks), args.seed)


def _problem(args: argparse.Namespace, name: str, steps: int | None) -> tuple[Problem, peak.Source]:
    source = _source(args, name, steps)
    if args.model is not None:
        return own_model.problem_of(**source.arguments), source
    changes = {key: value for key, value in (("tasks", args.tasks), ("inner_steps", steps)) if value is not None}
    return problem(replace(CASES[args.kind][name], **changes), args.seed), source


def _source(args: argparse.Namespace, name: str, steps: int | None) -> peak.Source:
    """How another process builds the same problem."""
    changes = {key: value for key, value in (("tasks", args.tasks), ("inner_steps", steps)) if value is not None}
    if args.model is not None:
        return peak.Source(
            "fastmaml.benchmark.own_model:problem_of", {"target": args.model, "seed": args.seed, **changes}
        )
    return peak.Source("fastmaml.benchmark.peak:built_in", {"case": name, "seed": args.seed, **changes})


def _backend(args: argparse.Namespace, given: Problem) -> str:
    return _fused(args.backend, args.device, given.model, given.case.loss)


def _fused(backend: str, device: str, model: torch.nn.Module, loss: Any) -> str:
    """The backend's name. Raises ValueError if "auto" would fall back to autodiff, which does not measure the engine."""
    if backend != "auto":
        return backend
    wanted = "cuda" if device == "cuda" else "cpu"
    try:
        return Engine(_on(model, device), loss, wanted).backend
    except ValueError as error:
        raise ValueError(f"{error}; use --backend autodiff to measure without fused kernels") from None


def _on(model: torch.nn.Module, device: str) -> torch.nn.Module:
    return model if device == "cpu" else copy.deepcopy(model).to(device)


def _clock(args: argparse.Namespace) -> Any:
    return device_seconds if args.device == "cuda" else None


def _peaks(args: argparse.Namespace) -> bool:
    """Only Linux reports a process' peak memory, and only for the host."""
    return args.device == "cpu" and sys.platform == "linux"
