"""Shared by all learners: they train with a custom loss and a custom layer, and name wrong settings."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastmaml as fm

T, S, Q, WAYS = 3, 6, 4, 3

LEARNERS = {
    "MAML": lambda model, **how: fm.MAML(model, inner_lr=0.1, inner_steps=2, **how),
    "FOMAML": lambda model, **how: fm.FOMAML(model, inner_lr=0.1, inner_steps=2, **how),
    "MAML with Adam": lambda model, **how: fm.MAML(model, inner=fm.inner.Adam(0.01), inner_steps=2, **how),
    "MetaSGD": lambda model, **how: fm.MetaSGD(model, inner_lr=0.1, inner_steps=2, **how),
    "ANIL": lambda model, **how: fm.ANIL(model, inner_lr=0.1, inner_steps=2, **how),
    "BOIL": lambda model, **how: fm.BOIL(model, inner_lr=0.1, inner_steps=2, **how),
    "MAML++": lambda model, **how: fm.MAMLPlusPlus(model, inner_lr=0.1, inner_steps=2, **how),
    "Reptile": lambda model, **how: fm.Reptile(model, fm.inner.SGD(0.5), 3, 4, eval_steps=3, eval_minibatch=4, **how),
    "IMAML": lambda model, **how: fm.IMAML(model, inner_lr=0.1, inner_steps=5, lam=4.0, **how),
    "ProtoMAML": lambda model, **how: fm.ProtoMAML(model, inner_lr=0.1, inner_steps=2, **how),
    "MetaCurvature": lambda model, **how: fm.MetaCurvature(model, inner_lr=0.1, inner_steps=2, **how),
    "CAVIA": lambda model, **how: fm.CAVIA(model, inner_lr=0.5, inner_steps=2, **how),
}
learners = pytest.mark.parametrize("name", LEARNERS)


class Recurrent(nn.Module):
    """A GRU, which is not fused, and a linear head; the context parameters (CAVIA's) enter beside the input."""

    def __init__(self, context: bool):
        super().__init__()
        self.context = nn.Parameter(torch.zeros(2)) if context else None
        self.gru = nn.GRU(2 + 2 * context, 5, batch_first=True)
        self.head = nn.Linear(5, WAYS)

    def forward(self, x):
        if self.context is not None:
            x = torch.cat([x, self.context.expand(*x.shape[:2], -1)], dim=2)
        return self.head(self.gru(x)[0][:, -1])


def plain(name):
    torch.manual_seed(0)
    if name == "CAVIA":
        return fm.models.ContextInput(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, WAYS)), 2)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, WAYS))


def batch(shape=(4,)):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(S).remainder(WAYS).expand(T, S)
    x = torch.randn(T, S + Q, *shape, generator=generator)
    means = torch.randn(T, WAYS, *shape, generator=generator)
    query = torch.randint(0, WAYS, (T, Q), generator=generator)
    y = torch.cat([labels, query], dim=1)
    x = 0.5 * x + torch.stack([of_task[y_] for of_task, y_ in zip(means, y)])
    return x[:, :S], y[:, :S], x[:, S:], y[:, S:]


def margin(output, target):
    """A loss of one's own: the mean over classes of a softened margin to the right one."""
    right = output.gather(1, target.unsqueeze(1))
    return nn.functional.softplus(1 + output - right).mean(1)


def trained(learner, data, steps=30):
    optimizer = learner.outer_optimizer(1.0 if isinstance(learner, fm.Reptile) else 1e-2)
    losses = []
    for step in range(steps):
        learner.at_step(step)
        optimizer.zero_grad()
        out = learner(*data)
        out.loss.backward()
        optimizer.step()
        losses.append(float(out.loss.detach()))
    return losses


@learners
def test_it_trains_with_a_loss_of_ones_own(name):
    learner = LEARNERS[name](plain(name), loss=margin)
    losses = trained(learner, batch())
    assert losses[-1] < 0.9 * losses[0], losses
    assert learner.engine.fused == (name != "CAVIA")  # its concatenation is not fused
    assert learner.engine.why
    with torch.no_grad():
        assert torch.isfinite(learner(*batch()).loss)


@learners
def test_it_trains_with_a_layer_that_is_not_fused(name):
    torch.manual_seed(0)
    learner = LEARNERS[name](Recurrent(name == "CAVIA"))
    losses = trained(learner, batch((3, 2)), steps=18)
    assert losses[-1] < 0.9 * losses[0], losses
    assert learner.engine.backend == "autodiff" and learner.engine.why


@learners
def test_it_says_which_shape_does_not_fit(name):
    learner = LEARNERS[name](plain(name))
    support_x, support_y, query_x, query_y = batch()
    with pytest.raises(ValueError, match=r"support_x \[3, 6, 7\]"):
        learner(torch.randn(T, S, 7), support_y, query_x, query_y)
    with pytest.raises(ValueError, match=r"support_y \[3, 5\]"):
        learner(support_x, support_y[:, :5], query_x, query_y)
    with pytest.raises(ValueError, match=r"query_x \[2, 4, 4\]"):
        learner(support_x, support_y, query_x[:2], query_y[:2])
    with pytest.raises(ValueError, match=r"query_y .*labels from 0 to 7"):
        learner(support_x, support_y, query_x, query_y.clone().fill_(7).index_fill(1, torch.tensor([0]), 0))


@learners
def test_it_goes_on_from_its_state_dict(name):
    learner = LEARNERS[name](plain(name))
    trained(learner, batch(), steps=3)
    again = LEARNERS[name](plain(name))
    again.load_state_dict(copy.deepcopy(learner.state_dict()))
    for one in (learner, again):
        one.eval()
    with torch.no_grad():
        torch.manual_seed(3)
        first = learner(*batch()).query_output
        torch.manual_seed(3)
        assert torch.equal(again(*batch()).query_output, first)
    model_keys = set(plain(name).state_dict())
    assert model_keys <= set(learner.state_dict())


@learners
def test_adaptation_is_handed_out(name):
    learner = LEARNERS[name](plain(name))
    support_x, support_y, query_x, _ = batch()
    adapted = learner.adapt(support_x, support_y, inner_steps=1)
    assert adapted.params.shape == (T, learner.engine.layout.size)
    output = adapted.predict(query_x)
    assert output.shape == (T, Q, WAYS)
    assert torch.allclose(adapted.module(1)(query_x[1]), output[1], atol=1e-6)
