# memory="low": the arena of a meta-gradient grows only by the K - 1 further phi[k], and is allocated once.
from __future__ import annotations

import pytest
import torch
from cases import CONV4, LAYER_NORM, MLP, RESIDUAL, flatten
from engines import engine, setup
from test_meta_gradient import program_of

import fastmaml as fm

CASES = [MLP, CONV4, LAYER_NORM, RESIDUAL]


def planned(
    what: str, program: str, inner_steps: int, backend: str = "cpu", real_bytes: int = 4, memory: str = "low", **how
) -> int:
    from fastmaml import _C

    loop = f"steps={inner_steps}" + (" rate_grad=1" if how.pop("rate_grad", False) else "")
    how = {"support_examples": 5, "query_examples": 15, **how}
    function = getattr(_C, what)
    return function(program, "meta_gradient", backend=backend, real_bytes=real_bytes, loop=loop, memory=memory, **how)


def arena_bytes(program: str, inner_steps: int, *args, **how) -> int:
    """Of one worker."""
    return planned("arena_bytes", program, inner_steps, *args, **how)


def tasks_in_flight(program: str, *args, **how) -> int:
    """Of one worker: small networks of the CPU go side by side."""
    return planned("lanes", program, 1, *args, **how)


def slot(elements: int, real_bytes: int) -> int:
    """Slots start on cache lines."""
    return -(-elements * real_bytes // 64) * 64


@pytest.mark.parametrize("real_bytes", [4, 8])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_low_memory_grows_by_phi_alone(case, real_bytes, compiled):
    program, P = program_of(engine(case, compiled), case), setup(case).P
    if compiled.name == "reference":
        real_bytes = 8
    sizes = {K: arena_bytes(program, K, compiled.name, real_bytes) for K in (1, 2, 5, 20)}
    phi = slot(P, real_bytes) * tasks_in_flight(program, compiled.name, real_bytes)
    # A tiny network's K = 1 leaves a gap that the second phi can partly use, so "at most" there; from then on to the byte.
    assert sizes[2] - sizes[1] <= phi, sizes
    for K in (5, 20):
        assert sizes[K] - sizes[2] == (K - 2) * phi, sizes


def test_the_papers_conv4_grows_by_phi_alone(cpu):
    # Omniglot 5-way 1-shot: 64 filters, 28 x 28, P = 112,261. The plan alone says so; nothing runs.
    model = fm.models.conv4(in_channels=1, ways=5, filters=64, image_size=28)
    P = flatten(model).numel()
    assert P == 112_261
    program = fm.Engine(model, backend="cpu")._program("x", torch.zeros(1, 5, 1, 28, 28), torch.zeros(P)).text
    sizes = {K: arena_bytes(program, K, query_examples=75) for K in (1, 5, 20)}
    assert sizes[5] - sizes[1] == 4 * slot(P, 4) and sizes[20] - sizes[1] == 19 * slot(P, 4), sizes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_exact_rate_gradient_costs_no_memory_per_step(case, cpu):
    # "low" computes g_k again in the sweep instead of keeping K of them.
    program, P = program_of(engine(case, cpu), case), setup(case).P
    grown = arena_bytes(program, 20, rate_grad=True) - arena_bytes(program, 2, rate_grad=True)
    assert grown == 18 * slot(P, 4) * tasks_in_flight(program)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stash_keeps_the_activations_of_every_step(case, cpu):
    # The other side of the trade, and the proof that the tests above can fail.
    program, P = program_of(engine(case, cpu), case), setup(case).P
    grown = arena_bytes(program, 5, memory="stash") - arena_bytes(program, 1, memory="stash")
    assert grown > 4 * slot(P, 4) + 4 * 5 * 4 * case.outputs


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_high_water_mark_is_what_the_plan_said(case, cpu):
    from fastmaml import _C

    s, made = setup(case), engine(case, cpu, memory="low")
    program, batch = program_of(made, case), s.batch(torch.float32)
    how = {"support_examples": case.support, "query_examples": case.query, "rate_grad": True}
    for inner_steps in (1, 5, 20):
        _C.release_memory()
        assert _C.high_water() == 0
        made.meta_gradient(s.theta.float(), batch, inner_lr=case.inner_lr, inner_steps=inner_steps)
        assert _C.high_water() == arena_bytes(program, inner_steps, **how)


@pytest.mark.parametrize("memory", ["low", "stash"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_allocated_after_the_first_call(case, memory, compiled, threads):
    from fastmaml import _C

    if compiled.name.startswith("cuda"):
        pytest.skip("a device's memory is torch's")
    s, made = setup(case), engine(case, compiled, memory=memory)
    for count in (1, 2):
        torch.set_num_threads(count)
        _C.release_memory()
        assert _C.allocations() == 0
        made.meta_gradient(s.theta, s.batch(), inner_lr=case.inner_lr, inner_steps=5)
        before = _C.allocations()
        assert before > 0, "the counter counts"
        for inner_steps in (5, 1, 3):
            made.meta_gradient(s.theta, s.batch(), inner_lr=case.inner_lr, inner_steps=inner_steps)
        assert _C.allocations() == before, f"{count} threads"
