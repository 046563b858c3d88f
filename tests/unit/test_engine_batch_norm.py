"""The batch norm modes against batch norm from elementary operations, with plain double backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from unrolled import BACKENDS, flat, image_batch, meta_gradient, rates_like, relative_error, small_conv

from fastmaml import MAML, Engine

EXACT = 1e-9


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def written_out(mode, running_mean=None, running_var=None, eps=1e-5):
    """The forward of small_conv with its batch norm as elementary operations; statistics as the mode says."""

    def convolution(p, x):
        return F.conv2d(x, p["0.weight"], p["0.bias"], padding=1)

    def forward(p, x, support_x):
        h = convolution(p, x)
        if mode == "frozen":
            mean, var = running_mean, running_var
        else:
            of = h if mode == "transductive" else convolution(p, support_x)
            mean = of.mean((0, 2, 3))
            var = (of - mean[:, None, None]).square().mean((0, 2, 3))
        h = (h - mean[:, None, None]) / (var[:, None, None] + eps).sqrt()
        h = h * p["1.weight"][:, None, None] + p["1.bias"][:, None, None]
        return F.linear(F.max_pool2d(F.relu(h), 2).flatten(1), p["5.weight"], p["5.bias"])

    return forward


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("mode", ["transductive", "support", "frozen"])
def test_meta_gradient_in_every_mode(mode, steps, backend):
    model, batch = small_conv(), image_batch()
    torch.manual_seed(5)
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2.0)
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 1.5)
        model[1].bias.normal_()
    forward = written_out(mode, model[1].running_mean.clone(), model[1].running_var.clone())
    losses, grads, _ = meta_gradient(model, batch, rates_like(model, 0.2), steps, forward=forward)
    engine = Engine(model, backend=backend, batch_norm=mode)
    result = engine.meta_gradient(engine.flatten(), batch, 0.2, steps)
    assert relative_error(result.loss, losses) < EXACT
    assert relative_error(result.grad, flat(grads)) < EXACT


@pytest.mark.parametrize("mode", ["transductive", "support", "frozen"])
def test_running_buffers_are_never_touched(mode, backend):
    model, batch = small_conv(), image_batch()
    before = {n: b.clone() for n, b in model.named_buffers()}
    engine = Engine(model, backend=backend, batch_norm=mode)
    engine.meta_gradient(engine.flatten(), batch, 0.2, 2)
    engine.forward(engine.flatten(), batch[2], support_x=batch[0])
    assert all(torch.equal(before[n], b) for n, b in model.named_buffers())
    assert model[1].training
    assert model[1].track_running_stats


def test_training_flag_does_not_change_the_mode(backend):
    model, batch = small_conv(), image_batch()
    engine = Engine(model, backend=backend)
    theta = engine.flatten()
    train = engine.meta_gradient(theta, batch, 0.2, 1).grad
    model.eval()
    assert torch.equal(train, engine.meta_gradient(theta, batch, 0.2, 1).grad)


def test_support_mode_takes_query_examples_one_by_one(backend):
    model, batch = small_conv(), image_batch(query=6)
    engine = Engine(model, backend=backend, batch_norm="support")
    theta = engine.flatten()
    together = engine.forward(theta, batch[2], support_x=batch[0])
    alone = [engine.forward(theta, batch[2][:, i : i + 1].contiguous(), support_x=batch[0]) for i in range(6)]
    assert torch.allclose(together, torch.cat(alone, 1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["transductive", "support", "frozen"])
def test_a_module_of_one_task_predicts_alone_what_predict_says(mode, backend):
    model, batch = small_conv(), image_batch()
    torch.manual_seed(6)
    model[1].running_mean.normal_()
    maml = MAML(model, inner_lr=0.2, inner_steps=2, backend=backend, batch_norm=mode)
    adapted = maml.adapt(batch[0], batch[1])
    predicted = adapted.predict(batch[2])
    for task in (0, 2):
        alone = adapted.module(task)
        assert isinstance(alone, nn.Sequential)
        with torch.no_grad():
            assert torch.allclose(alone(batch[2][task]), predicted[task], rtol=1e-10, atol=1e-12)
    assert model[1].training


def test_one_value_per_channel_is_refused(backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    batch = image_batch(support=1, shape=(3,), classes=2)
    engine = Engine(model, backend=backend)
    with pytest.raises(ValueError, match=r"more than (1|one) value per channel.*\[(3, )?1, (3|4)\]"):
        engine.meta_gradient(engine.flatten(), batch, 0.1, 1)


def test_modes_are_checked():
    with pytest.raises(ValueError, match="'per_step' belongs to MAML"):
        Engine(small_conv(), batch_norm="per_step")
    with pytest.raises(ValueError, match="'running' is not one of transductive, support, frozen"):
        Engine(small_conv(), batch_norm="running")
    stateless = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False))
    with pytest.raises(ValueError, match=r"layer '1' \(BatchNorm2d\) keeps none"):
        Engine(stateless, batch_norm="frozen")


def test_vmapped_tasks_agree_with_single_ones():
    # torch.func.vmap of reverse-over-reverse through F.batch_norm is silently wrong on torch 2.13; forward-over-reverse is not.
    model, batch = small_conv(), image_batch(tasks=4)
    engine = Engine(model, backend="autodiff")
    params = engine.flatten() + 0.1 * torch.randn(4, engine.layout.size, dtype=torch.float64)
    v = torch.randn_like(params)
    together = engine.hvp(params, *batch[:2], v)
    for task in range(4):
        one = slice(task, task + 1)
        alone = engine.hvp(params[one], batch[0][one], batch[1][one], v[one])
        assert relative_error(together[one], alone) < EXACT
