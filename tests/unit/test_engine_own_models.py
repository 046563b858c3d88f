"""A user's own models: recurrent, attention, tokens, several inputs and outputs, dropout."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from unrolled import relative_error

import fastmaml as fm

T, S, Q = 3, 4, 5


class LSTMRegressor(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(2, 6, batch_first=True)
        self.head = nn.Linear(6, 1)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class SmallTransformer(nn.Module):
    """Token embeddings, one encoder layer, mean over the sequence."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens)).mean(1))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)
        self.out = nn.Linear(4, 1)

    def forward(self, x, z):
        return self.out(torch.tanh(self.a(x) * self.b(z)))


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.mean, self.scale = nn.Linear(3, 5), nn.Linear(5, 1), nn.Linear(5, 1)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.mean(h), self.scale(h)


def gaussian(output, target):
    mean, log_scale = output
    return ((target - mean) / log_scale.exp()).square().sum(1) + log_scale.sum(1)


def regression(shape):
    torch.manual_seed(1)
    return torch.randn(T, S, *shape), torch.randn(T, S, 1), torch.randn(T, Q, *shape), torch.randn(T, Q, 1)


def tokens():
    torch.manual_seed(2)
    draw = torch.randint
    return draw(0, 11, (T, S, 6)), draw(0, 3, (T, S)), draw(0, 11, (T, Q, 6)), draw(0, 3, (T, Q))


def train(learner, batch, steps=25):
    optimizer = learner.outer_optimizer(1e-2)
    losses = []
    for step in range(steps):
        learner.at_step(step)
        optimizer.zero_grad()
        out = learner(*batch)
        out.loss.backward()
        optimizer.step()
        losses.append(float(out.loss.detach()))
    return losses


EXAMPLES = {
    "LSTM": (LSTMRegressor, lambda: regression((5, 2)), "mse"),
    "transformer on tokens": (SmallTransformer, tokens, "cross_entropy"),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1)),
        lambda: regression((3,)),
        "mse",
    ),
    "two outputs": (TwoOutputs, lambda: regression((3,)), gaussian),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_own_models_meta_train(name):
    make, data, loss = EXAMPLES[name]
    torch.manual_seed(0)
    learner = fm.MAML(make(), inner_lr=0.05, inner_steps=2, loss=loss)
    losses = train(learner, data())
    assert learner.engine.backend == "autodiff" and learner.engine.why
    assert losses[-1] < 0.8 * losses[0], losses


def unrolled(model, loss, batch, take, lr, steps):
    """The meta-gradient by plain double backward; take(x, task) gives the model's arguments."""
    total = 0.0
    for task in range(T):
        phi = dict(model.named_parameters())
        for _ in range(steps):
            out = torch.func.functional_call(model, phi, take(batch[0], task))
            value = loss(out, batch[1][task]).mean()
            grads = torch.autograd.grad(value, list(phi.values()), create_graph=True)
            phi = {n: p - lr * g for (n, p), g in zip(phi.items(), grads)}
        total = total + loss(torch.func.functional_call(model, phi, take(batch[2], task)), batch[3][task]).mean() / T
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, list(model.parameters()))])


def squared(output, target):
    return (output - target).square().mean(1)


def test_several_inputs_are_exact_and_said():
    torch.manual_seed(0)
    model = TwoInputs().double()
    (sx, sy, qx, qy), (sz, _, qz, _) = regression((3,)), regression((2,))
    support, query = (sx.double(), sz.double()), (qx.double(), qz.double())
    learner = fm.MAML(model, inner_lr=0.1, inner_steps=2, loss="mse")
    out = learner(support, sy.double(), query, qy.double())
    out.loss.backward()
    assert "second input 'z'" in learner.engine.why
    got = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    batch = (support, sy.double(), query, qy.double())
    expected = unrolled(model, squared, batch, lambda x, t: tuple(part[t] for part in x), 0.1, 2)
    assert relative_error(got, expected) < 1e-10
    with torch.no_grad():
        assert torch.allclose(learner(*batch).task_losses, out.task_losses)


def test_several_outputs_are_exact_and_keep_their_structure():
    torch.manual_seed(0)
    model, batch = TwoOutputs().double(), [part.double() for part in regression((3,))]
    learner = fm.MAML(model, inner_lr=0.05, inner_steps=2, loss=gaussian)
    out = learner(*batch)
    out.loss.backward()
    got = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    expected = unrolled(model, gaussian, batch, lambda x, t: (x[t],), 0.05, 2)
    assert relative_error(got, expected) < 1e-10
    mean, scale = learner.adapt(*batch[:2]).predict(batch[2])
    assert mean.shape == scale.shape == (T, Q, 1)
    with torch.no_grad():
        assert torch.allclose(learner(*batch).loss, out.loss)


def test_a_named_loss_refuses_several_outputs():
    learner = fm.MAML(TwoOutputs(), inner_lr=0.05, loss="mse")
    with pytest.raises(
        ValueError, match="the model returns 2 tensors; loss='mse' takes one, so give a function as loss"
    ):
        learner(*regression((3,)))


def test_inputs_that_do_not_belong_together_are_refused():
    learner = fm.MAML(TwoInputs(), inner_lr=0.1, loss="mse")
    x, y = torch.randn(T, S, 3), torch.randn(T, S, 1)
    with pytest.raises(
        ValueError, match=r"support_x \(\[3, 4, 3\], \[3, 5, 2\]\) must begin with the same \[tasks, examples\]"
    ):
        learner((x, torch.randn(T, S + 1, 2)), y, (x, torch.randn(T, S, 2)), y)
