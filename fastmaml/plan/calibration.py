"""Measures this machine for the planner: small networks of many sizes run under the profile, once for each build and machine.

machine = calibrated(threads)           from the cache folder, or in some seconds
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fastmaml import inner, models
from fastmaml.algorithms.maml import MAML
from fastmaml.checkpoint import write_durably
from fastmaml.engine import Engine
from fastmaml.experiment import machine
from fastmaml.plan.rates import Rates, features, key, yardstick
from fastmaml.plan.work import EngineCall, engine_calls
from fastmaml.tasks.cache import cache_folder

logger = logging.getLogger("fastmaml")

LEAST_REPEATS, MOST_REPEATS, REPEAT_S = 2, 8, 0.1  # of each network, after one; the fastest call of each Step counts
LANES = 16  # tasks of the smallest networks for each worker, so that groups of tasks side by side are full


class Costs(NamedTuple):
    """What a call takes beside its walk, and an outer step beside its calls."""

    call_s: float  # a call of a learner and its operators
    byte_s: float  # for every byte that is converted, reduced or copied around a walk
    parameter_s: float  # of the outer optimizer (Adam), for each number
    tensor_s: float  # for each parameter tensor


class Machine(NamedTuple):
    """This machine as the planner knows it, with `workers` of its threads at work at once."""

    workers: int
    rates: Rates
    costs: Costs


@dataclass(frozen=True)
class _Sample:
    """A small network with its sizes, far from any benchmark's own but around them."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int  # 0: mean squared error on one output as wide as the network's
    support: int
    query: int
    small: bool = False  # many tasks
    learner: Callable[[nn.Module], dict[str, Any]] = lambda model: {}


def _functions() -> nn.Module:
    layers: list[nn.Module] = []
    for function in (nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.LeakyReLU):
        layers += [nn.Linear(48, 48), function()]
    return nn.Sequential(*layers, nn.Linear(48, 6))


_SAMPLES = (
    _Sample(lambda: models.mlp([1, 32, 32, 1]), (1,), 0, 8, 12, small=True),
    _Sample(lambda: models.mlp([2, 56, 56, 2]), (2,), 0, 12, 8, small=True),
    _Sample(_functions, (48,), 6, 6, 20, learner=lambda model: {"inner": inner.SGD(0.01, momentum=0.9)}),
    _Sample(lambda: models.mlp([40, 96, 96, 10]), (40,), 10, 24, 40, learner=lambda model: {"inner": inner.Adam(0.01)}),
    _Sample(lambda: models.mlp([600, 300, 150, 75, 10]), (600,), 10, 10, 60),
    _Sample(lambda: models.mlp([1000, 360, 90, 6]), (1000,), 6, 6, 90),
    _Sample(lambda: models.mlp([24, 24, 24, 24]), (24,), 0, 40, 24),
    _Sample(lambda: models.mlp([160, 160, 160, 160]), (160,), 0, 40, 12),
    _Sample(lambda: models.mlp([640, 640, 640, 640]), (640,), 0, 40, 6),
    _Sample(lambda: models.conv4(filters=64, image_size=24), (1, 24, 24), 5, 5, 30),
    _Sample(lambda: models.conv4(3, filters=32, image_size=64), (3, 64, 64), 5, 5, 25),
    _Sample(lambda: models.conv4(3, filters=32, image_size=96), (3, 96, 96), 5, 8, 3),
    _Sample(lambda: models.conv4(filters=64, image_size=32, pooling="stride"), (1, 32, 32), 5, 5, 40),
    _Sample(lambda: models.conv4(filters=16, image_size=16, norm="group"), (1, 16, 16), 4, 4, 12),
)


def calibrated(workers: int, again: bool = False) -> Machine:
    """What was measured of this machine with this build and so many workers, or is now."""
    path = cache_folder() / "rates" / f"{_identity(workers)}.json"
    if path.is_file() and not again:
        try:
            kept = json.loads(path.read_text())
            return Machine(workers, Rates.from_json(kept["rates"]), Costs(**kept["costs"]))
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s); the machine is measured again", path, error)
    found = measure(workers)
    kept = {"machine": machine(), "workers": workers, "costs": found.costs._asdict(), "rates": found.rates.to_json()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(kept).encode())
    except OSError as error:
        logger.warning("%s cannot be written (%s); the machine is measured again the next time", path, error)
    return found


def _identity(workers: int) -> str:
    """Of all that the measured times depend on: the machine, the compiled module, torch and the workers."""
    from fastmaml import _C

    of = hashlib.sha256(Path(_C.__file__).read_bytes())
    of.update(f"{machine()} {torch.__version__} {_C.cpu_isa()} {workers}".encode())
    return of.hexdigest()[:24]


def measure(workers: int) -> Machine:
    """Takes some seconds."""
    with _threads(workers):
        runs = _Runs(workers)
        return Machine(workers, runs.rates(), runs.costs())


class _Runs:
    """All samples, on as many workers at once."""

    def __init__(self, workers: int):
        self.workers = workers
        self.steps: dict[tuple[str, tuple[float, ...]], float] = {}  # seconds over the yardstick, by key and features
        self.walks: list[
            tuple[float, float]
        ] = []  # fastest walk, the sum of its Steps' fastest calls on the slowest worker
        self.outside: list[tuple[float, float]] = []  # fastest call less its walks, bytes that it converts
        self.optimizer: list[tuple[float, int, int]] = []  # fastest outer update, numbers, tensors
        for sample in _SAMPLES:
            for memory in ("stash", "low"):
                self._run(sample, memory)

    def rates(self) -> Rates:
        scale = float(np.median([walk / steps for walk, steps in self.walks]))
        measured = ((name, list(at), ratio) for (name, at), ratio in self.steps.items())
        return Rates(measured, min(max(scale, 1.0), 1.5))

    def costs(self) -> Costs:
        call, byte = _fit([[1.0, moved] for _, moved in self.outside], [seconds for seconds, _ in self.outside])
        tensor, number = _fit([[t, n] for _, n, t in self.optimizer], [seconds for seconds, _, _ in self.optimizer])
        return Costs(call, byte, number, tensor)

    def _run(self, sample: _Sample, memory: str) -> None:
        from fastmaml import _C

        tasks = self.workers * (LANES if sample.small else 1)
        loss = "cross_entropy" if sample.classes else "mse"
        model = sample.model()
        given = sample.learner(model) or {"inner_lr": 0.01}
        learner = MAML(model, inner_steps=1, loss=loss, backend="cpu", memory=memory, **given)
        batch = _random_batch(sample, tasks, learner.engine)
        optimizer = learner.outer_optimizer(1e-4)
        (call,) = engine_calls(lambda: learner(*batch))
        plans: list[dict[str, Any]] = []
        outside, updates = [], []
        learner(*batch).loss.backward()
        optimizer.step()
        for _ in _repeats():
            _C.profile_start()
            start = time.perf_counter()
            learner.zero_grad()
            learner(*batch).loss.backward()
            end = time.perf_counter()
            optimizer.step()
            updates.append(time.perf_counter() - end)
            plans += _C.profile_stop()
            outside.append(end - start - plans[-1]["wall_seconds"])
        self._learn(plans)
        self.outside.append((min(outside), float(moved_bytes(call))))
        parameters = list(learner.parameters())
        self.optimizer.append((min(updates), sum(p.numel() for p in parameters), len(parameters)))
        if not sample.small and memory == "low" and len(sample.shape) == 1 and loss == "mse":
            self._products(learner.engine, batch)

    def _products(self, engine: Engine, batch: Any) -> None:
        """A Hessian-vector product and conjugate gradients, whose vectors have ops of their own."""
        from fastmaml import _C

        theta = engine.flatten()
        v = theta.expand(len(batch[0]), -1)
        for run in (lambda: engine.hvp(theta, *batch[:2], v), lambda: engine.solve(theta, *batch[:2], v, 2.0, 2, 1.0)):
            plans = []
            for _ in _repeats():
                _C.profile_start()
                run()
                plans += _C.profile_stop()
            self._learn(plans)

    def _learn(self, plans: list[dict[str, Any]]) -> None:
        """Of the same plan, run some times."""
        lanes, first = plans[0]["lanes"], plans[0]
        total = 0.0
        for steps in zip(*(plan["steps"] for plan in plans)):
            seconds = min(step["least_seconds"] for step in steps)
            total += seconds
            at = key(steps[0], lanes), tuple(features(steps[0]))
            ratio = max(seconds, 1e-9) / yardstick(steps[0], lanes)
            self.steps[at] = min(ratio, self.steps.get(at, ratio))
        groups = -(-(first["tasks"] // first["walks"]) // lanes)
        rounds = -(-groups // self.workers)
        self.walks.append((min(plan["wall_seconds"] for plan in plans), total * rounds))


def _repeats() -> Iterator[None]:
    until = time.perf_counter() + REPEAT_S
    for done in range(MOST_REPEATS):
        if done < LEAST_REPEATS or time.perf_counter() < until:
            yield


def moved_bytes(call: EngineCall) -> int:
    """Bytes around the walk: images to the engine's order, gradients of all tasks summed, results handed over."""
    images = sum(_size(shape) for _, shape in call.inputs if len(shape) == 5 and shape[2] > 1)
    results = sum(_size(shape) for shape in call.results)
    per_task = call.tasks * call.parameters if call.kind in ("meta_gradient", "grad", "hvp", "adapt", "solve") else 0
    return call.real_bytes * (2 * images + results + per_task)


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _fit(rows: list[list[float]], values: list[float]) -> tuple[float, float]:
    """Two numbers, none negative, by least squares of relative errors."""
    a, b = np.array(rows), np.array(values)
    solution = np.linalg.lstsq(a / b[:, None], np.ones(len(b)), rcond=None)[0]
    if min(solution) < 0:  # one of them explains nothing: the other alone
        kept = int(np.argmax(solution))
        solution = np.zeros(2)
        solution[kept] = float(np.median(b / a[:, kept]))
    return float(solution[0]), float(solution[1])


def _random_batch(sample: _Sample, tasks: int, engine: Engine) -> tuple[Any, ...]:
    random = torch.Generator().manual_seed(0)

    def examples(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.rand(tasks, count, *sample.shape, generator=random)
        if sample.classes:
            return x, torch.arange(count).remainder(sample.classes).expand(tasks, count).contiguous()
        return x, engine.forward(engine.flatten(), x) + 0.1

    return (*examples(sample.support), *examples(sample.query))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
