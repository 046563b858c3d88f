# The batch norm modes against an explicit torch implementation (oracle.WrittenBatchNorm): meta-gradient and forward.
from __future__ import annotations

import copy

import oracle
import pytest
import torch
from cases import NETWORK_CASES
from compare import expect_close
from engines import engine, exact, setup

import fastmaml as fm

RTOL = 1e-8  # as test_meta_gradient
NAMES = ("conv4", "batch norm mlp", "strided conv net", "residual", "leaky avg pool net", "norms first")
CASES = [case for case in NETWORK_CASES if case.name in NAMES]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
@pytest.mark.parametrize("mode", ["transductive", "support", "frozen"])
@pytest.mark.parametrize("inner_steps", [0, 1, 3])
def test_meta_gradient_in_every_mode(case, mode, inner_steps, backend):
    s = setup(case)
    expected = exact(case, inner_steps, batch_norm=mode)
    for memory in ("low", "stash"):
        got = engine(case, backend, batch_norm=mode, memory=memory).meta_gradient(
            s.theta, s.batch(), inner_lr=case.inner_lr, inner_steps=inner_steps
        )
        for name in ("loss", "grad", "query_output", "support_losses"):
            expect_close(getattr(got, name), getattr(expected, name), RTOL, f"{case} {mode} {memory} {name}")


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_the_modes_differ(case, backend):
    # Otherwise the test above would pass for an engine that ignores the mode.
    s = setup(case)
    results = [
        engine(case, backend, batch_norm=mode)
        .meta_gradient(s.theta, s.batch(), inner_lr=case.inner_lr, inner_steps=1)
        .grad
        for mode in ("transductive", "support", "frozen")
    ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert float((results[i] - results[j]).norm() / results[i].norm()) > 1e-2


def test_the_gradient_flows_through_the_support_statistics(backend):
    case = CASES[0]
    s = setup(case)
    got = (
        engine(case, backend, batch_norm="support")
        .meta_gradient(s.theta, s.batch(), inner_lr=case.inner_lr, inner_steps=1)
        .grad
    )
    detached = oracle.network(s.model, "support", detach_stats=True)
    rates = torch.full((s.P,), case.inner_lr, dtype=torch.float64)
    without = oracle.meta_gradient(detached, s.theta, s.data.tuple, s.loss, rates, 1, support_statistics=True).grad
    assert float((got - without).norm() / got.norm()) > 1e-2


@every_case
def test_support_mode_ignores_the_other_query_examples(case, backend):
    # Non-transductive means: an image's output is the same alone and among others.
    s = setup(case)
    made = engine(case, backend, batch_norm="support")
    x, y, qx, qy = s.data.tuple
    whole = made.meta_gradient(s.theta, fm.TaskBatch(x, y, qx, qy), inner_lr=case.inner_lr, inner_steps=1).query_output
    alone = made.meta_gradient(
        s.theta, fm.TaskBatch(x, y, qx[:, :1], qy[:, :1]), inner_lr=case.inner_lr, inner_steps=1
    ).query_output
    expect_close(alone[:, 0], whole[:, 0], 1e-12, case)  # other tiles may sum in another order


@every_case
def test_frozen_mode_reads_the_running_statistics_of_now(case, backend):
    s = setup(case)
    model = copy.deepcopy(s.model)
    made = fm.Engine(model, loss=case.loss, backend=backend.name, batch_norm="frozen")
    before = made.forward(s.theta, s.data.query_x)
    expect_close(before[0], model.eval()(s.data.query_x[0]), 1e-12, case)
    for module in model.modules():
        if hasattr(module, "running_var") and module.running_var is not None:
            module.running_var.mul_(1.5)
    after = made.forward(s.theta, s.data.query_x)
    expect_close(after[0], model.eval()(s.data.query_x[0]), 1e-12, case)
    assert float((after - before).abs().max()) > 1e-3
