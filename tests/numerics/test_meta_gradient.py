# The exact meta-gradient on every backend against unrolled double backward in float64.
from __future__ import annotations

import oracle
import pytest
import torch
from cases import CONV4, LAYER_NORM, MAIN_CASES, MLP, NETWORK_CASES, SINE
from compare import expect_close
from engines import engine, exact, normal, rates, setup

RTOL = 1e-8  # five inner steps amplify float64 rounding by the norm of prod (I - a H): observed below 1e-11

main = pytest.mark.parametrize("case", MAIN_CASES, ids=str)
others = pytest.mark.parametrize("case", [case for case in NETWORK_CASES if case not in MAIN_CASES], ids=str)


def expect_result(got, expected: oracle.Result, label) -> None:
    expect_close(got.loss, expected.loss, RTOL, f"{label} loss")
    expect_close(got.query_output, expected.query_output, RTOL, f"{label} query_output")
    expect_close(got.support_losses, expected.support_losses, RTOL, f"{label} support_losses")
    expect_close(got.grad, expected.grad, RTOL, f"{label} grad")


@main
@pytest.mark.parametrize("memory", ["low", "stash"])
@pytest.mark.parametrize("inner_steps", [0, 1, 2, 5])
def test_meta_gradient_is_unrolled_double_backward(case, inner_steps, memory, backend):
    s = setup(case)
    got = engine(case, backend, memory=memory).meta_gradient(
        s.theta, s.batch(), inner_lr=case.inner_lr, inner_steps=inner_steps
    )
    expected = exact(case, inner_steps)
    expect_result(got, expected, case)
    expect_close(
        got.inner_lr_grad, expected.rate_grad.sum() if inner_steps else torch.zeros(()), RTOL, f"{case} inner_lr_grad"
    )


@others
def test_meta_gradient_of_other_networks(case, backend):
    s = setup(case)
    got = engine(case, backend).meta_gradient(s.theta, s.batch(), inner_lr=rates(case, True), inner_steps=2)
    expected = exact(case, 2, per_parameter=True)
    expect_result(got, expected, case)
    # inner_lr_grad of a parameter that is not adapted is zero
    expect_close(got.inner_lr_grad, expected.rate_grad.sum(0) * s.mask, RTOL, f"{case} inner_lr_grad")


@main
@pytest.mark.parametrize("memory", ["low", "stash"])
def test_first_order_drops_the_hessian_only(case, memory, backend):
    s = setup(case)
    made = engine(case, backend, memory=memory)
    got = made.meta_gradient(s.theta, s.batch(), inner_lr=rates(case, True), inner_steps=3, first_order=True)
    expected = exact(case, 3, per_parameter=True, first_order=True)
    expect_result(got, expected, case)
    expect_close(got.inner_lr_grad, expected.rate_grad.sum(0), RTOL, f"{case} inner_lr_grad")


RATE_FORMS = {
    "number": lambda s, a: (0.07, torch.full((s.P,), 0.07), None),
    "0-d tensor": lambda s, a: (torch.tensor(0.07).double(), torch.full((s.P,), 0.07), None),
    "per parameter": lambda s, a: (a, a, None),
    "dict of numbers": lambda s, a: per_tensor(s, a, lambda i, part: 0.02 * (i + 1)),
    "dict of tensors": lambda s, a: per_tensor(s, a, lambda i, part: part.clone()),
    "mixed dict": lambda s, a: per_tensor(s, a, lambda i, part: 0.05 if i % 2 else part.clone()),
}


def per_tensor(s, a, choose):
    form, flat, at = {}, [], 0
    for i, (name, p) in enumerate(s.model.named_parameters()):
        form[name] = choose(i, a[at : at + p.numel()].view(p.shape))
        flat.append(torch.as_tensor(form[name], dtype=torch.float64).expand(p.shape).reshape(-1))
        at += p.numel()
    return form, torch.cat(flat), form


@pytest.mark.parametrize("case", [MLP, CONV4], ids=str)
@pytest.mark.parametrize("form", RATE_FORMS)
def test_rates_of_every_form_and_their_exact_gradient(case, form, backend):
    s = setup(case)
    inner_lr, flat, as_dict = RATE_FORMS[form](s, rates(case, True))
    got = engine(case, backend).meta_gradient(s.theta, s.batch(), inner_lr=inner_lr, inner_steps=2)
    expected = oracle.meta_gradient(oracle.network(s.model), s.theta, s.data.tuple, s.loss, flat.double(), 2)
    expect_result(got, expected, case)
    per_parameter = expected.rate_grad.sum(0)
    if as_dict is None:
        wanted = per_parameter if form == "per parameter" else per_parameter.sum()
        expect_close(got.inner_lr_grad, wanted, RTOL, f"{case} inner_lr_grad")
        return
    assert got.inner_lr_grad.keys() == as_dict.keys()
    scale, at = float(per_parameter.abs().max()), 0
    for name, p in s.model.named_parameters():
        part = per_parameter[at : at + p.numel()].view(p.shape)
        at += p.numel()
        wanted = part.sum() if not isinstance(inner_lr[name], torch.Tensor) else part
        # atol: the bias before a batch norm has a zero gradient, computed as rounding
        expect_close(
            torch.as_tensor(got.inner_lr_grad[name]),
            wanted,
            RTOL,
            f"{case} inner_lr_grad of {name}",
            atol=1e-12 * scale,
        )


@pytest.mark.parametrize("case", [MLP, CONV4], ids=str)
@pytest.mark.parametrize("memory", ["low", "stash"])
def test_rates_per_step_have_a_gradient_per_step(case, memory, backend):
    s, K = setup(case), 3
    a = torch.stack([rates(case, True) * (k + 1) / K for k in range(K)])
    got = engine(case, backend, memory=memory).meta_gradient(s.theta, s.batch(), inner_lr=a, inner_steps=K)
    expected = oracle.meta_gradient(oracle.network(s.model), s.theta, s.data.tuple, s.loss, a, K)
    expect_result(got, expected, case)
    expect_close(got.inner_lr_grad, expected.rate_grad, RTOL)


def program_of(made, case) -> str:
    """The Program text that the Engine runs for examples of the case's shape."""
    s = setup(case)
    return made.program(s.data.support_x).text


@main
def test_weights_of_examples_and_tasks(case, backend):
    s = setup(case)
    generator = torch.Generator().manual_seed(4)
    weights = {
        "support_weights": torch.rand(case.tasks, case.support, generator=generator).double(),
        "query_weights": torch.rand(case.tasks, case.query, generator=generator).double(),
        "task_weights": torch.rand(case.tasks, generator=generator).double() - 0.3,
    }
    weights["support_weights"][:, 1] = 0  # masked padding
    for memory in ("low", "stash"):
        got = engine(case, backend, memory=memory).meta_gradient(
            s.theta, s.batch(), inner_lr=case.inner_lr, inner_steps=2, **weights
        )
        expected = oracle.meta_gradient(
            oracle.network(s.model), s.theta, s.data.tuple, s.loss, rates(case), 2, **weights
        )
        expect_result(got, expected, f"{case} {memory}")
        expect_close(got.inner_lr_grad, expected.rate_grad.sum(), RTOL, f"{case} inner_lr_grad")


@pytest.mark.parametrize("case", [*MAIN_CASES, SINE], ids=str)
@pytest.mark.parametrize("inner_steps", [0, 1, 5])
def test_adapt_is_the_unrolled_inner_loop(case, inner_steps, backend):
    s = setup(case)
    made = engine(case, backend)
    params = made.adapt(s.theta, s.data.support_x, s.data.support_y, inner_lr=case.inner_lr, inner_steps=inner_steps)
    expected = exact(case, inner_steps)
    expect_close(params, expected.params, RTOL, f"{case} params")
    expect_close(made.forward(params, s.data.query_x), expected.query_output, RTOL, f"{case} output")


def test_frozen_parameters_stay_and_get_zero(backend):
    case = next(case for case in NETWORK_CASES if case.name == "frozen weight")
    s = setup(case)
    made, frozen = engine(case, backend), s.mask == 0
    assert int(frozen.sum()) == 40
    got = made.meta_gradient(s.theta, s.batch(), inner_lr=0.3, inner_steps=2)
    assert float(got.grad[frozen].abs().max()) == 0.0 and float(got.grad[~frozen].abs().min()) > 0.0
    params = made.adapt(s.theta, s.data.support_x, s.data.support_y, inner_lr=0.3, inner_steps=2)
    assert torch.equal(params[:, frozen], s.theta[frozen].expand(case.tasks, -1))


@pytest.mark.parametrize("case", [LAYER_NORM, CONV4], ids=str)
def test_one_task_and_one_parameter_direction_by_finite_differences(case, backend):
    # Not through the oracle: the engine's own loss, differenced. CONV4 only where no mask flips within the step, hence
    # the tiny one.
    s = setup(case)
    made, batch = engine(case, backend), s.batch()
    direction = normal(s.P, seed=9)
    direction /= direction.norm()
    h = 1e-4 if case.smooth else 1e-6

    def objective(theta):
        return made.meta_gradient(theta, batch, inner_lr=case.inner_lr, inner_steps=2).loss.mean()

    numeric = (objective(s.theta + h * direction) - objective(s.theta - h * direction)) / (2 * h)
    slope = made.meta_gradient(s.theta, batch, inner_lr=case.inner_lr, inner_steps=2).grad @ direction
    expect_close(slope, numeric, 1e-5, case, atol=1e-7)  # h^2 times the third derivative, and 1e-16 / h of rounding
