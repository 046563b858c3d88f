# First-order MAML (ALGORITHMS 2.2). Variant (a) against unrolled float64 autograd; variant (b), FOML, against plain loops
# around torch.optim. Also the limits of both for small inner rates.
from __future__ import annotations

import inner_oracle
import pytest
import torch
from compare import expect_close
from small_tasks import BACKENDS, RTOL, TASKS, batch, grad_of, loss_of, network, theta_of
from torch import nn
from torch.func import hessian

import fastmaml as fm
from fastmaml.algorithms.fomaml import split_tail
from fastmaml.algorithms.reptile import mini_batches

F64 = torch.float64


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", ["mlp", "conv"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fomaml_stops_the_gradient_at_every_inner_gradient(backend, name, steps):
    model, given = network(name), batch(name)
    rate = nn.Parameter(torch.tensor(0.3, dtype=F64))
    out = fm.FOMAML(model, rate, steps, backend=backend)(*given)
    out.loss.backward()
    rates = torch.full_like(theta_of(model), 0.3)[None]
    expected = inner_oracle.unrolled(loss_of(model), theta_of(model), given, rates, steps, order=0)
    expect_close(out.task_losses, expected.losses, RTOL, "losses")
    expect_close(grad_of(model), expected.grad, RTOL, "theta")
    expect_close(rate.grad, expected.rate_grad.sum(), RTOL, "rate")


def test_fomaml_is_the_query_gradient_at_the_adapted_parameters():
    model, given = network("conv"), batch("conv")
    learner = fm.FOMAML(model, 0.3, 3)
    learner(*given).loss.backward()
    adapted = learner.adapt(*given[:2]).params
    expect_close(grad_of(model), learner.engine.grad(adapted, *given[2:])[1].mean(0), 1e-11, "query gradient")


# ---- variant (b)


@pytest.mark.parametrize("tail", [None, 1])
@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("inner", [fm.inner.SGD(0.1), fm.inner.Adam(0.03, betas=(0.0, 0.999))], ids=["sgd", "adam"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_foml_follows_the_last_step_alone(backend, inner, size, tail):
    """The released loop: weights go back to theta for every task, Adam's moments do not."""
    model, steps = network(), 3
    learner = fm.FOML(model, inner, steps, size, serial=True, tail_shots=tail, backend=backend)
    phi = nn.Parameter(theta_of(model))
    adam = isinstance(inner, fm.inner.Adam)
    stepper = torch.optim.Adam([phi], inner.lr, inner.betas) if adam else torch.optim.SGD([phi], inner.lr)
    for step in range(2):
        given, theta = class_batch(seed=step), theta_of(model)
        torch.manual_seed(step)
        directions = []
        for x, y in zip(*given[:2]):
            x, y = x[None], y[None]
            if tail is None:
                x, y = mini_batches(x, y, steps, size)
                batches = [(x[0, rows], y[0, rows]) for rows in rows_of(steps, size)]
            else:  # the last example of each of the three classes
                rest, last = slice(0, 6), slice(6, 9)
                drawn = mini_batches(x[:, rest], y[:, rest], steps - 1, size)
                batches = [(drawn[0][0, rows], drawn[1][0, rows]) for rows in rows_of(steps - 1, size)]
                batches.append((x[0, last], y[0, last]))
            phi.data.copy_(theta)
            for of_batch in batches:
                before = phi.detach().clone()
                stepper.zero_grad()
                loss_of(model)(phi, *of_batch).backward()
                stepper.step()
            directions.append(before - phi.detach())
        torch.manual_seed(step)
        model.zero_grad()
        out = learner(*given)
        out.loss.backward()
        assert out.support_losses.shape == (TASKS, steps)
        expect_close(grad_of(model), torch.stack(directions).mean(0), 1e-8, f"step {step}")


def rows_of(steps, size):
    return [slice(None) if size is None else slice(k * size, (k + 1) * size) for k in range(steps)]


def class_batch(seed=0):
    """Three examples of each of three classes, ordered 0 1 2 0 1 2 0 1 2."""
    given = batch(support=9, seed=seed)
    return given._replace(support_y=torch.arange(3).repeat(TASKS, 3))


def test_foml_with_a_disjoint_tail_is_fomaml_on_it():
    """(b) equals (a) with the tail as query set, up to the inner optimizer's rate."""
    model, given = network(), class_batch()
    fm.FOML(model, fm.inner.SGD(0.2), 4, None, tail_shots=1)(*given).loss.backward()
    foml = grad_of(model) / 0.2
    model.zero_grad()
    x, y = given.support_x, given.support_y
    fm.FOMAML(model, 0.2, 3)(x[:, :6], y[:, :6], x[:, 6:], y[:, 6:]).loss.backward()
    expect_close(foml, grad_of(model), 1e-10, "direction / rate")


def test_foml_in_one_step_is_a_gradient_step():
    model, given = network(), batch()
    fm.FOML(model, fm.inner.SGD(0.2), 1, None)(*given).loss.backward()
    expected = fm.Engine(model).grad(theta_of(model), *given[:2])[1].mean(0)
    expect_close(grad_of(model) / 0.2, expected, 1e-10, "mean gradient")


def test_the_tail_holds_the_last_shots_of_every_class():
    y = torch.tensor([[0, 0, 1, 1, 2, 2, 1, 0, 2], [2, 2, 2, 1, 1, 1, 0, 0, 0]])
    x = torch.arange(9).expand(2, 9)
    (rest_x, rest_y), (tail_x, tail_y) = split_tail(x, y, 2)
    assert tail_x.tolist() == [[1, 3, 5, 6, 7, 8], [1, 2, 4, 5, 7, 8]] and rest_x.tolist() == [[0, 2, 4], [0, 3, 6]]
    assert torch.equal(tail_y, y.gather(1, tail_x)) and torch.equal(rest_y, y.gather(1, rest_x))
    (rest_x, _), (tail_x, _) = split_tail(x, torch.zeros(2, 9, 1), 4)  # regression: the last examples
    assert tail_x.tolist() == [[5, 6, 7, 8]] * 2 and rest_x.tolist() == [[0, 1, 2, 3, 4]] * 2
    with pytest.raises(ValueError, match=r"tail_shots=3 takes \[9, 9\] of the 9 support examples"):
        split_tail(x, y, 3)
    with pytest.raises(ValueError, match=r"takes \[2, 1\] of the 4"):
        split_tail(x[:, :4], torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]), 1)


def test_foml_carries_moments_and_shares_reptiles_face():
    learner, given = fm.FOML(network(), fm.inner.Adam(0.01), 2, 3, tail_shots=1), class_batch()
    learner(*given)
    assert int(learner.moment_steps) == 2 and bool(learner.moments.abs().max() > 0)
    assert isinstance(learner.outer_optimizer(0.5), torch.optim.SGD)
    with pytest.raises(ValueError, match="tail_shots is 0"):
        fm.FOML(network(), tail_shots=0)


def test_directions_agree_with_their_expansion_in_the_inner_rate():
    """ALGORITHMS 2.2 to first order in a: MAML, FOMAML and Reptile on the same sequence of batches."""
    model, a, k = network(), 1e-4, 3
    given = batch(support=4 * k, tasks=1)
    theta, f = theta_of(model), loss_of(model)
    batches = [(given.support_x[0, rows], given.support_y[0, rows]) for rows in rows_of(k, 4)]
    g = [torch.autograd.grad(f(p := theta.clone().requires_grad_(), *b), p)[0] for b in batches]
    H = [hessian(lambda p, b=b: f(p, *b))(theta) for b in batches]
    before = g[0] + g[1]
    expected = {
        "maml": g[2] - a * (H[2] @ before + (H[0] + H[1]) @ g[2]),
        "fomaml": g[2] - a * H[2] @ before,
        "reptile": sum(g) - a * (H[1] @ g[0] + H[2] @ before),
    }
    engine = fm.Engine(model)
    given = (given.support_x[:, :8], given.support_y[:, :8], given.support_x[:, 8:], given.support_y[:, 8:])
    got = {
        "maml": engine.meta_gradient(theta, given, a, 2, minibatch=4).grad,
        "fomaml": engine.meta_gradient(theta, given, a, 2, True, minibatch=4).grad,
    }
    x, y = torch.cat(given[::2], dim=1), torch.cat(given[1::2], dim=1)
    got["reptile"] = (theta - engine.adapt(theta, x, y, a, k, minibatch=4)[0]) / a
    for name, direction in got.items():  # what is left is of order a^2; the first-order term is about 1e-4
        expect_close(direction, expected[name], 1e-6, name)
        assert float((direction - (sum(g) if name == "reptile" else g[2])).abs().max()) > 1e-5


@pytest.mark.parametrize("kind", [fm.FOMAML, fm.FOML])
def test_a_loss_function_and_a_layer_that_is_not_fused(kind):
    model, given = nn.Sequential(nn.Linear(3, 7), nn.Softsign(), nn.Linear(7, 3)).double(), batch()
    named = {"inner_lr": 0.2, "inner_steps": 2} | ({"minibatch": None} if kind is fm.FOML else {})
    kind(model, **named, loss=lambda z, y: nn.functional.cross_entropy(z, y, reduction="none"))(*given).loss.backward()
    expected = torch.zeros_like(theta_of(model))
    for task in zip(*given):
        phi = theta_of(model)
        for k in range(3):
            at = task[2:] if k == 2 and kind is fm.FOMAML else task[:2]
            phi.requires_grad_()
            (g,) = torch.autograd.grad(loss_of(model)(phi, *at), phi)
            last = 2 if kind is fm.FOMAML else 1
            expected += g / TASKS * (0.2 if kind is fm.FOML else 1.0) if k == last else 0.0
            phi = (phi - 0.2 * g).detach()
    expect_close(grad_of(model), expected, RTOL, "theta")
