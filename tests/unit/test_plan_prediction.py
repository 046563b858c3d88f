"""fastmaml plan: its engine calls, its interpolation, and its memory against that of a process. No test depends on timings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import fastmaml as fm
from fastmaml.benchmark import peak
from fastmaml.benchmark.peers import fastmaml_maml
from fastmaml.cli.main import main
from fastmaml.prediction import calibration, request
from fastmaml.prediction.calibration import Machine
from fastmaml.prediction.call_overhead import Costs
from fastmaml.prediction.engine_calls import empty_batch, engine_calls
from fastmaml.prediction.predict import ARENAS, BATCH, OPTIMIZER, OPTIMIZER_STATE, predict
from fastmaml.prediction.step_times import Rates, features, key, yardstick
from fastmaml.training.experiment import make_learner
from fastmaml.training.presets import preset

_C: Any = pytest.importorskip("fastmaml._C")

# A machine on which every Step takes as long as the yardstick says, and 1 ms passes around each call.
STEP = {
    "op": "linear_fwd",
    "layer": "linear 3 to 4",
    "sizes": [5, 3, 4, 1],
    "products": 120.0,
    "other": 0.0,
    "bytes": 1e3,
}
COSTS = Costs(1e-3, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1e-9, 0.0)


def _machine(workers: int) -> Machine:
    return Machine(workers, Rates([(key(STEP, 1), features(STEP), 1.0)]), COSTS)


def _step(rows: int) -> dict[str, Any]:
    return STEP | {
        "sizes": [rows, 64, 64, 1],
        "products": 2.0 * rows * 64 * 64,
        "bytes": 4.0 * (2 * rows * 64 + 64 * 64),
    }


def test_a_measured_step_takes_what_was_measured_and_one_between_two_something_between() -> None:
    steps = {rows: _step(rows) for rows in (8, 32, 128)}
    ratios = {8: 4.0, 128: 1.0}
    rates = Rates((key(steps[rows], 1), features(steps[rows]), ratio) for rows, ratio in ratios.items())
    found = {rows: rates.seconds(step, 1) / yardstick(step, 1) for rows, step in steps.items()}
    assert found[8] == pytest.approx(4.0, rel=0.1)
    assert found[128] == pytest.approx(1.0, rel=0.1)
    assert found[32] == pytest.approx(2.0, rel=0.2)  # the geometric mean of both
    assert Rates.from_json(json.loads(json.dumps(rates.to_json()))).seconds(steps[32], 1) == pytest.approx(
        rates.seconds(steps[32], 1)
    )


@pytest.mark.parametrize(
    ("algorithm", "kinds"),
    [
        ("maml", ["meta_gradient"]),
        ("fomaml", ["meta_gradient"]),
        ("maml++", ["meta_gradient"]),
        ("reptile", ["adapt", "forward"]),
        ("imaml", ["adapt", "meta_gradient", "solve", "grad"]),
    ],
)
def test_the_calls_of_every_kind_of_learner_are_found_without_computing_them(algorithm: str, kinds: list[str]) -> None:
    config = preset("glyphs", algorithm=algorithm)
    learner = make_learner(config)
    shots = config.train_shots or config.shots
    batch = empty_batch(3, 5 * shots, 15, (1, 28, 28), (), 5)
    before = learner.engine.flatten()
    _C.profile_start()
    calls = engine_calls(lambda: learner(*batch).loss.backward())
    assert _C.profile_stop() == []
    found = [call.kind for call in calls]
    assert found[: len(kinds)] == kinds
    assert all((call.tasks, call.parameters) == (3, learner.engine.layout.size) for call in calls)
    assert torch.equal(learner.engine.flatten(), before)


def test_time_is_shared_out_among_the_workers_and_grows_with_tasks_and_steps() -> None:
    def walk(tasks: int, steps: int, workers: int) -> float:
        learner = fm.MAML(fm.models.mlp([4, 40, 300, 3]), 0.1, steps, backend="cpu")
        found = predict(learner, empty_batch(tasks, 6, 9, (4,), (), 3), workers, _machine)
        return found.meta_gradient_s - 1e-3

    assert walk(64, 2, 1) == pytest.approx(2 * walk(64, 2, 2))
    assert walk(64, 2, 1) == pytest.approx(64 * walk(1, 2, 1), rel=1e-6)
    growth = [walk(2, steps, 1) for steps in (1, 2, 3)]
    assert growth[2] - growth[1] == pytest.approx(growth[1] - growth[0], rel=0.05)


def test_a_sweep_that_computes_again_takes_longer_and_less_memory() -> None:
    learner = fm.MAML(fm.models.conv4(filters=16), 0.1, 3, backend="cpu")
    found = predict(learner, empty_batch(4, 5, 5, (1, 28, 28), (), 5), 2, _machine)
    stash, low = found.modes
    assert stash.seconds < low.seconds and stash.arena_bytes > low.arena_bytes
    assert found.chosen == "stash" and "within" in found.why
    assert found.parts[ARENAS] == 2 * stash.arena_bytes
    assert found.phases[OPTIMIZER] == pytest.approx(1e-9 * learner.engine.layout.size)


def test_first_order_has_nothing_to_choose() -> None:
    learner = fm.FOMAML(fm.models.mlp([2, 8, 2]), 0.1, 2, backend="cpu")
    found = predict(learner, empty_batch(2, 3, 3, (2,), (), 2), 1, _machine)
    assert found.why.startswith(("no adjoint sweep", "both modes are equal"))


def test_what_is_far_too_big_is_planned_without_its_memory() -> None:
    asked = request.of_dataset("omniglot", "maml", request.Sizes(tasks=100_000, shots=50), "auto", False, None)
    found = predict(asked.learner, asked.batch, 2, _machine)
    assert found.peak_bytes > 2**36 and math.isfinite(found.step_s)


def test_a_model_on_autodiff_is_refused_with_its_reason() -> None:
    learner = fm.MAML(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5)), 0.1, backend="autodiff")
    with pytest.raises(ValueError, match="only the cpu backend is planned"):
        predict(learner, empty_batch(2, 3, 3, (2,), (), 2), 1, _machine)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells peaks")
@pytest.mark.parametrize(
    ("case", "memory", "changes"),
    [
        ("mlp-k1", "auto", {"tasks": 32}),  # with fewer, pages of 2 MiB that are touched in part are a sixth of it
        ("omniglot-t4", "stash", {"inner_steps": 3}),
        ("omniglot-t4", "low", {"inner_steps": 3}),
    ],
)
def test_the_predicted_memory_is_what_a_process_takes(case: str, memory: str, changes: dict[str, int]) -> None:
    given = peak.built_in(case, **changes)
    made = given.case
    learner = fm.MAML(given.model, made.inner_lr, made.inner_steps, made.loss, backend="cpu", memory=memory)
    found = predict(learner, given.batch, torch.get_num_threads(), _machine)
    source = peak.Source("fastmaml.benchmark.peak:built_in", {"case": case, **changes})
    measured = peak.in_a_process(fastmaml_maml, source, {"memory": memory}).bytes
    predicted = found.peak_bytes - found.parts[BATCH] - found.parts[OPTIMIZER_STATE]
    assert abs(predicted - measured) <= max(0.15 * measured, 2**20)  # below a MiB the allocator's own habits decide


# ---------------------------------------------------------------- the command


@pytest.fixture
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "calibrated", lambda workers, again=False: _machine(workers))


@pytest.mark.usefixtures("quick_machine")
def test_the_command_prints_and_writes_the_prediction(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    arguments = [
        "sinusoid",
        "--inner-steps",
        "5",
        "--tasks",
        "7",
        "--threads",
        "2",
        "--steps",
        "1000",
        "--out",
        str(out),
    ]
    assert main(["plan", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "MAML on sinusoid, 7 tasks, 10 support and 10 query examples, K = 5" in printed
    assert "for 1,000 steps" in printed and "stash" in printed and "inner gradient" in printed
    kept = json.loads(out.read_text())
    assert kept["memory"] == "stash" and kept["peak_bytes"] == sum(kept["parts_bytes"].values())
    assert kept["outer_step_s"] == pytest.approx(sum(kept["phases_s"].values()))


OWN = """
import torch
def problem():
    x = torch.rand(2, 3, 4)
    return torch.nn.Linear(4, 2), (x, torch.zeros(2, 3).long(), x, torch.zeros(2, 3).long()), "cross_entropy", 0.1, 2
"""


@pytest.mark.usefixtures("quick_machine")
def test_an_own_model_is_planned_at_other_sizes(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    assert main(["plan", f"{file}:problem", "--tasks", "9", "--shots", "6", "--dtype", "float64"]) == 0
    assert "9 tasks, 6 support and 3 query examples, K = 2; float64" in capsys.readouterr().out


@pytest.mark.usefixtures("quick_machine")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "neither a data set (sinusoid, glyphs, omniglot) nor FILE.py:FUNCTION"),
        (["sinusoid", "--tasks", "0"], "--tasks is 0; it must be at least 1"),
        (["sinusoid", "--threads", "0"], "--threads is 0; it must be at least 1"),
        (["sinusoid", "--ways", "5"], "sinusoid is a regression"),
        (["sinusoid", "--algorithm", "protomaml"], "ProtoMAML builds its head from the classes"),
        (["omniglot", "--algorithm", "cavia"], "is not fused"),
        (["missing.py:problem"], "there is no file missing.py"),
    ],
)
def test_bad_input_gets_one_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 1
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said


def test_a_machine_is_measured_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMAML_CACHE", str(tmp_path))
    measured: list[int] = []

    def measure(workers: int) -> Machine:
        measured.append(workers)
        return _machine(workers)

    monkeypatch.setattr(calibration, "measure", measure)
    first, second = calibration.calibrated(2), calibration.calibrated(2)
    assert measured == [2]
    assert second.costs == first.costs
    assert second.steps.seconds(STEP, 1) == pytest.approx(first.steps.seconds(STEP, 1))
    (file,) = (tmp_path / "rates").iterdir()
    file.write_text("damaged")
    calibration.calibrated(2)
    calibration.calibrated(2, again=True)
    assert measured == [2, 2, 2]
