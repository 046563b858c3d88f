"""fastmaml plan DATASET|FILE.py:FUNCTION: time and memory of a run before it runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from fastmaml.algorithms.names import ALGORITHMS
from fastmaml.benchmark.text import share, table
from fastmaml.cli.text import duration
from fastmaml.compiled import introspection
from fastmaml.machine import machine
from fastmaml.prediction import calibration, request
from fastmaml.prediction.predict import Prediction, predict
from fastmaml.training import checkpoint
from fastmaml.training.presets import PRESETS

WHAT = """\
Predicts one outer step without running it: its time by phase and its peak memory by part. Also predicts the memory mode:
"stash" keeps the activations of the inner steps for the adjoint sweep, "low" recomputes them. Sizes may be far beyond
this machine.

Time: the engine's plan lists every operation. Each gets this machine's rate at that size, interpolated between small
networks. They are measured once, in some seconds, and kept in the cache folder for this machine and build. Other
programs and the sampling of tasks are not included. Memory: the engine's own plan, and counted shapes.

With FILE.py:FUNCTION the function returns a model and a batch as for `fastmaml bench --model`.
"""


def add_parser(subparsers: Any) -> None:
    """Add this command to the parser."""
    parser = subparsers.add_parser(
        "plan",
        help="predict time and memory of a run",
        description=WHAT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="DATASET|FILE.py:FUNCTION", help=f"{', '.join(PRESETS)}, or your own model")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="maml", metavar="NAME", help=", ".join(ALGORITHMS))
    parser.add_argument("--tasks", type=int, metavar="T", help="tasks in an outer step")
    parser.add_argument("--ways", type=int, metavar="N", help="classes in a task")
    parser.add_argument(
        "--shots", type=int, metavar="N", help="support examples per class (regression, file: per task)"
    )
    parser.add_argument(
        "--query-shots", type=int, metavar="N", help="query examples per class (regression, file: per task)"
    )
    parser.add_argument("--inner-steps", type=int, metavar="K", help="gradient steps on the support set")
    parser.add_argument("--filters", type=int, metavar="N", help="filters of each convolution of a data set's network")
    parser.add_argument(
        "--memory", default="auto", choices=("auto", "low", "stash"), help="memory mode of the engine (default auto)"
    )
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "float64"), help="type of all numbers (default float32)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads (default: torch's own choice)")
    parser.add_argument("--steps", type=int, metavar="N", help="outer steps of a run, to predict its whole time")
    parser.add_argument("--calibrate", action="store_true", help="measure this machine again")
    parser.add_argument("--seed", type=int, default=0, help="seed of the network (changes no prediction)")
    parser.add_argument("--out", metavar="FILE", help="also write the prediction as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Predict, print and write."""
    threads = torch.get_num_threads() if args.threads is None else args.threads
    for name, value in (("threads", threads), ("steps", args.steps)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
    asked = _request(args)
    seen: set[int] = set()

    def machine_of(workers: int) -> calibration.Machine:
        again = args.calibrate and workers not in seen
        seen.add(workers)
        return calibration.calibrated(workers, again)

    found = predict(asked.learner, asked.batch, threads, machine_of)
    print(f"{asked.title}; {args.dtype}, {threads} threads\n{machine()}\n")
    print(show(found, args.steps))
    if args.out is not None:
        facts = {"what": asked.title, "dtype": args.dtype, "threads": threads, "machine": machine()}
        checkpoint.write_durably(Path(args.out), (json.dumps(facts | found.to_json(), indent=1) + "\n").encode())
    return 0


def _request(args: argparse.Namespace) -> request.Request:
    sizes = request.Sizes(args.tasks, args.ways, args.shots, args.query_shots, args.inner_steps)
    double = args.dtype == "float64"
    if request.is_dataset(args.target):
        return request.of_dataset(args.target, args.algorithm, sizes, args.memory, double, args.filters, args.seed)
    if ":" not in args.target:
        raise ValueError(f"'{args.target}' is neither a data set ({', '.join(PRESETS)}) nor FILE.py:FUNCTION")
    if args.filters is not None:
        raise ValueError(f"--filters {args.filters}: {args.target} brings its own network")
    return request.of_file(args.target, args.algorithm, sizes, args.memory, double, args.seed)


def show(found: Prediction, steps: int | None = None) -> str:
    """The prediction as text."""
    lines = [
        f"time    {milliseconds(found.meta_gradient_s)} a meta-gradient, {milliseconds(found.step_s)} an outer step, "
        f"{found.tasks_per_s:,.4g} tasks a second"
    ]
    if steps is not None:
        lines[0] += f"; {duration(found.step_s * steps)} for {steps:,} steps"
    by_phase = [[name, milliseconds(s), share(s / found.step_s)] for name, s in found.phases.items()]
    lines += [table(["phase", "time", "share"], by_phase), ""]
    lines.append(f"memory  {mib(found.peak_bytes)} at the peak, on top of Python and torch themselves")
    by_part = [[name, mib(b), share(b / found.peak_bytes)] for name, b in found.parts.items()]
    lines += [table(["part", "size", "share"], by_part), ""]
    lines.append(f"sweep   {found.chosen + ', for ' if found.chosen else ''}{found.why}")
    if found.modes:
        of_modes = [[m.name, milliseconds(m.seconds), mib(m.arena_bytes)] for m in found.modes]
        lines.append(table(["mode", "walk", "a worker's arena"], of_modes))
    lines += notes(found)
    return "\n".join(lines)


def notes(found: Prediction) -> list[str]:
    """Sentences below the figures: the memory mode, and limits of the prediction."""
    said = []
    if found.peak_bytes > introspection.memory_of_machine():
        said.append(f"does not fit: this machine has {mib(introspection.memory_of_machine())}")
    if found.unknown:
        said.append(f"never measured here, so guessed from other operations: {', '.join(found.unknown)}")
    return ["", *said] if said else []


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g} ms" if seconds < 10 else duration(seconds)


def mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count < 2**33 else f"{count / 2**30:,.1f} GiB"
