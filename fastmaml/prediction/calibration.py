"""Measures this machine for `fastmaml plan`: profiles small networks of many sizes, once per build and machine.

machine = calibrated(threads)           from the cache folder, or measured in some seconds
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastmaml.benchmark.timing import threads
from fastmaml.compiled import introspection
from fastmaml.machine import machine
from fastmaml.prediction import calibration_networks, call_overhead, step_times
from fastmaml.prediction.calibration_networks import SAMPLES, Sample
from fastmaml.prediction.step_times import Rates, features, key, yardstick
from fastmaml.tasks.cache import cache_folder
from fastmaml.training.checkpoint import write_durably

logger = logging.getLogger("fastmaml")

LEAST_REPEATS, MOST_REPEATS, REPEAT_S = 3, 8, 0.15  # of each network


class Machine(NamedTuple):
    """The measured times of this machine, for `workers` threads at once."""

    workers: int
    steps: Rates
    costs: call_overhead.Costs


def calibrated(workers: int, again: bool = False) -> Machine:
    """The measurements of this machine for this build and number of workers, from the cache or measured now."""
    path = cache_folder() / "rates" / f"{_identity(workers)}.json"
    if path.is_file() and not again:
        try:
            kept = json.loads(path.read_text())
            return Machine(workers, Rates.from_json(kept["steps"]), call_overhead.Costs(**kept["costs"]))
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s); the machine is measured again", path, error)
    found = measure(workers)
    kept = {"machine": machine(), "workers": workers, "costs": found.costs._asdict(), "steps": found.steps.to_json()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(kept).encode())
    except OSError as error:
        logger.warning("%s cannot be written (%s); the machine is measured again the next time", path, error)
    return found


def _identity(workers: int) -> str:
    """A hash of everything that the times depend on: machine, compiled module, torch and workers."""
    of = hashlib.sha256(Path(introspection.file()).read_bytes())
    for file in (__file__, call_overhead.__file__, step_times.__file__, calibration_networks.__file__):
        of.update(Path(str(file)).read_bytes())  # the code that measures and stores
    of.update(f"{machine()} {torch.__version__} {introspection.instruction_set()} {workers}".encode())
    return of.hexdigest()[:24]


def measure(workers: int) -> Machine:
    """Measures this machine. Takes some seconds."""
    with threads(1):
        costs = call_overhead.measure()
    with threads(workers):
        return Machine(workers, _Runs(workers).rates(), costs)


class _Runs:
    """Runs all samples, each on all workers at once."""

    def __init__(self, workers: int):
        self.workers = workers
        self.steps: dict[tuple[str, tuple[float, ...]], float] = {}  # seconds over the yardstick, by key and features
        for sample in SAMPLES:
            for memory in ("stash", "low"):
                self._meta_gradient(sample, memory)
            for examples in sample.products:
                self._products(sample, examples)

    def rates(self) -> Rates:
        return Rates((name, list(at), ratio) for (name, at), ratio in self.steps.items())

    def _meta_gradient(self, sample: Sample, memory: str) -> None:
        learner = sample.make(memory)
        batch = sample.batch(self.workers * sample.tasks, learner.engine)
        self._learn(lambda: learner(*batch))

    def _products(self, sample: Sample, examples: int) -> None:
        """A Hessian-vector product and conjugate gradients, which use their own vector ops."""
        engine = sample.make("low").engine
        x, y = sample.examples(self.workers * sample.tasks, examples, engine)
        theta = engine.flatten()
        v = theta.expand(len(x), -1)
        self._learn(lambda: engine.hvp(theta, x, y, v))
        self._learn(lambda: engine.solve(theta, x, y, v, 2.0, 2, 1.0))

    def _learn(self, run: Callable[[], Any]) -> None:
        """Takes the fastest of repeated runs of one plan. A Step's own fastest call would be faster than in any whole run."""
        run()
        plans = []
        for _ in repeats():
            introspection.start_profile()
            run()
            (plan,) = introspection.stop_profile()
            plans.append(plan)
        plan = min(plans, key=lambda plan: sum(step["seconds"] for step in plan["steps"]))
        for step in plan["steps"]:
            at = key(step, plan["lanes"]), tuple(features(step))
            ratio = max(step["seconds"] / step["calls"], 1e-9) / yardstick(step, plan["lanes"])
            self.steps[at] = min(ratio, self.steps.get(at, ratio))


def repeats() -> Iterator[None]:
    """Repeats until enough processor time has passed, which other programs do not affect."""
    until = time.process_time() + REPEAT_S
    for done in range(MOST_REPEATS):
        if done < LEAST_REPEATS or time.process_time() < until:
            yield
