# Meta-Curvature against unrolled float64 autograd that transforms every gradient by einsum. Compares the gradients of the
# model, of every matrix and of the rates.
from __future__ import annotations

from functools import cache

import pytest
import torch
from compare import expect_close
from torch import nn
from torch.func import functional_call

import fastmaml as fm
from fastmaml.algorithms.meta_curvature import MetaCurvature

RTOL = 1e-9
TASKS, SUPPORT, QUERY, CLASSES = 3, 6, 4, 3


def network(name: str) -> nn.Module:
    torch.manual_seed(1)
    if name == "mlp":
        model = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, CLASSES))
    else:
        model = nn.Sequential(
            nn.Conv2d(2, 3, (3, 2), padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(60, CLASSES)
        )
    return model.double()


@cache
def batch(name: str) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(2)
    shape = (3,) if name == "mlp" else (2, 4, 4)

    def examples(n):
        x = torch.randn(TASKS, n, *shape, generator=g, dtype=torch.float64)
        return x, torch.randint(0, CLASSES, (TASKS, n), generator=g)

    return (*examples(SUPPORT), *examples(QUERY))


def disturbed(learner: MetaCurvature) -> MetaCurvature:
    """Matrices some way off the identity, neither symmetric nor orthogonal."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for matrix in learner.curvature.values():
            matrix += 0.3 * torch.randn(matrix.shape, generator=g, dtype=torch.float64)
    return learner


def through(g: torch.Tensor, name: str, curvature: dict[str, torch.Tensor]) -> torch.Tensor:
    def of(mode):
        return curvature[f"{name}.{mode}"]

    if f"{name}.scale" in curvature:
        return of("scale") * g
    if f"{name}.out" not in curvature:
        return g
    if g.dim() == 2:
        return of("out") @ g @ of("in").T
    return torch.einsum("ao,bi,ck,oik->abc", of("out"), of("in"), of("kernel"), g.flatten(2)).view_as(g)


def unrolled(model, given, curvature, rate, steps, order=None, momentum=0.0, weights=None, adapted=None):
    """(losses [T], gradients by the names of model parameters, curvature matrices and "rate")."""
    leaves = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    matrices = {n: m.detach().clone().requires_grad_() for n, m in curvature.items()}
    rate = torch.tensor(rate, dtype=torch.float64, requires_grad=True)
    losses = []
    for sx, sy, qx, qy in zip(*given):
        phi, buffers = dict(leaves), {}

        def loss(phi, x, y):
            own = {n: b.clone() for n, b in model.named_buffers()}
            return nn.functional.cross_entropy(functional_call(model, {**phi, **own}, (x,)), y)

        for k in range(steps):
            if order and k == steps - order:  # what came before is a constant start
                phi = {n: p.detach() + (leaves[n] - leaves[n].detach()) for n, p in phi.items()}
            grads = torch.autograd.grad(loss(phi, sx, sy), list(phi.values()), create_graph=order != 0)
            for (name, value), g in zip(list(phi.items()), grads):
                if adapted is None or name in adapted:
                    d = through(g.detach() if order == 0 else g, name, matrices)
                    buffers[name] = d if name not in buffers else momentum * buffers[name] + d
                    phi[name] = value - rate * (buffers[name] if momentum else d)
        losses.append(loss(phi, qx, qy))
    of_task = torch.full((TASKS,), 1 / TASKS, dtype=torch.float64) if weights is None else weights
    named = {f"model.{n}": p for n, p in leaves.items()} | {f"curvature.{n}": m for n, m in matrices.items()}
    named["rate"] = rate
    grads = torch.autograd.grad(
        torch.stack(losses) @ of_task, list(named.values()), allow_unused=True, materialize_grads=True
    )
    return torch.stack(losses).detach(), dict(zip(named, grads))


def compare(name, learner, steps, weights=None, **how):
    out = learner(*batch(name), task_weights=weights)
    out.loss.backward()
    rate = float(next(iter(learner.learnable_rates().values())).detach())
    losses, expected = unrolled(learner.model, batch(name), learner._matrices(), rate, steps, weights=weights, **how)
    expect_close(out.task_losses, losses, RTOL, "losses")
    leaves = learner.leaves()
    assert set(leaves) == set(expected)
    for leaf, grad in expected.items():
        expect_close(leaves[leaf].grad, grad, RTOL, leaf, atol=1e-14)
        assert leaf == "model.0.bias" or bool((grad != 0).any()) or "adapted" in how


def learner_of(name, backend, steps, **options):
    rate = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
    if "inner" in options:
        options["inner"] = options["inner"](rate)
    else:
        options["inner_lr"] = rate
    return disturbed(MetaCurvature(network(name), inner_steps=steps, backend=backend, **options))


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_gradients_of_model_matrices_and_rate(name, steps, backend):
    compare(name, learner_of(name, backend.name, steps), steps)


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_first_order(name):
    compare(name, learner_of(name, "cpu", 3, first_order=True), 3, order=0)


@pytest.mark.parametrize("last", [1, 2])
def test_truncation(last):
    learner = learner_of("mlp", "cpu", 3, truncate=last)
    learner(*batch("mlp")).loss.backward()
    _, expected = unrolled(network("mlp"), batch("mlp"), learner._matrices(), 0.2, 3, order=last)
    for name, leaf in learner.leaves().items():
        expect_close(leaf.grad, expected[name], RTOL, name)


def test_momentum_sees_the_transformed_gradient():
    learner = learner_of("mlp", "cpu", 3, inner=lambda rate: fm.inner.SGD(rate, momentum=0.8))
    compare("mlp", learner, 3, momentum=0.8)


def test_task_weights():
    weights = torch.tensor([0.2, 0.0, 1.7], dtype=torch.float64)
    compare("mlp", learner_of("mlp", "cpu", 2), 2, weights=weights)


def test_parameters_that_are_not_adapted_have_no_matrices():
    learner = learner_of("mlp", "cpu", 2, adapted="2.*")
    assert set(learner._matrices()) == {"2.weight.out", "2.weight.in", "2.bias.scale"}
    compare("mlp", learner, 2, adapted=("2.weight", "2.bias"))
    model = network("mlp")
    model[0].weight.requires_grad_(False)
    assert "0.weight.out" not in MetaCurvature(model, 0.1)._matrices()


def test_with_identities_it_is_maml(backend):
    learner = MetaCurvature(network("conv"), 0.2, 3, backend=backend.name)
    maml = fm.MAML(network("conv"), 0.2, 3, backend=backend.name)
    got, expected = learner(*batch("conv")), maml(*batch("conv"))
    expect_close(got.task_losses, expected.task_losses, 1e-12, "losses")
    got.loss.backward()
    expected.loss.backward()
    for (name, p), q in zip(learner.model.named_parameters(), maml.model.parameters()):
        expect_close(p.grad, q.grad, 1e-11, name, atol=1e-15)


def test_matrices_have_the_sizes_of_the_modes():
    learner = MetaCurvature(network("conv"), 0.2)
    shapes = {name: tuple(matrix.shape) for name, matrix in learner._matrices().items()}
    assert shapes == {
        "0.weight.out": (3, 3),
        "0.weight.in": (2, 2),
        "0.weight.kernel": (6, 6),
        "0.bias.scale": (3,),
        "1.weight.scale": (3,),
        "1.bias.scale": (3,),
        "4.weight.out": (CLASSES, CLASSES),
        "4.weight.in": (60, 60),
        "4.bias.scale": (CLASSES,),
    }


def test_adapt_is_the_inner_loop_of_training(backend):
    learner = learner_of("mlp", backend.name, 3)
    with torch.no_grad():
        out = learner(*batch("mlp"))
    adapted = learner.adapt(*batch("mlp")[:2])
    losses, _ = unrolled(learner.model, batch("mlp"), learner._matrices(), 0.2, 3)
    expect_close(out.task_losses, losses, RTOL, "losses")
    assert adapted.losses.shape == (TASKS, 3)
    assert learner.adapt(*batch("mlp")[:2], inner_steps=7).losses.shape == (TASKS, 7)


def test_the_matrices_are_saved_and_learned():
    learner = disturbed(MetaCurvature(network("conv"), 0.2, 2))
    state = learner.state_dict()
    assert set(state) == {*network("conv").state_dict(), *(f"curvature.{name}" for name in learner._matrices())}
    other = MetaCurvature(network("conv"), 0.2, 2)
    assert other.load_state_dict(state) == ([], [])
    assert torch.equal(other._matrices()["0.weight.kernel"], learner._matrices()["0.weight.kernel"])
    optimizer, losses = torch.optim.Adam(other.curvature.parameters(), 1e-2), []
    for _ in range(10):
        optimizer.zero_grad()
        out = other(*batch("conv"))
        out.loss.backward()
        optimizer.step()
        losses.append(float(out.loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_a_parameter_without_dimensions_is_scaled():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.size = nn.Linear(3, CLASSES), nn.Parameter(torch.tensor(1.5))

        def forward(self, x):
            return self.size * torch.tanh(self.linear(x))

    rate = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
    torch.manual_seed(0)
    learner = disturbed(MetaCurvature(Scaled().double(), rate, 2, backend="autodiff"))
    assert learner._matrices()["size.scale"].shape == ()
    compare("mlp", learner, 2)
