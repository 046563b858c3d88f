"""The memory of an outer step in bytes, part by part: from the engine's plan, elsewhere counted from shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastmaml.prediction.engine_calls import EngineCall

# A plan's bytes for each Step: its sizes and slots, in vectors that grow by doubling, for each memory mode that is tried.
STEP_BYTES = 2_000
REORDERED = (
    "theta",
    "params",
    "v",
    "rates",
    "step_rows",
    "state",
    "mask",
)  # copied into the engine's order of parameters
REDUCED = (1, 4, 5)  # the results of meta_gradient that are summed over tasks


def arenas(call: EngineCall, costs: Mapping[str, Any], threads: int) -> int:
    """Bytes of the arenas of all workers of a call."""
    return workers(call, costs, threads) * int(costs["arena_bytes"])


def workers(call: EngineCall, costs: Mapping[str, Any], threads: int) -> int:
    """The number of threads that walk at once. Each takes one group of tasks at a time."""
    return max(1, min(threads, math.ceil(call.tasks / costs["lanes"])))


def summed_at_once(call: EngineCall, costs: Mapping[str, Any], threads: int) -> int:
    """The number of tasks with space for their summands.

    These are the groups being walked, one waiting group per other worker, and a partial sum for each level of the tree.
    """
    groups = math.ceil(call.tasks / costs["lanes"])
    if call.python_loss:  # a loss written in Python sees all tasks at once
        return call.tasks
    return int(costs["lanes"]) * min(groups, math.ceil(math.log2(groups)) + 2 * workers(call, costs, threads) - 1)


def arrays(call: EngineCall, costs: Mapping[str, Any], threads: int) -> int:
    """Bytes of a call: arguments in the engine's order, results per task or summed, and the returned tensors."""
    results = [size(shape) for shape in call.results]
    reduces = call.kind == "meta_gradient" and "per_task=1" not in call.loop
    reordered = sum(_of_parameters(call, costs))
    of_tasks = 0
    for i, shape in enumerate(call.results):
        if reduces and i in REDUCED:
            of_tasks += summed_at_once(call, costs, threads) * results[i] + (0 if costs["as_torch"] else results[i])
        elif not (costs["as_torch"] and _is_of_parameters(shape, call)):
            of_tasks += results[i]
    return call.real_bytes * (reordered + images(call) + sum(results) + of_tasks)


def ordered(call: EngineCall) -> tuple[int, int]:
    """Numbers reordered between torch's and the engine's order of parameters: (for all tasks together, per task)."""
    if call.costs()["as_torch"]:
        return 0, 0
    vectors = [
        shape for name, shape in call.inputs if name in REORDERED and not (name == "rates" and call.uniform_rate)
    ]
    vectors += [shape for shape in call.results if _is_of_parameters(shape, call)]
    of_tasks = sum(size(shape) for shape in vectors if len(shape) > 1 and 1 < call.tasks == shape[0])
    return sum(size(shape) for shape in vectors) - of_tasks, of_tasks


def _is_of_parameters(shape: tuple[int, ...], call: EngineCall) -> bool:
    return bool(shape) and shape[-1] % call.parameters == 0


def _of_parameters(call: EngineCall, costs: Mapping[str, Any]) -> list[int]:
    stay = REORDERED if costs["as_torch"] else ("rates",) if call.uniform_rate else ()
    return [
        size(shape) for name, shape in call.inputs if name in REORDERED and (name not in stay or name == "step_rows")
    ]


def images(call: EngineCall) -> int:
    """Numbers of images that are reordered to channels last for the engine."""
    return sum(size(shape) for _, shape in call.inputs if len(shape) == 5 and shape[2] > 1 and shape[3] * shape[4] > 1)


def plans(costs: Mapping[str, Any]) -> int:
    """Bytes of the Schedule, which is kept for the next call."""
    return STEP_BYTES * len(costs["steps"])


def size(shape: tuple[int, ...]) -> int:
    """The product of a shape."""
    return math.prod(shape)
