# Engines take numpy and cupy arrays instead of tensors, and return the same type.
from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from unrolled import regression_batch, small_mlp

from fastmaml import Engine
from fastmaml.engine.inputs import Inputs


@pytest.fixture
def engine() -> Engine:
    return Engine(small_mlp().double(), "mse", "autodiff")


def arrays(batch):
    return tuple(t.double().numpy() for t in batch)


def test_numpy_in_numpy_out_with_the_same_numbers(engine):
    theta, batch = engine.flatten(), tuple(t.double() for t in regression_batch())
    tensors = engine.meta_gradient(theta, batch, 0.1, 2)
    found = engine.meta_gradient(theta.numpy(), arrays(batch), inner_lr=0.1, inner_steps=2)
    for name in ("loss", "grad", "query_output", "inner_lr_grad", "support_losses", "query_losses"):
        value = getattr(found, name)
        assert isinstance(value, np.ndarray), name
        np.testing.assert_array_equal(value, getattr(tensors, name).numpy(), err_msg=name)
    x, y = arrays(batch)[:2]
    v = np.ones((x.shape[0], theta.numel()))
    for result in (
        *engine.grad(theta.numpy(), x, y),
        engine.hvp(theta.numpy(), x, y, v),
        engine.adapt(theta.numpy(), x, y, 0.1, 2),
        engine.forward(theta.numpy(), x),
        *engine.solve(theta.numpy(), x, y, v, 2.0, 3),
        *engine.adapt_with(theta.numpy(), x, y, 0.1, 2)[:2],
    ):
        assert isinstance(result, np.ndarray)
    assert all(isinstance(part, np.ndarray) for part in engine.unflatten(theta.numpy()).values())


def test_the_first_argument_decides_the_kind(engine):
    theta, batch = engine.flatten(), tuple(t.double() for t in regression_batch())
    assert isinstance(engine.meta_gradient(theta, arrays(batch), 0.1).grad, torch.Tensor)
    assert isinstance(engine.meta_gradient(theta.numpy(), batch, 0.1).grad, np.ndarray)


def test_no_copies_are_made(engine, monkeypatch):
    seen = []
    monkeypatch.setattr(Inputs, "parameters", lambda self, name, params: seen.append(params) or params.detach())
    theta, (x, *_) = engine.flatten().numpy(), arrays(regression_batch())
    engine.forward(theta, x)
    assert seen[0].data_ptr() == theta.ctypes.data


def test_views_that_torch_lacks_are_copied(engine):
    theta, (x, y, *_) = engine.flatten().numpy(), arrays(regression_batch())
    expected = engine.grad(theta, x[:, ::-1].copy(), y[:, ::-1].copy())
    x, y = x[:, ::-1], y[:, ::-1]
    theta.flags.writeable = False
    for found, value in zip(engine.grad(theta, x, y), expected):
        np.testing.assert_array_equal(found, value)


def test_what_does_not_fit_is_one_sentence(engine):
    theta, (x, y, *_) = engine.flatten().numpy(), arrays(regression_batch())
    with pytest.raises(TypeError, match="arrays of object are not supported"):
        engine.grad(theta, x.astype(object), y)
    with pytest.raises(ValueError, match=r"is torch.float32 but the parameters are torch.float64"):
        engine.grad(theta, x.astype(np.float32), y)


class FakeCupyArray:
    """What cupy offers of an array for interchange, with the host's memory behind it: this machine has no GPU."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __dlpack__(self, **how):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_cupy_goes_both_ways_through_dlpack(engine, monkeypatch):
    fake = types.ModuleType("cupy")
    fake.ndarray = FakeCupyArray
    fake.from_dlpack = lambda tensor: FakeCupyArray(np.from_dlpack(tensor))
    monkeypatch.setitem(sys.modules, "cupy", fake)
    theta, batch = engine.flatten(), tuple(t.double() for t in regression_batch())
    expected = engine.meta_gradient(theta, batch, 0.1, 2)
    found = engine.meta_gradient(
        FakeCupyArray(theta.numpy()), tuple(FakeCupyArray(a) for a in arrays(batch)), inner_lr=0.1, inner_steps=2
    )
    assert isinstance(found.grad, FakeCupyArray)
    np.testing.assert_array_equal(found.grad.array, expected.grad.numpy())
    np.testing.assert_array_equal(found.loss.array, expected.loss.numpy())
