"""The time of a call outside its walk: Python, conversion of arrays, the outer optimizer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fastmaml.compiled import introspection
from fastmaml.prediction.calibration_networks import LANES, SAMPLES
from fastmaml.prediction.engine_calls import EngineCall, engine_calls
from fastmaml.prediction.memory import images, ordered, size

REPEATS = 5  # of each network; the fastest counts
SUMMED_KINDS = ("meta_gradient",)  # these sum a vector over the parameters for each task
CHECKED = ("v",)  # inputs whose every number is checked to be finite


class Costs(NamedTuple):
    """Seconds outside the walks: of an engine call, of the learner around it, and of the outer optimizer (Adam)."""

    call_s: float
    learner_s: float
    learner_tensor_s: float  # for each parameter tensor
    image_byte_s: float  # per byte of images that are reordered for the engine
    order_byte_s: float  # per byte of parameters, rates and gradients that are reordered
    task_byte_s: float  # per byte of each task's vectors that threads reorder, check or sum
    learner_byte_s: float  # per byte of a learner's parameters, whose gradients are scaled and handed out
    update_number_s: float
    update_tensor_s: float

    def around(self, call: EngineCall, tensors: int, workers: int) -> float:
        """Seconds of one engine call. tensors: number of the learner's parameter tensors; 0: no learner."""
        work = _work(call, tensors)
        work[TASKS] /= workers
        return sum(rate * amount for rate, amount in zip(self, work))

    def update(self, numbers: int, tensors: int) -> float:
        """Seconds of the outer optimizer."""
        return self.update_number_s * numbers + self.update_tensor_s * tensors


TASKS = Costs._fields.index("task_byte_s")


class _Measured(NamedTuple):
    seconds: float
    work: list[float]


def measure() -> Costs:
    """Measures on one thread: processor time minus the time of the Steps. Other programs do not count."""
    around: list[_Measured] = []
    updates: list[_Measured] = []
    for sample in SAMPLES:
        for tasks in sorted({1, sample.tasks, 4 * sample.tasks if sample.tasks < LANES else 1}):
            learner = sample.make("stash")
            batch = sample.batch(tasks, learner.engine)
            around.append(_around(learner, lambda: learner(*batch).loss.backward()))  # noqa: B023
            updates.append(_update(learner))
            if sample.loss == "mse":
                theta = learner.engine.flatten().expand(tasks, -1).contiguous()
                around.append(_around(learner, lambda: learner.engine.hvp(theta, batch[0], batch[1], theta), bare=True))  # noqa: B023
    return Costs(*_fit(around), *_fit(updates))


def _around(learner: Any, run: Callable[[], Any], bare: bool = False) -> _Measured:
    """The time around the walks of `run`. bare: `run` calls the engine without the learner."""
    (call,) = engine_calls(run)
    learner.zero_grad()
    fastest = math.inf
    for _ in range(REPEATS):
        introspection.start_profile()
        start = time.thread_time()
        run()
        took = time.thread_time() - start
        steps = sum(step["seconds"] for plan in introspection.stop_profile() for step in plan["steps"])
        fastest = min(fastest, took - steps)
        learner.zero_grad()
    return _Measured(max(fastest, 1e-6), _work(call, 0 if bare else len(list(learner.parameters()))))


def _update(learner: Any) -> _Measured:
    optimizer, fastest = learner.outer_optimizer(1e-6), math.inf
    for p in learner.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(REPEATS):
        start = time.thread_time()
        optimizer.step()
        fastest = min(fastest, time.thread_time() - start)
    parameters = list(learner.parameters())
    return _Measured(fastest, [float(sum(p.numel() for p in parameters)), float(len(parameters))])


def _work(call: EngineCall, tensors: int) -> list[float]:
    """The quantities that the seconds around a call are proportional to, in the order of Costs."""
    one, of_tasks = ordered(call)
    if call.kind in SUMMED_KINDS and not of_tasks:
        of_tasks = call.tasks * call.parameters
    of_tasks += sum(size(shape) for name, shape in call.inputs if name in CHECKED)
    counts = (images(call), one, of_tasks, call.parameters if tensors else 0)
    return [1.0, float(tensors > 0), float(tensors), *(float(call.real_bytes * count) for count in counts)]


def _fit(measured: Sequence[_Measured]) -> list[float]:
    """Nonnegative rates that fit the measured seconds, by least squares of relative errors."""
    seconds, rows = np.array([m.seconds for m in measured]), np.array([m.work for m in measured])
    rows = rows / seconds[:, None]
    solution, used = np.zeros(rows.shape[1]), list(range(rows.shape[1]))
    while used:
        of_used = np.linalg.lstsq(rows[:, used], np.ones(len(seconds)), rcond=None)[0]
        if min(of_used) >= 0:
            solution[used] = of_used
            break
        del used[int(np.argmin(of_used))]  # a negative rate explains nothing
    return [float(rate) for rate in solution]
