# Products with a Hessian or Gauss-Newton matrix, linearised once. Every backend against plain torch in float64.
from __future__ import annotations

from functools import cache

import oracle
import pytest
import torch
from cases import NETWORK_CASES
from compare import expect_close
from engines import engine, normal, setup
from torch.func import jvp, vjp

import fastmaml as fm
from fastmaml.engine.inputs import Names

RTOL = 1e-9  # as in test_hvp.py

every_network = pytest.mark.parametrize("case", NETWORK_CASES, ids=str)


def gauss_newton(apply, params, x, y, v, loss):
    """J^T L J v of each task, by torch's Jacobian products; L v as double backward through the loss."""
    products = []
    for phi, x_t, y_t, v_t in zip(params, x, y, v):
        z, z_dot = jvp(lambda p: apply(p, x_t), (phi,), (v_t,))  # noqa: B023
        z = z.detach().requires_grad_()
        (dz,) = torch.autograd.grad(loss(z, y_t).mean(), z, create_graph=True)
        (dz_dot,) = torch.autograd.grad(dz, z, z_dot)
        products.append(vjp(lambda p: apply(p, x_t), phi)[1](dz_dot)[0])  # noqa: B023
    return torch.stack(products)


@cache
def given(case):
    s = setup(case)
    return s.theta + 0.05 * normal(case.tasks, s.P, seed=1), [normal(case.tasks, s.P, seed=i) for i in (2, 3)]


@cache
def exact(case, kind: str):
    s, (params, vs) = setup(case), given(case)
    product = {"hessian": oracle.hvp, "gauss_newton": gauss_newton}[kind]
    apply, data = oracle.network(s.model), s.data
    return [s.mask * product(apply, params, data.support_x, data.support_y, s.mask * v, s.loss) for v in vs]


@every_network
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_products_with_one_linearisation(case, backend, kind):
    s, (params, vs) = setup(case), given(case)
    made = engine(case, backend).curvature(
        params, s.data.support_x, s.data.support_y, gauss_newton=kind == "gauss_newton"
    )
    for v, expected in zip(
        (*vs, vs[0]), (*exact(case, kind), exact(case, kind)[0])
    ):  # the first again: nothing is used up
        expect_close(made.product(v), expected, RTOL, label=(case, kind))


def small_policy(tasks: int = 3, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    model = fm.models.mlp([5, 20, 20, 3], activation="tanh").to(dtype)
    x, y = torch.randn(tasks, 9, 5, dtype=dtype), torch.randn(tasks, 9, 3, dtype=dtype)
    return model, x, y, torch.rand(tasks, 9, dtype=dtype)


def test_weights_and_shared_parameters(compiled):
    model, x, y, w = small_policy()
    engine = fm.Engine(model, "mse", compiled.name)
    theta = engine.flatten()
    v = torch.randn(len(x), theta.numel(), dtype=x.dtype)
    hv = engine.hvp(theta, x, y, v, w)
    expect_close(engine.curvature(theta, x, y, w).product(v), hv, RTOL)
    means = engine.forward(theta, x)  # no residual: the two matrices are one
    at_means = engine.curvature(theta, x, means, w, gauss_newton=True)
    expect_close(at_means.product(v), engine.hvp(theta, x, means, v, w), RTOL)


def test_a_loss_in_python_has_both(compiled):
    model, x, y, w = small_policy()
    built_in = fm.Engine(model, "mse", compiled.name)
    own = fm.Engine(model, lambda z, target: (z - target).square().mean(-1), compiled.name)
    theta = built_in.flatten()
    v = torch.randn(len(x), theta.numel(), dtype=x.dtype)
    for matrix in (False, True):
        expected = built_in.curvature(theta, x, y, w, matrix).product(v)
        expect_close(own.curvature(theta, x, y, w, matrix).product(v), expected, RTOL)


def test_float32_keeps_what_the_backend_computes(compiled):
    model, x, y, w = small_policy(dtype=torch.float32)
    engine = fm.Engine(model, "mse", compiled.name)
    theta = engine.flatten()
    v = torch.randn(len(x), theta.numel())
    product = engine.curvature(theta, x, y, w).product(v)
    assert product.dtype == torch.float32
    expect_close(product.double(), engine.hvp(theta, x, y, v, w).double(), 1e-5)


def test_a_task_keeps_its_bits(compiled):
    model, x, y, w = small_policy(tasks=5, dtype=torch.float32)
    engine = fm.Engine(model, "mse", compiled.name)
    theta = engine.flatten()
    v = torch.randn(5, theta.numel())
    together = engine.curvature(theta, x, y, w, gauss_newton=True).product(v)
    alone = engine.curvature(theta, x[3:4], y[3:4], w[3:4], gauss_newton=True).product(v[3:4])
    assert torch.equal(together[3:4], alone)


def test_dropout_is_one_network_for_all_products():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Dropout(), torch.nn.Linear(8, 2)
    ).double()
    engine = fm.Engine(model, "mse", "autodiff")
    x, y = torch.randn(2, 6, 4).double(), torch.randn(2, 6, 2).double()
    theta = engine.flatten()
    v = torch.randn(2, theta.numel()).double()
    for matrix in (False, True):
        curvature = engine.curvature(theta, x, y, gauss_newton=matrix)
        first = curvature.product(v)
        engine.grad(theta, x, y)  # draws masks of its own
        assert torch.equal(curvature.product(v), first)


def test_bytes_are_those_of_the_activations():
    model, x, y, _ = small_policy(dtype=torch.float32)
    engine = fm.Engine(model, "mse", "cpu")
    values = 2 * 9 * 20 * 4 * len(x)  # what two layers hand to tanh; what it makes of them is made again
    held = engine.curvature(engine.flatten(), x, y, gauss_newton=True).bytes
    assert values <= held <= 2 * values


def test_refuses_a_direction_of_another_size():
    model, x, y, _ = small_policy(dtype=torch.float32)
    engine = fm.Engine(model, "mse", "cpu")
    curvature = engine.curvature(engine.flatten(), x, y)
    with pytest.raises(ValueError, match=r"v .*\[2, 5\]"):
        curvature.product(torch.zeros(2, 5))


def test_refuses_a_tape_of_another_matrix():
    model, x, y, _ = small_policy(dtype=torch.float32)
    engine = fm.Engine(model, "mse", "cpu")
    theta, v = engine.flatten(), torch.zeros(3, engine.layout.size)
    program, at = engine.inputs.examples(Names(), x, y, None, theta)
    compiled = engine.choice.compiled(program)
    tape = compiled.linearise(theta, at, gauss_newton=True)
    with pytest.raises(ValueError, match="tape is not what linearise returned"):
        compiled.curvature(theta, at, False, tape, v)
