# One rate for all parameters, against a vector that repeats the rate. The engine takes another path to the same results.
from __future__ import annotations

import torch
from compare import expect_close

import fastmaml as fm

STEPS = 3


def expect_the_results_of_a_vector(
    engine: fm.Engine, batch: tuple[torch.Tensor, ...], per_step: bool, layout: str, how: dict[str, object]
) -> None:
    """In float64, with three inner steps of one rate or of one each; layout: of tasks, as _C.set_cpu_layout names it."""
    from fastmaml import _C

    theta = engine.flatten()
    one = torch.tensor([[0.3], [0.2], [0.1]], dtype=torch.float64) if per_step else 0.3
    vector = (one if per_step else torch.tensor([[one]], dtype=torch.float64)).expand(-1, len(theta)).contiguous()
    _C.set_cpu_layout(layout)
    try:
        found, expected = (
            engine.meta_gradient(theta, batch, lr, STEPS, inner_lr_grad=False, **how) for lr in (one, vector)
        )
    finally:
        _C.set_cpu_layout("auto")
    for name in ("loss", "grad", "query_output", "support_losses"):
        expect_close(getattr(found, name), getattr(expected, name), 1e-12, name)
