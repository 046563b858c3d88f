# Tests the oracle itself, against finite differences, closed forms and torch's own layers. No engine code runs here.
from __future__ import annotations

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import CONV4, MAIN_CASES, NETWORK_CASES, OP_CASES, SMOOTH_CASES, build, draw_data, draw_op, flatten, split
from compare import expect_close
from torch import nn


def setup(case, seed=0, **how):
    model = build(case, seed)
    return (
        model,
        oracle.network(model, **how),
        flatten(model),
        draw_data(case, seed),
        oracle.loss_function(case.loss, case.label_smoothing),
    )


def directional_difference(f, at, direction, h=1e-3):
    """Central differences, extrapolated twice (Richardson): error O(h^6), so h can stay large and rounding small."""

    def central(h):
        return (f(at + h * direction) - f(at - h * direction)) / (2 * h)

    a, b, c = central(h), central(h / 2), central(h / 4)
    ab, bc = (4 * b - a) / 3, (4 * c - b) / 3
    return (16 * bc - ab) / 15


@pytest.mark.parametrize("case", SMOOTH_CASES, ids=str)
@pytest.mark.parametrize("inner_steps", [1, 3])
def test_oracle_meta_gradient_meets_finite_differences(case, inner_steps):
    model, apply, theta, data, loss = setup(case)
    generator = torch.Generator().manual_seed(3)
    mask = oracle.trainable(model)
    rates = 0.05 + 0.1 * torch.rand(inner_steps, theta.numel(), generator=generator).double()
    direction = torch.randn(theta.numel(), generator=generator).double() * mask
    direction /= direction.norm()
    rate_direction = torch.randn(rates.shape, generator=generator).double()

    def objective(theta, rates):
        return oracle.meta_gradient(apply, theta, data.tuple, loss, rates, inner_steps, mask=mask).loss.mean()

    exact = oracle.meta_gradient(apply, theta, data.tuple, loss, rates, inner_steps, mask=mask)
    # 1e-8: rounding of the objective (1e-16) over the smallest h (2.5e-4), amplified by the extrapolation
    expect_close(
        (exact.grad * direction).sum(),
        directional_difference(lambda t: objective(t, rates), theta, direction),
        1e-8,
        atol=1e-10,
    )
    numeric = directional_difference(lambda r: objective(theta, r), rates, rate_direction / rate_direction.norm())
    expect_close((exact.rate_grad * rate_direction / rate_direction.norm()).sum(), numeric, 1e-8, atol=1e-10)


def test_oracle_support_statistics_meet_finite_differences():
    # ALGORITHMS section 6 marks this one "not checked numerically"
    case = next(case for case in SMOOTH_CASES if case.name == "residual silu")
    _, apply, theta, data, loss = setup(case, batch_norm="support")
    direction = torch.randn(theta.numel(), generator=torch.Generator().manual_seed(1)).double()
    direction /= direction.norm()

    def run(theta):
        return oracle.meta_gradient(
            apply, theta, data.tuple, loss, torch.full_like(theta, 0.1), 2, support_statistics=True
        )

    expect_close(
        (run(theta).grad * direction).sum(),
        directional_difference(lambda t: run(t).loss.mean(), theta, direction),
        1e-8,
    )


def test_oracle_on_a_quadratic_has_the_closed_form():
    # A linear model with squared error: H is constant, so v_0 = (I - a H)^K q_K and d/da = -sum <g_k, v_{k+1}> can be
    # written down.
    case = next(case for case in NETWORK_CASES if case.name == "linear")
    _, apply, theta, data, loss = setup(case)
    K, a = 4, 0.07
    got = oracle.meta_gradient(apply, theta, data.tuple, loss, torch.full_like(theta, a), K)
    H = oracle.hessian(apply, theta, data.support_x, data.support_y, loss)
    expected, rate = torch.zeros_like(theta), torch.zeros(())
    for t in range(case.tasks):
        one = [v[t : t + 1] for v in data.tuple]
        phi, gradients = theta, []
        for _ in range(K):
            gradients.append(oracle.loss_and_grad(apply, phi, one[0], one[1], loss)[1][0])
            phi = phi - a * gradients[-1]
        v = oracle.loss_and_grad(apply, phi, one[2], one[3], loss)[1][0]
        for g in reversed(gradients):
            rate = rate - (g @ v) / case.tasks
            v = v - a * H[t] @ v
        expected += v / case.tasks
    expect_close(got.grad, expected, 1e-12)  # a few hundred float64 operations
    expect_close(got.rate_grad.sum(), rate, 1e-12)


@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_oracle_without_inner_steps_is_the_plain_gradient(case):
    _, apply, theta, data, loss = setup(case)
    got = oracle.meta_gradient(apply, theta, data.tuple, loss, torch.zeros(1), 0)
    losses, grads = oracle.loss_and_grad(apply, theta, data.query_x, data.query_y, loss)
    expect_close(got.grad, grads.mean(0), 1e-13)
    expect_close(got.loss, losses, 1e-13)


@pytest.mark.parametrize("case", NETWORK_CASES, ids=str)
def test_oracle_hvp_is_the_same_forward_over_reverse(case):
    _, apply, theta, data, loss = setup(case)
    v = torch.randn(case.tasks, theta.numel(), generator=torch.Generator().manual_seed(2)).double()
    twice = oracle.hvp(apply, theta, data.support_x, data.support_y, v, loss)
    for t in range(case.tasks):

        def gradient(phi, t=t):
            return torch.func.grad(lambda phi: loss(apply(phi, data.support_x[t]), data.support_y[t]))(phi)

        _, forward_over_reverse = torch.func.jvp(gradient, (theta,), (v[t],))
        expect_close(twice[t], forward_over_reverse, 1e-12, label=case)  # two orders of the same float64 arithmetic


@pytest.mark.parametrize("case", [case for case in OP_CASES if case.plain is not None], ids=str)
def test_written_out_norms_are_torchs(case):
    inputs = draw_op(case, 0)
    params = split(inputs.params[0], case.params)
    # 1e-12: shift = 100 loses two digits, a constant channel's 1/std = 316 two and a half
    expect_close(case.function(params, inputs.x[0]), case.plain(params, inputs.x[0]), 1e-12, label=case)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_oracle_cross_entropy_is_torchs(smoothing):
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(7, 5, generator=generator).double(), torch.randint(5, (7,), generator=generator)
    loss = oracle.loss_function("cross_entropy", smoothing)
    expect_close(loss(output, target), F.cross_entropy(output, target, label_smoothing=smoothing), 1e-14)
    weights = torch.rand(7, generator=generator).double()
    each = F.cross_entropy(output, target, label_smoothing=smoothing, reduction="none")
    expect_close(loss(output, target, weights), (weights * each).sum(), 1e-14)


def test_oracle_squared_error_is_torchs():
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 7, 3, generator=generator).double()
    expect_close(oracle.loss_function("mse")(output, target), F.mse_loss(output, target), 1e-14)
    weights = torch.full((7,), 1 / 7, dtype=torch.float64)
    expect_close(oracle.loss_function("mse")(output, target, weights), F.mse_loss(output, target), 1e-14)


def test_oracle_network_is_the_model():
    model, apply, theta, data, _ = setup(CONV4)
    plain = oracle.network(model, plain=True)
    expect_close(apply(theta, data.query_x[0]), model.train()(data.query_x[0]), 1e-13)
    expect_close(plain(theta, data.query_x[0]), model.train()(data.query_x[0]), 1e-13)
    frozen = oracle.network(build(CONV4), batch_norm="frozen")
    expect_close(frozen(theta, data.query_x[0]), build(CONV4).eval()(data.query_x[0]), 1e-13)


def test_support_statistics_of_the_query_itself_are_transductive():
    _, support, theta, data, _ = setup(CONV4, batch_norm="support")
    transductive = oracle.network(build(CONV4))
    expect_close(support(theta, data.query_x[0], data.query_x[0]), transductive(theta, data.query_x[0]), 1e-14)
    assert not torch.allclose(support(theta, data.query_x[0], data.support_x[0]), transductive(theta, data.query_x[0]))


@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_expect_close_sees_a_wrong_sign_of_one_entry(case):
    _, _, theta, _, _ = setup(case)
    broken = theta.clone()
    broken[3] *= -1
    with pytest.raises(AssertionError, match=r"worst entry \[3\].*ratio -1\b"):
        expect_close(broken, theta, 1e-8)
    broken[3] = math.nan
    with pytest.raises(AssertionError, match="nan"):
        expect_close(broken, theta, 1e-8)


def test_the_meta_gradient_traps_differ_from_the_oracle():
    # What a plausible wrong engine computes must be far outside every tolerance of this suite: scaling after the
    # Hessian, and FOMAML.
    case = next(case for case in SMOOTH_CASES if case.name == "tanh mlp")
    _, apply, theta, data, loss = setup(case)
    rates = 0.05 + 0.2 * torch.rand(theta.numel(), generator=torch.Generator().manual_seed(0)).double()
    exact = oracle.meta_gradient(apply, theta, data.tuple, loss, rates, 1)
    first_order = oracle.meta_gradient(apply, theta, data.tuple, loss, rates, 1, first_order=True)
    q = oracle.loss_and_grad(apply, exact.params, data.query_x, data.query_y, loss)[1]
    expect_close(first_order.grad, q.mean(0), 1e-13)
    right = (q - oracle.hvp(apply, theta, data.support_x, data.support_y, rates * q, loss)).mean(0)
    wrong = (q - rates * oracle.hvp(apply, theta, data.support_x, data.support_y, q, loss)).mean(0)
    expect_close(right, exact.grad, 1e-12)
    for trap in (wrong, first_order.grad):
        with pytest.raises(AssertionError):
            expect_close(trap, exact.grad, 1e-3)


def test_tied_and_plain_torch_modules_flatten_alike():
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert flatten(tied).numel() == 9 + 3 + 3
