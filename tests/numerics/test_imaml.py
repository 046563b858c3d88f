# The implicit meta-gradient and the gradient of lambda against two references: finite differences of the converged inner
# problem, and the dense linear system. Both in plain torch on 27 parameters (dense Hessians, Newton, no engine).
from __future__ import annotations

import logging
from functools import cache
from itertools import pairwise

import pytest
import torch
from compare import expect_close
from torch import nn
from torch.func import functional_call, vmap

import fastmaml as fm
from fastmaml.algorithms.imaml import IMAML
from fastmaml.algorithms.newton_cg import armijo, newton_cg
from fastmaml.autodiff.conjugate_gradients import conjugate_gradients

TASKS, SUPPORT, QUERY, CLASSES = 3, 6, 5, 3
EXACT = {"cg_steps": 60, "cg_stop": 1e-28}
CONVERGED = {
    "gd": {"inner_lr": 0.3, "inner_steps": 70, **EXACT},
    "newton_cg": {"solver": "newton_cg", "inner_steps": 6, **EXACT},
}


def network() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.4 * torch.randn_like(parameter)
    return model


@cache
def batch() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(2)

    def examples(n):
        x = torch.randn(TASKS, n, 2, generator=g, dtype=torch.float64)
        return x, torch.randint(0, CLASSES, (TASKS, n), generator=g)

    return (*examples(SUPPORT), *examples(QUERY))


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def loss_of(model: nn.Module):
    layout = [(n, p.shape, p.numel()) for n, p in model.named_parameters()]

    def loss(phi, x, y):
        pieces = phi.split([size for _, _, size in layout])
        named = {n: piece.view(shape) for (n, shape, _), piece in zip(layout, pieces)}
        return nn.functional.cross_entropy(functional_call(model, named, (x,)), y)

    return loss


def grad_and_hessian(loss, phi, *at):
    value = phi.detach().requires_grad_()
    (g,) = torch.autograd.grad(loss(value, *at), value, create_graph=True)
    rows = [torch.autograd.grad(g[i], value, retain_graph=True)[0] for i in range(len(g))]
    return g.detach(), torch.stack(rows)


def inner_minima(loss, theta, lam, mask, *support):
    """phi of every start theta [B, P], by dense Newton over the entries with mask 1 until nothing moves."""
    phi, moved = theta.clone(), mask.bool()
    lam = lam.unsqueeze(1)
    for _ in range(8):
        g = vmap(lambda p: torch.func.grad(loss)(p, *support))(phi) + lam * (phi - theta)
        H = vmap(lambda p: torch.func.hessian(loss)(p, *support))(phi) + lam.unsqueeze(2) * torch.eye(theta.shape[1])
        phi[:, moved] -= torch.linalg.solve(H[:, moved][:, :, moved], g[:, moved])
    assert float(g[:, moved].abs().max()) < 1e-14
    return phi


@cache
def expected(lam: float, weights: tuple[float, ...] = (1 / TASKS,) * TASKS, fixed: tuple[int, ...] = ()):
    """Gradient by theta [P] and by lam [1] of the query loss at the inner minima: finite differences of order h^4."""
    theta, loss, h = flat(network()), loss_of(network()), 2e-3
    P = len(theta)
    mask = torch.ones_like(theta).index_fill(0, torch.tensor(fixed, dtype=torch.int64), 0.0)
    at = torch.cat([theta, torch.tensor([lam]).double()])
    steps = torch.tensor([1.0, -1.0, 2.0, -2.0]).double()
    points = (at + h * steps[:, None, None] * torch.eye(P + 1).double()).reshape(-1, P + 1)
    values = torch.zeros(len(points)).double()
    for weight, sx, sy, qx, qy in zip(weights, *batch()):
        phi = inner_minima(loss, points[:, :P], points[:, P], mask, sx, sy)
        values += weight * vmap(lambda p, x=qx, y=qy: loss(p, x, y))(phi)
    one, back, two, back_two = values.reshape(4, P + 1)
    slopes = (8 * (one - back) - (two - back_two)) / (12 * h)
    return slopes[:P], slopes[P]


def run(learner, **how):
    learner(*batch(), **how).loss.backward()
    return torch.cat([p.grad.reshape(-1) for p in learner.model.parameters()])


@pytest.mark.parametrize("solver", CONVERGED, ids=str)
def test_gradients_are_those_of_the_converged_inner_problem(solver, backend):
    learner = IMAML(network(), lam=2.0, learn_lam=True, backend=backend.name, **CONVERGED[solver])
    grad, lam_grad = expected(2.0)
    expect_close(run(learner), grad, 1e-9, "theta")  # of the differences: h^4 = 2e-11, rounding 1e-16 / h
    expect_close(learner.lam.grad, lam_grad, 1e-9, "lambda")
    assert float(learner.last.stationarity.max()) < 1e-10
    assert float(learner.last.residual.max()) < 1e-12
    assert not bool(learner.last.negative_curvature.any())


def test_gradients_meet_the_dense_system():
    """Off the minimum too, the answer is (I + H/lam)^-1 v at the phi that the inner loop reached."""
    model = network()
    learner = IMAML(model, 0.1, 3, lam=1.5, learn_lam=True, backend="cpu", **EXACT)
    got, loss = run(learner), loss_of(model)
    grad, lam_grad = torch.zeros_like(got), torch.zeros(()).double()
    for sx, sy, qx, qy in zip(*batch()):
        phi = flat(model)
        for _ in range(3):
            phi = phi - 0.1 * (grad_and_hessian(loss, phi, sx, sy)[0] + 1.5 * (phi - flat(model)))
        (g, H), (v, _) = grad_and_hessian(loss, phi, sx, sy), grad_and_hessian(loss, phi, qx, qy)
        x = torch.linalg.solve(torch.eye(27).double() + H / 1.5, v)
        grad, lam_grad = grad + x / TASKS, lam_grad + g @ x / 1.5**2 / TASKS
    expect_close(got, grad, 1e-11, "theta")
    expect_close(learner.lam.grad, lam_grad, 1e-11, "lambda")


def test_task_weights():
    weights = (0.7, 0.0, 1.9)
    learner = IMAML(network(), lam=2.0, learn_lam=True, backend="cpu", **CONVERGED["newton_cg"])
    grad, lam_grad = expected(2.0, weights)
    expect_close(run(learner, task_weights=torch.tensor(weights, dtype=torch.float64)), grad, 1e-9, "theta")
    expect_close(learner.lam.grad, lam_grad, 1e-9, "lambda")


@pytest.mark.parametrize("solver", CONVERGED, ids=str)
def test_parameters_outside_the_inner_problem_are_meta_trained_exactly(solver):
    # the first layer (12 entries) is held fixed in the inner problem, and acts through phi as well
    learner = IMAML(network(), lam=2.0, learn_lam=True, adapted="2.*", backend="cpu", **CONVERGED[solver])
    grad, lam_grad = expected(2.0, fixed=tuple(range(12)))
    expect_close(run(learner), grad, 1e-9, "theta")
    expect_close(learner.lam.grad, lam_grad, 1e-9, "lambda")
    assert bool((learner.adapt(*batch()[:2]).params[:, :12] == flat(network())[:12]).all())


def test_frozen_parameters_stay_and_get_nothing():
    model = network()
    model[0].bias.requires_grad_(False)
    learner = IMAML(model, lam=2.0, backend="cpu", **CONVERGED["newton_cg"])
    learner(*batch()).loss.backward()
    assert model[0].bias.grad is None
    assert bool((learner.adapt(*batch()[:2]).params[:, 8:12] == model[0].bias).all())
    assert float(learner.last.stationarity.max()) < 1e-10


def test_the_gradient_becomes_that_of_the_query_loss_as_lam_grows(backend):
    model, loss = network(), loss_of(network())
    v = torch.stack([grad_and_hessian(loss, flat(model), qx, qy)[0] for qx, qy in zip(*batch()[2:])])
    distances = []
    for lam in (1e2, 1e4, 1e6):
        learner = IMAML(
            model, solver="newton_cg", inner_steps=3, lam=lam, lam_range=(1.0, 1e9), backend=backend.name, **EXACT
        )
        model.zero_grad()
        distances.append(float((run(learner) - v.mean(0)).norm() / v.mean(0).norm()))
    assert distances[0] < 0.1
    for near, far in zip(distances[1:], distances):
        assert 0.005 < near / far < 0.02  # first order in 1 / lam


def test_the_residual_curve_is_the_textbook_one():
    """The relative residual after every conjugate gradient step; `pytest -s` prints it."""
    model, lam, steps = network(), 0.7, 20
    learner = IMAML(model, solver="newton_cg", inner_steps=6, lam=lam, cg_steps=steps, cg_stop=1e-24, backend="cpu")
    run(learner)
    curve, loss = learner.last.curve, loss_of(model)
    print(f"\nCG residual |v - A x| / |v| per step, {TASKS} tasks, 27 parameters, lam={lam}")
    for step, row in enumerate(curve.T.tolist()):
        print(f"  {step:2d}  " + "  ".join(f"{value:.2e}" for value in row))
    for task, (sx, sy, qx, qy) in enumerate(zip(*batch())):
        phi = learner.adapt(*batch()[:2]).params[task]
        A = torch.eye(27).double() + grad_and_hessian(loss, phi, sx, sy)[1] / lam
        v = grad_and_hessian(loss, phi, qx, qy)[0]
        x, r, p = torch.zeros_like(v), v, v
        for step in range(8):
            expect_close(curve[task, step], (v - A @ x).norm() / v.norm(), 1e-6, f"task {task}, step {step}")
            alpha = (r @ r) / (p @ A @ p)
            x, after = x + alpha * p, r - alpha * (A @ p)
            r, p = after, after + (after @ after) / (r @ r) * p
    assert float(learner.last.residual.max()) < 1e-10
    assert bool((learner.last.iterations <= steps).all()) and curve.shape[1] == 1 + int(learner.last.iterations.max())


def test_five_steps_leave_the_residual_that_is_reported():
    model = network()
    learner = IMAML(model, 0.1, 16, lam=2.0, backend="cpu")
    assert learner.cg_steps == 5
    run(learner)
    assert bool((learner.last.iterations == 5).all()) and learner.last.curve.shape == (TASKS, 6)
    expect_close(learner.last.curve[:, -1], learner.last.residual, 1e-15, "the last residual")
    assert 1e-8 < float(learner.last.residual.max()) < 0.1


# ---------------------------------------------------------------- what it refuses, and what it says


def test_negative_curvature_is_logged_once_and_reported(caplog):
    learner = IMAML(network(), 0.01, 2, lam=0.02, backend="cpu")
    with caplog.at_level(logging.WARNING, logger="fastmaml"):
        run(learner)
        run(learner)
    assert bool(learner.last.negative_curvature.any())
    said = [r.getMessage() for r in caplog.records if "p.Ap <= 0" in r.getMessage()]
    assert len(said) == 1 and "lam=0.02 is too small" in said[0]


@pytest.mark.parametrize(
    "how, sentence",
    [
        ({"cg_steps": 0}, "cg_steps is 0: the gradient would be the first-order one; use FOMAML"),
        ({"first_order": True}, "first_order means nothing to IMAML"),
        ({"truncate": 2}, "truncate means nothing to IMAML"),
        ({"lam": 0.0}, "lam=0.0 must lie in lam_range"),
        ({"lam": 9000.0}, "lam=9000.0 must lie in lam_range"),
        ({"solver": "lbfgs"}, "solver 'lbfgs' is neither 'gd' nor 'newton_cg'"),
        ({"solver": "newton_cg"}, "finds its own step lengths"),
        ({"inner_lr": nn.Parameter(torch.tensor(0.1).double())}, "inner_lr cannot be learned"),
        ({"inner_lr": None, "inner": fm.inner.Adam(), "reference_quirks": True}, "plain gradient descent only"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(how, sentence):
    with pytest.raises(ValueError, match=sentence):
        IMAML(network(), **{"inner_lr": 0.1, "backend": "cpu", **how})


# ---------------------------------------------------------------- learned lambda


def test_lam_is_learned_kept_in_its_range_and_saved():
    learner = IMAML(network(), 0.1, 8, lam=0.5, learn_lam=True, lam_range=(0.4, 0.6), backend="cpu")
    assert set(learner.state_dict()) == {*network().state_dict(), "lam"}
    optimizer = torch.optim.SGD(learner.parameters(), 1e3)
    run(learner)
    optimizer.step()
    run(learner)
    assert float(learner.lam.detach()) in (pytest.approx(0.4), pytest.approx(0.6))
    other = IMAML(network(), 0.1, 8, learn_lam=True, backend="cpu")
    assert other.load_state_dict(learner.state_dict()) == ([], [])
    assert float(other.lam.detach()) == float(learner.lam.detach())
    assert "lam" not in IMAML(network(), 0.1).state_dict()


def test_learning_lam_lowers_the_query_loss():
    learner = IMAML(network(), inner_steps=4, solver="newton_cg", lam=2.0, learn_lam=True, cg_steps=20)
    optimizer, losses = torch.optim.SGD([learner.lam], 0.3), []
    for _ in range(15):
        optimizer.zero_grad()
        loss = learner(*batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and all(later < earlier for earlier, later in pairwise(losses))


# ---------------------------------------------------------------- the released code


@pytest.mark.parametrize("cg_steps", [1, 5])
def test_reference_quirks_are_the_released_code(cg_steps):
    model, lam, rate, loss = network(), 1.2, 0.2, loss_of(network())
    learner = IMAML(
        model,
        rate,
        4,
        lam=lam,
        learn_lam=True,
        cg_steps=cg_steps,
        cg_damping=1.0,
        reference_quirks=True,
        backend="cpu",
    )
    got = run(learner)
    grad, lam_grad, theta = torch.zeros_like(got), torch.zeros(()).double(), flat(model)
    for sx, sy, qx, qy in zip(*batch()):
        phi = theta
        for _ in range(4):
            phi = phi - rate * grad_and_hessian(loss, phi, sx, sy)[0]
        phi = phi - rate * lam * (phi - theta)
        (g, H), (v, _) = grad_and_hessian(loss, phi, sx, sy), grad_and_hessian(loss, phi, qx, qy)
        A = 2.0 * torch.eye(27).double() + H / (lam + 10.0)
        x, r, p = torch.zeros_like(v), v, v
        for _ in range(cg_steps if cg_steps > 1 else 0):
            alpha = (r @ r) / (p @ A @ p)
            x, after = x + alpha * p, r - alpha * (A @ p)
            if after @ after < 1e-10:
                break
            r, p = after, after + (after @ after) / (r @ r) * p
        x = x if cg_steps > 1 else v
        grad, lam_grad = grad + x / TASKS, lam_grad + g @ x / (lam**2 + 0.1) / TASKS
    expect_close(got, grad, 1e-9, "theta")
    expect_close(learner.lam.grad, lam_grad, 1e-9, "lambda")
    assert bool(learner.last.residual.isnan().all()) == (cg_steps == 1)


def test_reference_quirks_bring_their_outer_adam_and_test_without_lam():
    learner = IMAML(network(), 0.1, 4, reference_quirks=True, eval_lam=0.0, backend="cpu")
    assert learner.outer_optimizer(1e-3).param_groups[0]["eps"] == 1e-3
    assert IMAML(network(), 0.1).outer_optimizer(1e-3).param_groups[0]["eps"] == 1e-8
    training = learner.adapt(*batch()[:2]).params
    plain = fm.MAML(learner.model, 0.1, 4, backend="cpu").adapt(*batch()[:2]).params
    expect_close(learner.eval().adapt(*batch()[:2]).params, plain, 1e-14, "lam = 0")
    assert not torch.equal(training, plain)


# ---------------------------------------------------------------- Newton


def test_newton_and_gradient_descent_find_the_same_minimum(backend):
    found = [IMAML(network(), lam=2.0, backend=backend.name, **how).adapt(*batch()[:2]) for how in CONVERGED.values()]
    expect_close(found[0].params, found[1].params, 1e-10, "phi")
    assert found[1].losses.shape == (TASKS, 6)


class Valley:
    """sum sqrt(1 + (x - c)^2): a full Newton step from |x - c| > 1 overshoots ever further."""

    def __init__(self, centres):
        self.centres = centres

    def value(self, phi):
        return (1 + (phi - self.centres) ** 2).sqrt().sum(1)

    def grad(self, phi):
        away = phi - self.centres
        return self.value(phi), away / (1 + away**2).sqrt()

    def curvatures(self, phi):
        return (1 + (phi - self.centres) ** 2) ** -1.5

    def solve(self, phi, v, steps):
        return conjugate_gradients(lambda p: p * self.curvatures(phi), v, steps, stop=0.0)


def test_the_line_search_holds_every_task_to_a_decrease():
    centres = torch.tensor([[0.1, 0.2], [3.0, -2.0], [30.0, 5.0]]).double()
    f, phi = Valley(centres), torch.zeros(3, 2).double()
    values = [f.value(phi)]
    for _ in range(12):
        phi = newton_cg(f, phi, 1, 5)
        values.append(f.value(phi))
    assert all(bool((later <= earlier + 1e-14).all()) for earlier, later in pairwise(values))
    expect_close(phi, centres, 1e-6, "minimum")
    for task in range(3):  # a task's steps do not depend on its neighbours
        alone = newton_cg(Valley(centres[task : task + 1]), torch.zeros(1, 2).double(), 12, 5)
        expect_close(alone[0], phi[task], 1e-12, f"task {task}")


def test_the_line_search_gives_up_after_ten_tries():
    f, phi = Valley(torch.zeros(2, 2).double()), torch.ones(2, 2).double()
    value, g = f.grad(phi)
    uphill = torch.stack([g[0], -g[1]])
    after = armijo(f, phi, uphill, value, -(g * g).sum(1))
    assert torch.equal(after[0], phi[0]) and not torch.equal(after[1], phi[1])


def test_newton_goes_down_where_the_curvature_is_negative():
    class Saddle(Valley):
        def value(self, phi):
            return (phi**4 / 4 - phi**2 / 2).sum(1)

        def grad(self, phi):
            return self.value(phi), phi**3 - phi

        def curvatures(self, phi):
            return 3 * phi**2 - 1

    phi = newton_cg(Saddle(None), torch.full((1, 2), 0.1).double(), 12, 5)
    expect_close(phi, torch.ones(1, 2).double(), 1e-9, "the minima at 1")


# ---------------------------------------------------------------- random layers


def test_dropout_has_one_draw_in_the_linear_system(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, CLASSES)).double()
    learner = IMAML(model, 0.1, 2, lam=10.0)
    solve, seen = learner.engine.solve, {}

    def recorded(phi, x, y, v, lam, steps, **options):
        seen.update(draws=torch.get_rng_state(), at=(phi, x, y), v=v, solved=solve(phi, x, y, v, lam, steps, **options))
        return seen["solved"]

    monkeypatch.setattr(learner.engine, "solve", recorded)
    run(learner)
    assert not torch.equal(torch.get_rng_state(), seen["draws"])  # the next meta-step has draws of its own
    torch.set_rng_state(seen["draws"])
    s, v = seen["solved"].solution, seen["v"]
    left = v - s - learner.engine.hvp(*seen["at"], s) / 10.0
    expect_close(left.norm(dim=1) / v.norm(dim=1), seen["solved"].residual, 1e-7, "residual with the masks of one draw")
