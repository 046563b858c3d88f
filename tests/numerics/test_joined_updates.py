# Plain descent with one rate on linear layers: the weight gradients include the updates (plan/fuse_updates.cpp).
# The results equal those of a vector of equal rates, whose updates are separate.
from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from equal_rates import expect_the_results_of_a_vector
from torch import nn

import fastmaml as fm

SHAPES = {  # widths, support examples, query examples
    "odd": ((7, 50, 3), 6, 5),
    "packed": ((130, 200, 33, 5), 5, 75),  # a weight gradient by way of copies
    "blocks": ((9, 64, 4), 140, 3),  # more examples than are summed at a time
}


def problem(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    widths, support, query = SHAPES[name]
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).double()
    x = torch.rand(3, support + query, widths[0], dtype=torch.float64) - 0.5
    y = torch.randint(widths[-1], (3, support + query))
    return model, (x[:, :support], y[:, :support], x[:, support:], y[:, support:])


def ops_of(engine: fm.Engine, batch: tuple[torch.Tensor, ...], loop: str, uniform_rate: bool, memory: str) -> set[str]:
    from fastmaml import _C

    program = engine.program(batch[0])
    assert program is not None
    sizes = {"real_bytes": 8, "support_examples": batch[0].shape[1], "query_examples": batch[2].shape[1]}
    steps = _C.costs(program.text, "meta_gradient", loop=loop, uniform_rate=uniform_rate, memory=memory, **sizes)[
        "steps"
    ]
    return {step["op"] for step in steps}


@pytest.mark.parametrize("memory", ["low", "stash"])
@pytest.mark.parametrize("per_step", [False, True], ids=["one rate", "a rate a step"])
@pytest.mark.parametrize("how", [{}, {"truncate": 1}, {"first_order": True}], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_have_the_results_of_updates_that_stand_alone(name, how, per_step, memory, compiled):
    if compiled.name == "cuda_emulated" and name != "odd":
        pytest.skip("a device joins nothing: its plan is the same for all sizes")
    model, batch = problem(name)
    engine = fm.Engine(model, "cross_entropy", compiled.name, memory=memory)
    expect_the_results_of_a_vector(engine, batch, per_step, "tasks", how)


def test_are_joined_where_one_rate_is_known(cpu):
    from fastmaml import _C

    model, batch = problem("packed")
    engine = fm.Engine(model, "cross_entropy", "cpu")
    _C.set_cpu_layout("tasks")
    try:
        for memory in ("low", "stash"):
            joined = ops_of(engine, batch, "steps=2", True, memory)
            assert {"linear_update", "linear_adjoint"} <= joined and "uniform_update" not in joined
            assert not ops_of(engine, batch, "steps=2", False, memory) & {"linear_update", "linear_adjoint"}
            assert not ops_of(engine, batch, "steps=2 momentum=0.9", True, memory) & {"linear_update", "linear_adjoint"}
    finally:
        _C.set_cpu_layout("auto")
