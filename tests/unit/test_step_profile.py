"""The profile of the walks: every Step of every plan, with its counted costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import fastmaml as fm
from fastmaml.benchmark.cases import META
from fastmaml.benchmark.problem import arithmetic, problem

_C: Any = pytest.importorskip("fastmaml._C")


def _profile(engine: fm.Engine, batch: fm.TaskBatch, inner_steps: int) -> list[dict[str, Any]]:
    theta = engine.flatten()
    _C.profile_start()
    engine.meta_gradient(theta, batch, inner_lr=0.01, inner_steps=inner_steps, inner_lr_grad=False)
    return _C.profile_stop()


@pytest.mark.parametrize("name", ["sinusoid-k5", "mlp-k1", "omniglot-t8-k1"])
def test_products_of_a_stashed_meta_gradient_are_those_of_the_benchmark(name: str) -> None:
    case = replace(META[name], tasks=2)
    given = problem(case)
    engine = fm.Engine(given.model, case.loss, "cpu", memory="stash")
    (plan,) = _profile(engine, given.batch, case.inner_steps)
    assert sum(step["products"] for step in plan["steps"]) * case.tasks == arithmetic(given)


def test_every_step_is_called_once_a_task_and_takes_time() -> None:
    case = replace(META["sinusoid-k5"], tasks=3)
    given = problem(case)
    engine = fm.Engine(given.model, case.loss, "reference")
    (plan,) = _profile(engine, given.batch, 2)
    assert (plan["walks"], plan["tasks"]) == (1, 3)
    assert {step["calls"] for step in plan["steps"]} == {3}
    assert {step["phase"] for step in plan["steps"]} == {"inner gradient", "update", "query", "sweep"}
    assert all(step["seconds"] > 0 and step["bytes"] > 0 for step in plan["steps"])
    busy = sum(step["seconds"] for step in plan["steps"])
    assert 0 < busy <= 1.01 * plan["workers"] * plan["wall_seconds"]  # 1.01: what a tick lasts is measured


def test_a_profile_names_every_plan_that_ran_and_none_before_it() -> None:
    engine = fm.Engine(fm.models.mlp([2, 3, 1]), "mse", "cpu")
    x, y = torch.rand(2, 4, 2), torch.rand(2, 4, 1)
    engine.grad(engine.flatten(), x, y)
    _C.profile_start()
    engine.hvp(engine.flatten(), x, y, torch.rand(2, 13))
    engine.grad(engine.flatten(), x, y)
    engine.grad(engine.flatten(), x, y)
    hvp, grad = _C.profile_stop()
    assert (hvp["walks"], grad["walks"]) == (1, 2)
    assert len(hvp["steps"]) > len(grad["steps"])
    assert _C.profile_stop() == []
