"""The prediction: time and peak memory of an outer step, by phases and parts, and what the engine would choose.

found = predict(learner, batch, threads)            batch: real tasks, or work.empty_batch()
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fastmaml.compiled import introspection
from fastmaml.prediction import memory
from fastmaml.prediction.calibration import Machine
from fastmaml.prediction.engine_calls import EngineCall, engine_calls, require_compiled

OUTSIDE = "outside the walks"
OPTIMIZER = "outer optimizer"
ARENAS, ARRAYS, PLANS = "arenas of the workers", "arguments and results", "plans"
MODEL, GRADIENTS, OPTIMIZER_STATE, BATCH = "network", "gradients", "outer optimizer's numbers", "batch"


class Mode(NamedTuple):
    """A memory mode of the engine: what the meta-gradient would take in it."""

    name: str
    seconds: float
    arena_bytes: int  # of one worker


@dataclass(frozen=True)
class Prediction:
    """An outer step, predicted."""

    tasks: int
    phases: dict[str, float]  # seconds by phase of the meta-gradient, OUTSIDE and OPTIMIZER included
    parts: dict[str, int]  # bytes of memory at the peak
    modes: tuple[Mode, ...]  # of the sweep, where there is a choice
    chosen: str  # "stash" or "low"; "" where there is no sweep
    why: str
    unknown: tuple[str, ...]  # ops that no calibration knows; their times are those of their neighbours

    @property
    def step_s(self) -> float:
        return sum(self.phases.values())

    @property
    def meta_gradient_s(self) -> float:
        return self.step_s - self.phases[OPTIMIZER]

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def tasks_per_s(self) -> float:
        return self.tasks / self.step_s

    def to_json(self) -> dict[str, Any]:
        return {
            "meta_gradient_s": self.meta_gradient_s,
            "outer_step_s": self.step_s,
            "tasks_per_s": self.tasks_per_s,
            "peak_bytes": self.peak_bytes,
            "phases_s": self.phases,
            "parts_bytes": self.parts,
            "memory": self.chosen,
            "why": self.why,
            "modes": [mode._asdict() for mode in self.modes],
        }


def predict(learner: Any, batch: Sequence[Tensor], threads: int, machine_of: Callable[[int], Machine]) -> Prediction:
    """Of one step of the learner with its outer optimizer. machine_of: calibration.calibrated, or a Machine by its workers.

    Raises ValueError where the learner's engine is not planned.
    """
    require_compiled(learner.engine)
    learner = copy.deepcopy(learner)  # some carry numbers on from step to step

    def step() -> None:
        learner.zero_grad(set_to_none=True)
        learner(*batch).loss.backward()

    learner.at_step(0)
    calls = engine_calls(step)
    if not calls:
        raise ValueError(f"{type(learner).__name__} asks nothing of the engine; there is nothing to predict")
    learner.zero_grad(set_to_none=True)
    parameters = [p for p in learner.parameters() if p.requires_grad]
    plans = [call.costs() for call in calls]
    machines = [machine_of(memory.workers(call, costs, threads)) for call, costs in zip(calls, plans)]
    phases: dict[str, float] = {}
    outside, unknown = 0.0, set()
    for call, costs, machine in zip(calls, plans, machines):
        for phase, seconds in _walk(call, costs, machine).items():
            name = phase if call.kind == "meta_gradient" else call.kind
            phases[name] = phases.get(name, 0.0) + seconds
        outside += machine.costs.around(call, len(parameters), machine.workers)
        unknown |= {s["op"] for s in costs["steps"] if not machine.steps.knows(s, costs["lanes"])}
    phases[OUTSIDE] = outside
    phases[OPTIMIZER] = machines[0].costs.update(sum(p.numel() for p in parameters), len(parameters))
    parts = _parts(learner, batch, calls, plans, threads)
    modes, chosen, why = _choice(calls, plans, machines)
    return Prediction(len(batch[0]), phases, parts, modes, chosen, why, tuple(sorted(unknown)))


def predict_call(run: Callable[[], Any], threads: int, machine_of: Callable[[int], Machine]) -> float:
    """Seconds of what `run` asks of the engine alone, such as Engine.hvp, without a learner around it."""
    total = 0.0
    for call in engine_calls(run):
        costs = call.costs()
        machine = machine_of(memory.workers(call, costs, threads))
        total += sum(_walk(call, costs, machine).values()) + machine.costs.around(call, 0, machine.workers)
    return total


def _walk(call: EngineCall, costs: dict[str, Any], machine: Machine) -> dict[str, float]:
    """Seconds by phase: each worker takes one group of tasks after the other."""
    lanes = costs["lanes"]
    rounds = math.ceil(math.ceil(call.tasks / lanes) / machine.workers)
    phases: dict[str, float] = {}
    known: dict[tuple[Any, ...], float] = {}  # a hundred inner steps have the same few Steps
    for step in costs["steps"]:
        same = (step["op"], step["layer"], step["examples"], step["products"], step["bytes"])
        if same not in known:
            known[same] = machine.steps.seconds(step, lanes)
        phases[step["phase"]] = phases.get(step["phase"], 0.0) + rounds * known[same]
    return phases


def _parts(
    learner: Any, batch: Sequence[Tensor], calls: list[EngineCall], plans: list[dict[str, Any]], threads: int
) -> dict[str, int]:
    """Arenas and blocks are kept from call to call and serve the largest; the tensors of a call end with it."""
    parameters = [p for p in learner.parameters() if p.requires_grad]
    trained = sum(p.numel() * p.element_size() for p in parameters)
    largest = max((p.numel() * p.element_size() for p in parameters), default=0)
    return {
        MODEL: sum(t.numel() * t.element_size() for t in learner.state_dict().values()),
        BATCH: sum(t.numel() * t.element_size() for t in batch),
        ARENAS: max(memory.arenas(call, costs, threads) for call, costs in zip(calls, plans)),
        ARRAYS: max(memory.arrays(call, costs, threads) for call, costs in zip(calls, plans)),
        PLANS: sum({call: memory.plans(costs) for call, costs in zip(calls, plans)}.values()),
        GRADIENTS: (2 if all(call.uniform_rate for call in calls) else 3)
        * trained,  # the start as one vector, .grad, the rates
        OPTIMIZER_STATE: 2 * trained + 2 * largest,  # Adam's two moments, and its temporary numbers
    }


def _choice(
    calls: list[EngineCall], plans: list[dict[str, Any]], machines: list[Machine]
) -> tuple[tuple[Mode, ...], str, str]:
    """The modes of the meta-gradient that takes longest, and the one the engine takes."""
    found: list[tuple[float, EngineCall, dict[str, Any], list[Mode]]] = []
    for call, costs, machine in zip(calls, plans, machines):
        if call.kind != "meta_gradient" or not any(step["phase"] == "sweep" for step in costs["steps"]):
            continue
        modes = []
        for name in ("stash", "low"):
            other = call.costs(name)
            modes.append(Mode(name, sum(_walk(call, other, machine).values()), int(other["arena_bytes"])))
        found.append((max(mode.seconds for mode in modes), call, costs, modes))
    if not found:
        return (), "", "no adjoint sweep: there is nothing to keep or to compute again"
    _, call, costs, modes = max(found, key=lambda of: of[0])
    return tuple(modes), costs["memory"], _why(call, costs["memory"], modes[0], modes[1])


def _why(call: EngineCall, chosen: str, stash: Mode, low: Mode) -> str:
    if stash.arena_bytes == low.arena_bytes:
        return "both modes are the same here: the sweep has no Hessian term"
    if call.memory != "auto":
        return f"memory={call.memory!r} was asked for"
    budget = introspection.stash_budget(call.backend, call.callers_loss)
    least = _mib(stash.arena_bytes)
    room = f"the {_mib(budget)} MiB that auto gives an arena here"
    if chosen == "stash":
        return f"a worker's arena with the kept activations is {least} MiB, within {room}"
    return f"a worker's arena with the kept activations would be {least} MiB, more than {room}"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f}" if count < 100 * 2**20 else f"{count / 2**20:,.0f}"
