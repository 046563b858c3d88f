# forward, grad and hvp of whole networks on every backend against double backward in float64.
from __future__ import annotations

from functools import cache

import oracle
import pytest
from cases import NETWORK_CASES
from compare import expect_close
from engines import engine, normal, setup

RTOL = 1e-9  # float64, four layers deep; batch norms over few samples amplify rounding by up to 1/std = 316 each

every_network = pytest.mark.parametrize("case", NETWORK_CASES, ids=str)


def per_task(case):
    s = setup(case)
    return s.theta + 0.05 * normal(case.tasks, s.P, seed=1), normal(case.tasks, s.P, seed=2)


@cache
def exact(case):
    s, (params, v) = setup(case), per_task(case)
    apply = oracle.network(s.model)
    loss, grad = oracle.loss_and_grad(apply, params, s.data.support_x, s.data.support_y, s.loss)
    hv = oracle.hvp(apply, params, s.data.support_x, s.data.support_y, s.mask * v, s.loss)
    return loss, s.mask * grad, s.mask * hv  # rows and columns of frozen parameters are zero


@every_network
def test_forward_is_the_model(case, backend):
    s, (params, _) = setup(case), per_task(case)
    apply = oracle.network(s.model)
    output = engine(case, backend).forward(params, s.data.query_x)
    for t in range(case.tasks):
        expect_close(output[t], apply(params[t], s.data.query_x[t]), RTOL, label=case)


@every_network
def test_grad_is_double_backwards_first_half(case, backend):
    s, (params, _) = setup(case), per_task(case)
    loss, grad = engine(case, backend).grad(params, s.data.support_x, s.data.support_y)
    expect_close(loss, exact(case)[0], RTOL, label=case)
    expect_close(grad, exact(case)[1], RTOL, label=case)


@every_network
def test_hvp_is_double_backward(case, backend):
    s, (params, v) = setup(case), per_task(case)
    expect_close(
        engine(case, backend).hvp(params, s.data.support_x, s.data.support_y, v), exact(case)[2], RTOL, label=case
    )


@every_network
def test_shared_parameters_are_copies(case, compiled):
    s, (_, v) = setup(case), per_task(case)
    made, x, y = engine(case, compiled), s.data.support_x, s.data.support_y
    copies = s.theta.expand(case.tasks, -1).contiguous()
    expect_close(
        made.hvp(s.theta, x, y, v), made.hvp(copies, x, y, v), 0.0, label=case
    )  # the same arithmetic: the same bits
    expect_close(made.grad(s.theta, x, y)[1], made.grad(copies, x, y)[1], 0.0, label=case)
