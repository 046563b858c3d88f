# The helper that moves the tests to a GPU, tested with the emulator instead of a GPU.
from __future__ import annotations

import pytest
import torch
from cases import LoopCase, draw_loop
from compare import expect_same_bits
from loop_runs import META_GRADIENT, meta_gradient
from on_device import ON_THE_HOST, OPS, moved_to

import fastmaml as fm
from fastmaml.compiled import loading

_C = pytest.importorskip("fastmaml._C", reason="make build")


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setattr(loading, "load_cuda", lambda: "")
    with moved_to("cpu", "cuda_emulated"):
        yield


def launches() -> int:
    return sum(count for count, _ in _C.emulated_kernels().values())


def test_every_operator_is_taken_along():
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastmaml::")
    }
    assert {*OPS, *ON_THE_HOST} == registered


def test_operators_and_engines_compute_there():
    case = LoopCase("steps=2 momentum=0.9", "conv")
    inputs = draw_loop(case, 0)
    before = launches()
    on_cuda, emulated = (meta_gradient(case, name, inputs) for name in ("cuda", "cuda_emulated"))
    assert launches() > before
    for name in META_GRADIENT:
        expect_same_bits(on_cuda[name], emulated[name], name)
    engine = fm.Engine(fm.models.mlp([2, 5, 3]), "mse", "cuda", precision="tf32")
    x, y = torch.randn(2, 4, 2), torch.randn(2, 4, 3)
    expected = fm.Engine(engine.model, "mse", "reference").grad(engine.flatten(), x, y)[1]
    torch.testing.assert_close(engine.grad(engine.flatten(), x, y)[1], expected, rtol=1e-4, atol=1e-6)


def test_other_backends_stay_where_they_are():
    before = launches()
    fm.Engine(fm.models.mlp([2, 5, 3]), "mse", "cpu").grad(torch.zeros(33), torch.ones(1, 2, 2), torch.ones(1, 2, 3))
    assert launches() == before
