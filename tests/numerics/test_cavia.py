# CAVIA against unrolled float64 autograd that adapts a context tensor from zero. Also the two context networks.
from __future__ import annotations

from functools import cache

import pytest
import torch
from compare import expect_close
from torch import nn
from torch.func import functional_call

import fastmaml as fm
from fastmaml.algorithms.cavia import CAVIA

RTOL = 1e-9
TASKS, CLASSES = 3, 3


def network(name: str) -> nn.Module:
    torch.manual_seed(1)
    if name == "mlp":
        return fm.models.context_mlp([1, 8, 1], context=4, activation="tanh").double()
    return fm.models.context_conv4(
        context=5, in_channels=1, ways=CLASSES, filters=3, image_size=16, activation="tanh", pooling="stride"
    ).double()


LOSSES = {"mlp": "mse", "conv": "cross_entropy"}


@cache
def batch(name: str) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(2)

    def examples(n):
        if name == "mlp":
            return tuple(torch.randn(TASKS, n, 1, generator=g, dtype=torch.float64) for _ in range(2))
        x = torch.randn(TASKS, n, 1, 16, 16, generator=g, dtype=torch.float64)
        return x, torch.randint(0, CLASSES, (TASKS, n), generator=g)

    return (*examples(5), *examples(4))


def unrolled(name, rate, steps, order=None, weights=None):
    """(losses [T], {name: gradient}, gradient of the rate, context [T, C] after the loop)."""
    model = network(name)
    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if n != "context"}
    rate = torch.tensor(rate, dtype=torch.float64, requires_grad=True)

    def loss(context, x, y):
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        output = functional_call(model, {**theta, "context": context, **buffers}, (x,))
        return ((output - y) ** 2).mean() if name == "mlp" else nn.functional.cross_entropy(output, y)

    losses, contexts = [], []
    for sx, sy, qx, qy in zip(*batch(name)):
        context = torch.zeros_like(model.context).requires_grad_()
        for k in range(steps):
            context = context.detach().requires_grad_() if order and k == steps - order else context
            (g,) = torch.autograd.grad(loss(context, sx, sy), context, create_graph=True)
            context = context - rate * (g.detach() if order == 0 else g)
        losses.append(loss(context, qx, qy))
        contexts.append(context.detach())
    of_task = torch.full((TASKS,), 1 / TASKS, dtype=torch.float64) if weights is None else weights
    grads = torch.autograd.grad(
        torch.stack(losses) @ of_task, [*theta.values(), rate], allow_unused=True, materialize_grads=True
    )
    return torch.stack(losses).detach(), dict(zip(theta, grads)), grads[-1], torch.stack(contexts)


def compare(name, steps, weights=None, oracle=None, **options):
    rate = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
    learner = CAVIA(network(name), rate, steps, LOSSES[name], **options)
    out = learner(*batch(name), task_weights=weights)
    out.loss.backward()
    losses, expected, rate_grad, contexts = unrolled(name, 0.8, steps, weights=weights, **(oracle or {}))
    expect_close(out.task_losses, losses, RTOL, "losses")
    for parameter, p in learner.model.named_parameters():
        if parameter == "context":
            assert torch.equal(p.grad, torch.zeros_like(p))
        else:
            expect_close(
                p.grad, expected[parameter], RTOL, parameter, atol=1e-13
            )  # biases before batch norm are zero by algebra
    expect_close(rate.grad, rate_grad, RTOL, "rate")
    adapted = learner.adapt(*batch(name)[:2])
    expect_close(learner.engine.unflatten(adapted.params)["context"], contexts, RTOL, "context")
    return learner


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_the_network_gets_its_exact_gradient(name, steps):
    compare(name, steps)


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_first_order(name):
    compare(name, 3, first_order=True, oracle={"order": 0})


def test_truncation():
    learner = CAVIA(network("mlp"), 0.8, 4, "mse", truncate=2)
    learner(*batch("mlp")).loss.backward()
    _, expected, _, _ = unrolled("mlp", 0.8, 4, order=2)
    for name, grad in expected.items():
        expect_close(learner.model.get_parameter(name).grad, grad, RTOL, name)


def test_task_weights():
    compare("mlp", 2, weights=torch.tensor([0.2, 0.0, 1.7], dtype=torch.float64))


def test_second_order_differs_from_first():
    grads = []
    for first_order in (False, True):
        learner = CAVIA(network("mlp"), 0.8, 2, "mse", first_order=first_order)
        learner(*batch("mlp")).loss.backward()
        grads.append(learner.model.net[0].weight.grad)
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) > 0.01


def test_the_stored_context_counts_for_nothing():
    learner = CAVIA(network("mlp"), 0.8, 2, "mse")
    expected = learner(*batch("mlp")).task_losses
    with torch.no_grad():
        learner.model.context.fill_(7.0)
        assert torch.equal(learner(*batch("mlp")).task_losses, expected)
    assert torch.equal(learner(*batch("mlp")).task_losses, expected)
    at_zero = learner.adapt(*batch("mlp")[:2], inner_steps=0).params[:, :4]
    assert torch.equal(at_zero, torch.zeros_like(at_zero))


def test_only_the_context_of_an_adapted_module_differs():
    learner = CAVIA(network("mlp"), 0.8, 3, "mse")
    adapted = learner.adapt(*batch("mlp")[:2])
    alone = adapted.module(1)
    for name, p in alone.named_parameters():
        assert torch.equal(p, learner.model.get_parameter(name)) == (name != "context")
    expect_close(alone(batch("mlp")[2][1]), adapted.predict(batch("mlp")[2])[1], 1e-12, "prediction")


def test_an_inner_optimizer_and_its_moments():
    learner = CAVIA(network("mlp"), None, 3, "mse", inner=fm.inner.Adam(0.1))
    out = learner(*batch("mlp"))
    out.loss.backward()
    weight, d, values = learner.model.net[0].weight, torch.zeros(8, 5).double(), []
    d[3, 2] = 1.0
    with torch.no_grad():
        for step in (1e-5, -1e-5):
            weight += step * d
            values.append(float(learner(*batch("mlp")).loss))
            weight -= step * d
    slope = torch.tensor((values[0] - values[1]) / 2e-5, dtype=torch.float64)
    expect_close(weight.grad[3, 2], slope, 1e-6, "finite differences")


def test_the_state_dict_is_the_models_and_no_rate_is_needed():
    learner = CAVIA(network("conv"))
    assert learner.inner_lr == 1.0
    assert list(learner.state_dict()) == list(network("conv").state_dict())
    other = CAVIA(network("conv"))
    assert other.load_state_dict(learner.state_dict()) == ([], [])


def test_the_reason_for_autodiff():
    learner = CAVIA(network("mlp"), loss="mse")
    assert not learner.engine.fused and "expand" in learner.engine.why
    assert "'film'" in CAVIA(network("conv")).engine.why
    with pytest.raises(ValueError, match="backend 'cpu' cannot run ContextInput"):
        CAVIA(network("mlp"), loss="mse", backend="cpu")


def test_refusals():
    with pytest.raises(ValueError, match=r"'\*context\*' fits no parameter of the model"):
        CAVIA(fm.models.mlp([1, 4, 1]))
    model = network("mlp")
    model.context.requires_grad_(False)
    with pytest.raises(ValueError, match="context parameter 'context' is frozen"):
        CAVIA(model)
    with pytest.raises(ValueError, match="context is 0; it must be at least 1"):
        fm.models.context_mlp([1, 4, 1], context=0)


def test_another_name_for_the_context():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.task, self.net = nn.Parameter(torch.ones(1)), nn.Linear(1, 1)

        def forward(self, x):
            return self.net(torch.tanh(x + self.task))

    learner = CAVIA(Shifted().double(), 0.5, 2, "mse", context="task")
    learner(*batch("mlp")).loss.backward()
    assert float(learner.model.task.grad) == 0.0 and bool(learner.model.net.weight.grad.any())


# ---------------------------------------------------------------- the networks


def test_context_mlp_concatenates():
    model = network("mlp")
    with torch.no_grad():
        model.context.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    x = torch.randn(6, 1, dtype=torch.float64)
    expected = model.net(torch.cat([x, model.context.expand(6, 4)], dim=1))
    assert model.net[0].in_features == 5
    expect_close(model(x), expected, 1e-15, "output")


@pytest.mark.parametrize("pooling", ["max", "stride"])
def test_context_conv4_scales_and_shifts_the_third_block(pooling):
    torch.manual_seed(0)
    how = {"in_channels": 2, "ways": 4, "filters": 6, "image_size": 32, "pooling": pooling}
    model = fm.models.context_conv4(context=3, **how).double()
    x = torch.randn(5, 2, 32, 32, dtype=torch.float64)
    assert model(x).shape == (5, 4)
    kinds = [type(layer).__name__ for layer in model.before]
    assert kinds.count("Conv2d") == 3 and kinds[-1] == ("MaxPool2d" if pooling == "max" else "BatchNorm2d")
    with torch.no_grad():  # gamma 1, beta 0: conv4 itself (pooling and ReLU commute)
        model.film.weight.zero_()
        model.film.bias.copy_(torch.cat([torch.ones(6), torch.zeros(6)]))
        plain = fm.models.conv4(**how).double()
        named = [p for n, p in model.named_parameters() if n != "context" and not n.startswith("film")]
        for p, q in zip(plain.parameters(), named, strict=True):
            p.copy_(q)
        expect_close(model(x), plain(x), 1e-12, "conv4")
        changed = model.context.add_(1.0)
        model.film.weight.normal_()
        assert not torch.allclose(model(x), plain(x)) and changed is model.context


def test_it_learns_a_family_of_sinusoids():
    torch.manual_seed(0)
    learner = CAVIA(fm.models.context_mlp([1, 20, 20, 1]), 1.0, 1, "mse")
    optimizer, losses = learner.outer_optimizer(1e-2), []
    tasks = fm.tasks.Sinusoid(shots=10, query_shots=10, seed=0)
    for _ in range(150):
        out = learner(*tasks.sample(10))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(float(out.loss.detach()))
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
