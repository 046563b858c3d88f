"""Which backend runs a model, and the message if it is not the fast one."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from unrolled import BACKENDS, regression_batch, small_mlp

from fastmaml import ANIL, MAML, Engine
from fastmaml.compiled import loading


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.delenv("FASTMAML_BACKEND", raising=False)
    monkeypatch.delenv("FASTMAML_STRICT", raising=False)


@pytest.fixture
def compiled(monkeypatch):
    monkeypatch.setattr(loading, "load_compiled", lambda: "")


def recurrent():
    return nn.Sequential(nn.Identity(), nn.GRU(2, 3))


def test_a_fusable_model_takes_the_cpu_backend(compiled, caplog):
    made = Engine(small_mlp(), "mse")
    assert (made.backend, made.fused, made.why) == ("cpu", True, "")
    assert caplog.text == ""


def test_what_is_not_fused_falls_back_with_one_line_that_names_the_layer(compiled, caplog):
    made = Engine(recurrent())
    assert (made.backend, made.fused) == ("autodiff", False)
    assert made.why == "layer '1' (GRU) is not one of the fused layers"
    assert [(r.name, r.levelno) for r in caplog.records] == [("fastmaml", logging.WARNING)]
    assert caplog.messages == ["Sequential runs on autodiff: layer '1' (GRU) is not one of the fused layers"]


def test_strict_raises_instead_of_falling_back(compiled, monkeypatch):
    monkeypatch.setenv("FASTMAML_STRICT", "1")
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run Sequential: layer '1' \(GRU\) is not one of"):
        Engine(recurrent())
    assert Engine(recurrent(), backend="autodiff").backend == "autodiff"


def test_a_backend_that_is_named_does_not_fall_back(compiled):
    with pytest.raises(ValueError, match="backend 'reference' cannot run Sequential: layer '1'"):
        Engine(recurrent(), backend="reference")


def test_the_environment_stands_in_for_auto_only(compiled, monkeypatch):
    monkeypatch.setenv("FASTMAML_BACKEND", "autodiff")
    assert Engine(small_mlp(), "mse").backend == "autodiff"
    assert Engine(small_mlp(), "mse", "reference").backend == "reference"
    monkeypatch.setenv("FASTMAML_BACKEND", "fast")
    with pytest.raises(
        ValueError, match="backend 'fast' is not one of auto, cpu, reference, autodiff, cuda, cuda_emulated"
    ):
        Engine(small_mlp(), "mse")


def test_cuda_says_what_it_lacks_here(compiled, monkeypatch):
    monkeypatch.setattr(loading, "load_cuda", lambda: "no CUDA driver on this machine")
    with pytest.raises(ValueError, match="backend 'cuda' cannot run Sequential: no CUDA driver on this machine"):
        Engine(small_mlp(), "mse", "cuda")
    monkeypatch.setattr(loading, "load_cuda", lambda: "")
    with pytest.raises(ValueError, match="the model is on cpu and backend 'cuda' computes on a CUDA device"):
        Engine(small_mlp(), "mse", "cuda")


def test_precision_is_one_of_the_known_and_for_cuda(compiled):
    assert Engine(small_mlp(), "mse", "cuda_emulated", precision="tf32").precision == "tf32"
    with pytest.raises(ValueError, match="precision 'half' is not one of float32, tf32"):
        Engine(small_mlp(), "mse", precision="half")
    with pytest.raises(ValueError, match="precision 'tf32' is for the backends cuda and cuda_emulated, not 'cpu'"):
        Engine(small_mlp(), "mse", "cpu", precision="tf32")


@pytest.mark.parametrize("learner", [MAML, ANIL])
def test_what_auto_allows_on_a_device_changes_nothing_on_the_cpu(learner):
    batch = regression_batch()
    allowed, plain = (learner(small_mlp(), 0.1, 2, "mse", precision=p)(*batch).loss for p in ("tf32", "float32"))
    assert torch.equal(allowed, plain)


def test_without_the_compiled_module_autodiff_runs_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(loading, "load_compiled", lambda: "the compiled module is not available: no compiler was found")
    made = Engine(small_mlp(), "mse")
    assert made.backend == "autodiff"
    assert caplog.messages == [
        "Sequential runs on autodiff: the compiled module is not available: no compiler was found"
    ]


def test_a_model_on_another_device_runs_on_autodiff(compiled):
    made = Engine(small_mlp().to("meta"), "mse")
    assert made.why == "the model is on meta and backend 'cpu' computes on the CPU"
    with pytest.raises(ValueError, match="cannot run Sequential: the model is on meta"):
        Engine(small_mlp().to("meta"), "mse", "cpu")


def test_a_shape_that_is_not_fused_falls_back_at_the_first_call(compiled, caplog):
    made = Engine(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)).double())
    assert made.fused
    theta = made.flatten()
    x = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    loss, _ = made.grad(theta, x, torch.zeros(2, 5, dtype=torch.int64))
    assert loss.shape == (2,)
    assert not made.fused
    assert made.why == "examples [2, 3] are neither [features] nor [channels, height, width]"
    assert len(caplog.messages) == 1


def test_half_precision_is_refused_by_the_kernels(compiled):
    made = Engine(small_mlp().half(), "mse")
    x = torch.zeros(1, 2, 1, dtype=torch.float16)
    with pytest.raises(ValueError, match="the parameters are torch.float16; backend 'cpu' takes float32 or float64"):
        made.grad(made.flatten(), x, x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))], ids=["deepcopy", "pickle"])
def test_an_engine_can_be_copied(copied, backend):
    made, batch = Engine(small_mlp(), "mse", backend), regression_batch()
    theta = made.flatten()
    expected = made.meta_gradient(theta, batch, 0.1, 2).grad
    again = copied(made)
    assert again.model is not made.model
    assert torch.equal(again.meta_gradient(theta, batch, 0.1, 2).grad, expected)


def test_the_engine_says_what_it_is():
    assert repr(Engine(small_mlp(), "mse", "autodiff")) == (
        "Engine(Sequential, loss='mse', backend='autodiff', batch_norm='transductive', parameters=78)"
    )


def test_import_takes_milliseconds_beyond_torch():
    code = (
        "import torch, time; t = time.perf_counter(); import fastmaml; s = time.perf_counter() - t; import sys;"
        "loaded = [m for m in ('fastmaml._C', 'fastmaml.tasks', 'matplotlib', 'PIL') if m in sys.modules];"
        "assert not loaded, loaded; assert s < 0.5, s; fastmaml.tasks, fastmaml.models, fastmaml.algorithms"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
