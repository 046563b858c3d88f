# Every fused layer in all four passes: reference against torch.func in float64, cpu and devices against reference, cpu
# float32 by the rule.
from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from branch_flips import branch_flips
from cases import OP_CASES, OpCase, OpInputs, draw_op
from compare import Draw, expect_close, expect_same_bits, float32_rule
from op_runs import RESULTS, by_torch, run

# Float64 rounding is 1e-16 and the longest sums here have 576 terms; |mean| = 100 std and 1/std = 316 lose up to three
# digits each.
RTOL = 1e-10


@cache
def exact(case: OpCase, seed: int) -> dict[str, torch.Tensor]:
    return by_torch(case, draw_op(case, seed), case.function)


@cache
def plain_float32(case: OpCase, seed: int) -> dict[str, torch.Tensor]:
    return by_torch(case, draw_op(case, seed).to(torch.float32), case.plain or case.function)


@cache
def by_reference(case: OpCase, seed: int, dual: bool) -> dict[str, torch.Tensor]:
    return run(case, "reference", draw_op(case, seed), dual)


both_ways = pytest.mark.parametrize("dual", [False, True], ids=["separate", "dual"])
every_case = pytest.mark.parametrize("case", OP_CASES, ids=str)


@both_ways
@every_case
def test_reference_is_torch_func(case, dual):
    pytest.importorskip("fastmaml._C")
    for seed in (0, 1):
        got = by_reference(case, seed, dual)
        for name, expected in exact(case, seed).items():
            expect_close(got[name], expected, RTOL, label=f"{case} {name}")


@both_ways
@every_case
def test_cpu_float64_is_reference(case, dual, cpu):
    got = run(case, "cpu", draw_op(case, 0), dual)
    for name, expected in by_reference(case, 0, dual).items():
        expect_close(got[name], expected, RTOL, label=f"{case} {name}")


@both_ways
@every_case
def test_device_float64_is_reference(case, dual, device):
    got = run(case, device.name, draw_op(case, 0), dual)
    for name, expected in by_reference(case, 0, dual).items():
        expect_close(got[name], expected, RTOL, label=f"{case} {name}")


# The dual pass has kernels of its own for products only; elsewhere it is the same two steps.
BOTH = [
    (case, dual)
    for case in OP_CASES
    for dual in (True, False)
    if dual or "linear" in case.text or "conv2d" in case.text
]


@pytest.mark.parametrize(
    ("case", "dual"), BOTH, ids=lambda v: str(v) if isinstance(v, OpCase) else ("separate", "dual")[v]
)
def test_cpu_float32_keeps_the_rule(case, dual, cpu):
    case = dataclasses.replace(case, tasks=min(case.tasks, 2))  # every draw also costs two runs of torch.func a task

    def draw(seed: int) -> Draw:
        inputs = draw_op(case, seed)
        flips = branch_flips(case.text, inputs.params, inputs.params, inputs.x, inputs.buffers)
        return Draw(
            run(case, "cpu", inputs.to(torch.float32), dual), plain_float32(case, seed), exact(case, seed), flips
        )

    float32_rule(case, draw)


@every_case
def test_shared_parameters_are_copies(case, compiled):
    inputs = draw_op(case, 0)
    copies = OpInputs(**{**inputs.__dict__, "params": inputs.params[:1].expand(case.tasks, -1).contiguous()})
    shared = OpInputs(**{**inputs.__dict__, "params": inputs.params[0]})
    a, b = (run(case, compiled.name, i, True) for i in (copies, shared))
    for name in RESULTS:
        expect_same_bits(b[name], a[name], f"{case} {name}")


@every_case
def test_running_an_op_twice_leaves_no_state(case, compiled):
    # Arenas are kept between calls: a slot read before it is written shows up as the leftovers of another case.
    inputs, other = draw_op(case, 0), draw_op(case, 1)
    first = run(case, compiled.name, inputs, True)
    run(case, compiled.name, other, True)
    again = run(case, compiled.name, inputs, True)
    for name in RESULTS:
        expect_same_bits(again[name], first[name], f"{case} {name}")


def test_batch_norm_over_one_sample_is_its_shift(compiled):
    # torch raises here; the engine defines it: xhat = 0, y = beta, and nothing depends on x (ALGORITHMS section 7).
    case = next(case for case in OP_CASES if case.name == "batch_norm eps 1e-05" and case.input == (13,))
    i = draw_op(case, 0)
    one = OpInputs(i.params, i.params_dot, *(v[:, :1].contiguous() for v in (i.x, i.x_dot, i.dy, i.dy_dot)), i.buffers)
    got = run(case, compiled.name, one, True)
    expect_close(got["y"], one.params[:, None, 13:], 1e-15)
    assert float(got["dx"].abs().max()) == 0.0 and float(got["dx_dot"].abs().max()) == 0.0
