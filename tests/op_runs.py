# One OpCase through the compiled four passes, and through the oracle.
from __future__ import annotations

import oracle
import torch
from cases import OpCase, OpInputs, split

RESULTS = ("y", "y_dot", "dx", "dx_dot", "dparams", "dparams_dot")


def run(case: OpCase, backend: str, inputs: OpInputs, dual: bool) -> dict[str, torch.Tensor]:
    i = inputs
    results = torch.ops.fastmaml.passes(
        case.text, backend, dual, i.params, i.params_dot, i.x, i.x_dot, i.dy, i.dy_dot, i.buffers
    )
    return dict(zip(RESULTS, results, strict=True))


def by_torch(case: OpCase, inputs: OpInputs, function) -> dict[str, torch.Tensor]:
    buffers = split(inputs.buffers, [(size,) for size in case.buffers])
    tasks = []
    for t in range(case.tasks):
        params, params_dot = (split(p[t], case.params) for p in (inputs.params, inputs.params_dot))
        tasks.append(
            oracle.passes(
                lambda p, x: function([*p, *buffers], x),
                params,
                params_dot,
                inputs.x[t],
                inputs.x_dot[t],
                inputs.dy[t],
                inputs.dy_dot[t],
            )
        )
    return {name: torch.stack(result) for name, result in zip(RESULTS, zip(*tasks, strict=True), strict=True)}
