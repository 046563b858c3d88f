"""The prediction: time by phase and peak memory by part of an outer step, and the memory mode that the engine chooses.

found = predict(learner, batch, threads, calibrated)    batch: real tasks, or engine_calls.empty_batch()
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
    """A memory mode of the engine, and the meta-gradient's cost in this mode."""

    name: str
    seconds: float
    arena_bytes: int  # of one worker


@dataclass(frozen=True)
class Prediction:
    """The prediction of one outer step."""

    tasks: int
    phases: dict[str, float]  # seconds by phase of the meta-gradient, including OUTSIDE and OPTIMIZER
    parts: dict[str, int]  # bytes of memory at the peak
    modes: tuple[Mode, ...]  # of the sweep, if there is a choice
    chosen: str  # "stash" or "low"; "" without a sweep
    why: str
    unknown: tuple[str, ...]  # ops without a measurement; their times come from similar ops

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
    """Predicts one step of the learner and its outer optimizer.

    machine_of: calibration.calibrated, or another function from a number of workers to a Machine.
    Raises ValueError if the learner's engine has no plan.
    """
    require_compiled(learner.engine)
    learner = copy.deepcopy(learner)  # some learners keep state from step to step

    def step() -> None:
        learner.zero_grad(set_to_none=True)
        learner(*batch).loss.backward()

    learner.at_step(0)
    calls = engine_calls(step)
    if not calls:
        raise ValueError(f"{type(learner).__name__} does not call the engine, so there is nothing to predict")
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
    """Seconds of a `run` that calls the engine without a learner, such as Engine.hvp."""
    total = 0.0
    for call in engine_calls(run):
        costs = call.costs()
        machine = machine_of(memory.workers(call, costs, threads))
        total += sum(_walk(call, costs, machine).values()) + machine.costs.around(call, 0, machine.workers)
    return total


def _walk(call: EngineCall, costs: dict[str, Any], machine: Machine) -> dict[str, float]:
    """Seconds by phase. Each worker takes one group of tasks after the other."""
    lanes = costs["lanes"]
    rounds = math.ceil(math.ceil(call.tasks / lanes) / machine.workers)
    phases: dict[str, float] = {}
    known: dict[tuple[Any, ...], float] = {}  # even a hundred inner steps repeat the same few Steps
    for step in costs["steps"]:
        same = (step["op"], step["layer"], step["examples"], step["products"], step["bytes"])
        if same not in known:
            known[same] = machine.steps.seconds(step, lanes)
        phases[step["phase"]] = phases.get(step["phase"], 0.0) + rounds * known[same]
    return phases


def _parts(
    learner: Any, batch: Sequence[Tensor], calls: list[EngineCall], plans: list[dict[str, Any]], threads: int
) -> dict[str, int]:
    """Bytes by part. Arenas and blocks are kept, at the size of the largest call; a call's tensors end with it."""
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
        * trained,  # the flat parameters, .grad, the rates
        OPTIMIZER_STATE: 2 * trained + 2 * largest,  # Adam's two moments, and its temporaries
    }


def _choice(
    calls: list[EngineCall], plans: list[dict[str, Any]], machines: list[Machine]
) -> tuple[tuple[Mode, ...], str, str]:
    """The memory modes of the slowest meta-gradient, the engine's choice, and the reason."""
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
        return (), "", "no adjoint sweep, so there are no activations to keep or recompute"
    _, call, costs, modes = max(found, key=lambda of: of[0])
    return tuple(modes), costs["memory"], _why(call, costs["memory"], modes[0], modes[1])


def _why(call: EngineCall, chosen: str, stash: Mode, low: Mode) -> str:
    if stash.arena_bytes == low.arena_bytes:
        return "both modes are equal here, because the sweep has no Hessian term"
    if call.memory != "auto":
        return f"memory={call.memory!r} was given"
    budget = introspection.stash_budget(call.backend, call.python_loss)
    least = _mib(stash.arena_bytes)
    room = f"auto's limit of {_mib(budget)} MiB"
    if chosen == "stash":
        return f"a worker's arena with the kept activations takes {least} MiB, within {room}"
    return f"a worker's arena with the kept activations would take {least} MiB, above {room}"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f}" if count < 100 * 2**20 else f"{count / 2**20:,.0f}"
