# One rate for all parameters goes to the engine as one number. The sweep then uses lambda itself as direction. The
# meta-gradient equals that of a vector of rates, up to rounding.
from __future__ import annotations

import pytest
import torch
from equal_rates import expect_the_results_of_a_vector
from torch import nn

import fastmaml as fm


def problem() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 50), nn.LayerNorm(50), nn.ReLU(), nn.Linear(50, 3)).double()
    x, y = torch.rand(3, 11, 7, dtype=torch.float64), torch.rand(3, 11, 3, dtype=torch.float64)
    return model, (x[:, :6], y[:, :6], x[:, 6:], y[:, 6:])


@pytest.mark.parametrize("memory", ["low", "stash"])
@pytest.mark.parametrize("layout", ["tasks", "lanes"])
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("how", [{}, {"truncate": 1}, {"first_order": True}], ids=str)
def test_is_the_vector_of_equal_rates(how, per_step, layout, memory, compiled):
    model, batch = problem()
    expect_the_results_of_a_vector(fm.Engine(model, "mse", compiled.name, memory=memory), batch, per_step, layout, how)


def test_the_plan_reads_no_rates(cpu):
    from fastmaml import _C

    model, batch = problem()
    engine = fm.Engine(model, "mse", "cpu")
    program = engine.program(batch[0])
    assert program is not None
    sizes = {"real_bytes": 8, "support_examples": 6, "query_examples": 5}
    for loop, uniform in (("steps=2", True), ("steps=2 momentum=0.9", False), ("steps=2 rate_grad=1", False)):
        steps = _C.costs(program.text, "meta_gradient", loop=loop, uniform_rate=True, **sizes)["steps"]
        ops = {step["op"] for step in steps}
        assert ("uniform_update" in ops) == uniform
        assert not (uniform and ops & {"sgd_update", "scale_by_rate", "sgd_adjoint"})
