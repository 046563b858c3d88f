"""Learners on models that are not fused: an unknown layer, two inputs, a loss written in Python."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from unrolled import relative_error

import fastmaml as fm

TASKS, CLASSES = 3, 3
LEARNERS = {
    "imaml": lambda model, **how: fm.IMAML(
        model, solver="newton_cg", inner_steps=4, lam=10.0, cg_steps=12, cg_stop=1e-20, **how
    ),
    "protomaml": lambda model, **how: fm.ProtoMAML(model, 0.1, 2, head="head", **how),
    "metacurvature": lambda model, **how: fm.MetaCurvature(model, 0.1, 2, **how),
    "cavia": lambda model, **how: fm.CAVIA(model, 0.5, 2, context="shift", **how),
}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 3, batch_first=True), nn.Linear(3, CLASSES)
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.head(self.lstm(x.unsqueeze(2))[0][:, -1] + self.shift)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, CLASSES)
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, x, z):
        return self.head(torch.tanh(self.first(x) * self.second(z) + self.shift))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, CLASSES)
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.head(torch.tanh(self.first(x + self.shift)))


def make(model: type[nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return model().double()


def batch(model: type[nn.Module]):
    g = torch.Generator().manual_seed(2)

    def x(n):
        one, two = (torch.randn(TASKS, n, d, generator=g, dtype=torch.float64) for d in (3, 2))
        return (one, two) if model is TwoInputs else one

    support_y = torch.tensor([[0, 1, 2, 2, 1, 0]]).repeat(TASKS, 1)
    return x(6), support_y, x(4), torch.randint(0, CLASSES, (TASKS, 4), generator=g)


@pytest.mark.parametrize("model", [Recurrent, TwoInputs])
@pytest.mark.parametrize("name", LEARNERS)
def test_the_gradient_is_exact_by_finite_differences(name, model):
    learner, given = LEARNERS[name](make(model)), batch(model)
    assert not learner.engine.fused and learner.engine.why
    learner(*given).loss.backward()
    g = torch.Generator().manual_seed(3)
    parameters = list(learner.model.parameters())
    directions = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in parameters]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, directions))
    size = sum((p.grad * d).square().sum() for p, d in zip(parameters, directions)).sqrt()
    values, h = [], 1e-3
    with torch.no_grad():
        for step in (h, -h, 2 * h, -2 * h):
            for p, d in zip(parameters, directions):
                p += step * d
            values.append(learner(*given).loss)
            for p, d in zip(parameters, directions):
                p -= step * d
    differences = (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * h)
    assert float((slope - differences).abs() / size) < 1e-8


@pytest.mark.parametrize("name", LEARNERS)
def test_a_loss_of_ones_own_gives_the_same(name):
    def cross_entropy(output, target):
        return nn.functional.cross_entropy(output, target, reduction="none")

    grads = []
    for loss in ("cross_entropy", cross_entropy):
        learner = LEARNERS[name](make(Plain), loss=loss)
        learner(*batch(Plain)).loss.backward()
        grads.append(torch.cat([p.grad.reshape(-1) for p in learner.parameters()]))
    assert relative_error(grads[1], grads[0]) < 1e-10
