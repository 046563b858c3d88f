"""memory="auto": it takes the mode that the plan says, and no mode changes a bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import fastmaml as fm
from fastmaml.benchmark.cases import META
from fastmaml.benchmark.problem import problem

_C: Any = pytest.importorskip("fastmaml._C")


@pytest.mark.parametrize("name", ["sinusoid-k5", "mlp-k5", "omniglot-t8-k5"])
def test_keeping_and_computing_again_give_the_same_bits(name: str) -> None:
    case = replace(META[name], tasks=2)
    given = problem(case)
    found = {}
    for memory in ("low", "stash", "auto"):
        engine = fm.Engine(given.model, case.loss, "cpu", memory=memory)
        _C.profile_start()
        found[memory] = engine.meta_gradient(engine.flatten(), given.batch, case.inner_lr, case.inner_steps)
        (plan,) = _C.profile_stop()
        assert plan["memory"] == ("stash" if memory == "auto" else memory)
    for field in ("loss", "grad", "inner_lr_grad"):
        assert torch.equal(getattr(found["low"], field), getattr(found["stash"], field))


def test_a_stash_beyond_the_budget_is_not_kept() -> None:
    engine = fm.Engine(fm.models.conv4(filters=64, image_size=112), backend="cpu")
    program = engine.program(torch.zeros(1, 1, 1, 112, 112))
    assert program is not None
    examples = _C.machine_memory() // 2**25  # an image takes more than 16 megabytes

    def costs(memory: str) -> dict[str, Any]:
        sizes = {"support_examples": examples, "query_examples": 5, "loop": "steps=5", "memory": memory}
        return _C.costs(program.text, "meta_gradient", **sizes)

    assert costs("stash")["arena_bytes"] > _C.stash_budget("cpu")
    assert costs("auto")["memory"] == "low"
    assert costs("auto")["arena_bytes"] == costs("low")["arena_bytes"]
