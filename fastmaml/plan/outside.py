"""What a call takes beside its walk: Python, arrays on their way to the engine and back, the outer optimizer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastmaml.plan.memory import images, ordered, size
from fastmaml.plan.samples import LANES, SAMPLES, Sample
from fastmaml.plan.work import EngineCall, engine_calls

REPEATS = 5  # of each network; the fastest counts
WALKED_KINDS = ("meta_gradient", "grad", "hvp", "adapt", "solve")  # with a vector over the parameters for each task


class Costs(NamedTuple):
    """Seconds beside the walks: of a call of the engine with a learner's part of it, and of the outer optimizer (Adam)."""

    call_s: float
    call_tensor_s: float  # for each parameter tensor
    image_byte_s: float  # for every byte of images that are put into the engine's order
    order_byte_s: float  # for every byte of parameters, rates and gradients that are put into the other order
    task_byte_s: float  # for every byte that is summed over tasks or handed over for each of them
    update_number_s: float
    update_tensor_s: float

    def around(self, call: EngineCall, tensors: int) -> float:
        """Of one call of the engine, for a network of so many parameter tensors."""
        rates = (self.call_s, self.call_tensor_s, self.image_byte_s, self.order_byte_s, self.task_byte_s)
        return sum(rate * work for rate, work in zip(rates, _work(call, tensors)))

    def update(self, numbers: int, tensors: int) -> float:
        """Of the outer optimizer."""
        return self.update_number_s * numbers + self.update_tensor_s * tensors


def measure() -> Costs:
    """On one thread, by its processor time less that of the Steps: what other programs do does not count."""
    around, updates = [], []
    for sample in SAMPLES:
        for tasks in {1, 4 * sample.tasks} if 1 < sample.tasks < LANES else {1}:
            seconds, update, call, parameters, tensors = _one(sample, tasks)
            around.append((seconds, _work(call, tensors)))
            updates.append((update, [float(parameters), float(tensors)]))
    return Costs(*_fit(around), *_fit(updates))


def _one(sample: Sample, tasks: int) -> tuple[float, float, EngineCall, int, int]:
    from fastmaml import _C

    learner = sample.make("stash")
    batch = sample.batch(tasks, learner.engine)
    optimizer = learner.outer_optimizer(1e-4)
    (call,) = engine_calls(lambda: learner(*batch))
    around, updates = [], []
    for _ in range(REPEATS):
        _C.profile_start()
        start = time.thread_time()
        learner.zero_grad()
        learner(*batch).loss.backward()
        end = time.thread_time()
        optimizer.step()
        updates.append(time.thread_time() - end)
        steps = sum(step["seconds"] for plan in _C.profile_stop() for step in plan["steps"])
        around.append(end - start - steps)
    parameters = list(learner.parameters())
    numbers = sum(p.numel() for p in parameters)
    return max(min(around), 1e-6), min(updates), call, numbers, len(parameters)


def _work(call: EngineCall, tensors: int) -> list[float]:
    """What the seconds around a call are proportional to, in Costs' order."""
    of_tasks = call.tasks * call.parameters if call.kind in WALKED_KINDS else 0
    moved = of_tasks + sum(size(shape) for shape in call.results)
    return [1.0, tensors, *(float(call.real_bytes * count) for count in (images(call), ordered(call), moved))]


def _fit(measured: Sequence[tuple[float, list[float]]]) -> list[float]:
    """The rates, none negative, that explain the measured seconds by least squares of relative errors."""
    seconds, rows = np.array([s for s, _ in measured]), np.array([row for _, row in measured])
    rows = rows / seconds[:, None]
    solution, used = np.zeros(rows.shape[1]), list(range(rows.shape[1]))
    while used:
        of_used = np.linalg.lstsq(rows[:, used], np.ones(len(seconds)), rcond=None)[0]
        if min(of_used) >= 0:
            solution[used] = of_used
            break
        del used[int(np.argmin(of_used))]  # it explains nothing
    return [float(rate) for rate in solution]
