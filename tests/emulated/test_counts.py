# bench/kernels counts right: its launches equal those of the engine's meta-gradient on the emulator, and its bytes equal simple formulas.
# Needs the race build, so it runs with `pytest -m race`.
from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import kernel_launches
import pytest

import fastmaml as fm

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # bench is no installed package

from bench.cases import CASES  # noqa: E402
from bench.kernels import workloads  # noqa: E402
from fastmaml.benchmark.problem import problem  # noqa: E402

pytestmark = [pytest.mark.race, pytest.mark.slow]

SINE = replace(CASES["sinusoid-k1"], tasks=3)
TASKS, P = 3, 1761


@pytest.fixture(scope="module")
def counted():
    pytest.importorskip("fastmaml._C")
    cases = pytest.MonkeyPatch()
    cases.setitem(workloads.CASES, "sinusoid-k1", SINE)
    yield {(w.walk, w.memory, w.inner_steps): w for w in workloads.count("sinusoid", (1, 3))}
    cases.undo()


def asked(workload, op):
    (one,) = [a for a in workload.asked if a.op == op]
    return one


def launched_by(workload):
    expected: Counter[str] = Counter()
    for a in (*workload.asked, *workload.around):
        for launch in a.asked_launches:
            expected[launch.kernel] += a.launches // len(a.asked_launches)
    return expected


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("memory", ["low", "stash"])
@pytest.mark.parametrize("walk", ["layered", "resident"])
def test_launches_are_those_of_the_engine(counted, walk, memory, steps):
    from fastmaml import _C

    p = problem(SINE)
    engine = fm.Engine(p.model, loss="mse", backend="cuda_emulated", memory=memory)
    _C.set_cuda_walk(walk)
    _C.set_recording(False)  # a replay copies its inputs
    try:
        before = kernel_launches.of_this_process()
        engine.meta_gradient(engine.flatten(), p.batch, inner_lr=0.01, inner_steps=steps, inner_lr_grad=False)
        launched = kernel_launches.of_this_process() - before
    finally:
        _C.set_recording(True)
        _C.set_cuda_walk("auto")
    assert launched == launched_by(counted[walk, memory, steps])


@pytest.mark.parametrize("memory", ["low", "stash", "auto"])
def test_plans_are_the_engines(counted, memory):
    from fastmaml import _C

    (w,) = [
        w
        for (walk, m, K), w in counted.items()
        if (walk, K) == ("resident", 3) and (w.auto if memory == "auto" else m == memory)
    ]
    text = workloads.program_text(SINE)
    r = w.resident
    assert _C.walk(text, "meta_gradient", "cuda_emulated", 4, SINE.support, SINE.query, "steps=3", memory) == (
        f"resident: {r.threads} threads, {r.shared} bytes of shared memory and {r.arena} of device memory for each task"
    )


def test_a_resident_walk_asks_for_its_arguments_and_its_steps_at_least(counted):
    w = counted["resident", "low", 3]
    assert w.requested > w.compulsory
    assert w.resident.arena == 0 and w.resident.stages < w.resident.steps


def test_bytes_of_an_update(counted):
    update = asked(counted["layered", "low", 3], "sgd_update")
    assert update.launches == 3
    assert update.bytes == update.compulsory == 3 * TASKS * 4 * (3 * P + P)  # phi, g, rate; phi_next


def test_bytes_of_the_sum_over_tasks(counted):
    assert asked(counted["layered", "low", 1], "tree_reduce").bytes == 4 * (TASKS + 1) * P


def test_a_tasks_bytes_do_not_depend_on_the_number_of_inner_steps(counted):
    one, three = ({a.name: a for a in counted["layered", "low", steps].asked} for steps in (1, 3))
    name = next(name for name in one if name.startswith("linear_fwd_dual 40 to 40"))
    assert three[name].bytes == 3 * one[name].bytes
    assert three[name].flops == 3 * one[name].flops == 3 * 3 * TASKS * 2 * 10 * 40 * 40
