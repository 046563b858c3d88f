# bench/kernels counts what really happens: its launches are those of the engine's own meta-gradient on the emulator, and its bytes those of
# formulas where they are plain. Needs the race build, so it runs with `pytest -m race`.
from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import kernel_launches
import pytest

import fastmaml as fm

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # bench is no installed package

from bench.cases import CASES, problem  # noqa: E402
from bench.kernels import workloads  # noqa: E402

pytestmark = [pytest.mark.race, pytest.mark.slow]

SINE = replace(CASES["sinusoid-k1"], tasks=3)
TASKS, P = 3, 1761


@pytest.fixture(scope="module")
def counted():
    pytest.importorskip("fastmaml._C")
    cases = pytest.MonkeyPatch()
    cases.setitem(workloads.CASES, "sinusoid-k1", SINE)
    yield {w.inner_steps: w for w in workloads.count("sinusoid", (1, 3))}
    cases.undo()


def asked(workload, op):
    (one,) = [a for a in workload.asked if a.op == op]
    return one


@pytest.mark.parametrize("steps", [1, 3])
def test_launches_are_those_of_the_engine(counted, steps):
    p = problem(SINE)
    engine = fm.Engine(p.model, loss="mse", backend="cuda_emulated", memory="low")
    before = kernel_launches.of_this_process()
    engine.meta_gradient(engine.flatten(), p.batch, inner_lr=0.01, inner_steps=steps, inner_lr_grad=False)
    after = kernel_launches.of_this_process()
    launched = {symbol: n - before[symbol] for symbol, n in after.items() if n > before[symbol]}
    expected: dict[str, int] = {}
    for a in counted[steps].asked:
        for launch in a.asked_launches:
            times = a.launches // len(a.asked_launches)
            expected[launch.kernel] = expected.get(launch.kernel, 0) + times
    assert launched == expected


def test_bytes_of_an_update(counted):
    update = asked(counted[3], "sgd_update")
    assert update.launches == 3
    assert update.bytes == update.compulsory == 3 * TASKS * 4 * (3 * P + P)  # phi, g, rate; phi_next


def test_bytes_of_the_sum_over_tasks(counted):
    assert asked(counted[1], "tree_reduce").bytes == 4 * (TASKS + 1) * P


def test_a_tasks_bytes_do_not_depend_on_the_number_of_inner_steps(counted):
    one, three = ({a.name: a for a in counted[steps].asked} for steps in (1, 3))
    assert one.keys() == three.keys()
    name = next(name for name in one if name.startswith("linear_fwd_dual 40 to 40"))
    assert three[name].bytes == 3 * one[name].bytes
    assert three[name].flops == 3 * one[name].flops == 3 * 3 * TASKS * 2 * 10 * 40 * 40
