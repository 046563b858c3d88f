"""MAML and FOMAML as modules: the meta-gradient arrives in .grad, and torch's tools work around it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from unrolled import (
    BACKENDS,
    cross_entropy,
    flat,
    image_batch,
    meta_gradient,
    mse,
    rates_like,
    regression_batch,
    relative_error,
    small_conv,
    small_mlp,
)

from fastmaml import FOMAML, MAML
from fastmaml.models import sinusoid_mlp

EXACT = 1e-9


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def grads(model):
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def test_backward_fills_grad_with_the_exact_meta_gradient(backend):
    model, batch = small_conv(), image_batch()
    losses, expected, _ = meta_gradient(model, batch, rates_like(model, 0.2), 2)
    maml = MAML(model, inner_lr=0.2, inner_steps=2, backend=backend)
    out = maml(*batch)
    out.loss.backward()
    assert relative_error(grads(model), flat(expected)) < EXACT
    assert relative_error(out.loss.detach(), losses.mean()) < EXACT
    assert relative_error(out.task_losses, losses) < EXACT
    assert out.query_output.shape == (3, 5, 3)
    assert out.support_losses.shape == (3, 2)


def test_only_the_loss_is_differentiable(backend):
    out = MAML(small_mlp(), 0.1, loss="mse", backend=backend)(*regression_batch())
    assert out.loss.requires_grad
    assert out.loss.shape == ()
    assert not any(field.requires_grad for field in out[1:])


def test_fomaml_is_maml_with_first_order(backend):
    model, batch = small_mlp(), regression_batch()
    _, expected, _ = meta_gradient(model, batch, rates_like(model, 0.1), 3, mse, first_order=True)
    for learner in (FOMAML(model, 0.1, 3, loss="mse", backend=backend), MAML(model, 0.1, 3, "mse", True, backend)):
        model.zero_grad()
        learner(*batch).loss.backward()
        assert relative_error(grads(model), flat(expected)) < EXACT


def test_the_gradient_scales_with_grad_output_and_adds_up(backend):
    model, batch = small_mlp(), regression_batch()
    maml = MAML(model, 0.1, loss="mse", backend=backend)
    maml(*batch).loss.backward()
    once = grads(model).clone()
    (3.0 * maml(*batch).loss + nn.functional.relu(maml(*batch).loss)).backward()
    assert relative_error(grads(model), 5.0 * once) < EXACT


def test_task_weights(backend):
    model, batch = small_mlp(), regression_batch()
    weights = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    losses, expected, _ = meta_gradient(model, batch, rates_like(model, 0.1), 1, mse, task_weights=weights)
    maml = MAML(model, 0.1, loss="mse", backend=backend)
    out = maml(*batch, task_weights=weights)
    out.loss.backward()
    assert relative_error(out.loss.detach(), (losses * weights).sum()) < EXACT
    assert relative_error(grads(model), flat(expected)) < EXACT
    with torch.no_grad():
        assert relative_error(maml(*batch, task_weights=weights).loss, out.loss.detach()) < EXACT


def test_learnable_rate_gets_its_gradient(backend):
    model, batch = small_mlp(), regression_batch()
    _, _, expected = meta_gradient(model, batch, rates_like(model, 0.1), 2, mse)
    rate = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    maml = MAML(model, rate, 2, "mse", backend=backend)
    assert {id(p) for p in maml.parameters()} == {id(rate), *(id(p) for p in model.parameters())}
    maml(*batch).loss.backward()
    assert relative_error(rate.grad, flat(expected).sum()) < EXACT


def test_learnable_rates_in_a_dict_beside_fixed_ones(backend):
    model, batch = small_mlp(), regression_batch()
    names = [n for n, _ in model.named_parameters()]
    rates = dict.fromkeys(names, 0.1)
    rates["0.weight"] = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    rates["4.bias"] = nn.Parameter(torch.full((1,), 0.1, dtype=torch.float64))
    _, theta_grad, expected = meta_gradient(model, batch, rates_like(model, 0.1), 2, mse)
    maml = MAML(model, rates, 2, "mse", backend=backend)
    maml(*batch).loss.backward()
    assert relative_error(rates["0.weight"].grad, expected["0.weight"].sum()) < EXACT
    assert relative_error(rates["4.bias"].grad, expected["4.bias"]) < EXACT
    assert relative_error(grads(model), flat(theta_grad)) < EXACT
    assert maml.inner_lr["0.weight"] is rates["0.weight"]
    assert {k for k in maml.state_dict() if k.startswith("inner_lr")} == {"inner_lr.0.weight", "inner_lr.4.bias"}


def test_an_outer_step_moves_model_and_rate():
    torch.manual_seed(0)
    model = sinusoid_mlp().double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    rate = nn.Parameter(torch.tensor(0.05, dtype=torch.float64))
    maml = MAML(model, rate, 1, "mse", backend="autodiff")
    optimizer = torch.optim.Adam(maml.parameters(), 1e-2)
    batch, losses = regression_batch(), []
    for _ in range(20):
        out = maml(*batch)
        optimizer.zero_grad()
        out.loss.backward()
        nn.utils.clip_grad_norm_(maml.parameters(), 10.0)
        optimizer.step()
        losses.append(float(out.loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert float(rate.detach()) != 0.05


def test_no_sweep_runs_without_grad(backend, monkeypatch):
    model, batch = small_conv(), image_batch()
    maml = MAML(model, 0.2, 2, backend=backend)
    with_grad = maml(*batch)

    def refuse(*args, **kwargs):
        raise AssertionError("a meta-gradient was computed")

    monkeypatch.setattr(maml.engine, "meta_gradient", refuse)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = maml(*batch)
        assert not out.loss.requires_grad
        for field, expected in zip(out, with_grad):
            assert torch.allclose(field, expected.detach(), rtol=1e-10, atol=1e-12)
    for p in model.parameters():
        p.requires_grad_(False)
    assert not maml(*batch).loss.requires_grad


def test_create_graph_raises(backend):
    maml = MAML(small_mlp(), 0.1, loss="mse", backend=backend)
    loss = maml(*regression_batch()).loss
    with pytest.raises(ValueError, match="the loss of a learner has no second derivative"):
        torch.autograd.grad(loss, list(maml.parameters()), create_graph=True)


def test_a_second_backward_needs_retain_graph(backend):
    loss = MAML(small_mlp(), 0.1, loss="mse", backend=backend)(*regression_batch()).loss
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_unused_parameters_get_zeros_and_frozen_ones_nothing(backend):
    model = small_mlp()
    model.register_parameter("spare", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    model[0].bias.requires_grad_(False)
    MAML(model, 0.1, loss="mse", backend=backend)(*regression_batch()).loss.backward()
    assert torch.equal(model.spare.grad, torch.zeros(2, dtype=torch.float64))
    assert model[0].bias.grad is None
    assert model[0].weight.grad.any()


def test_bad_input_reaches_the_caller():
    x, y, qx, qy = image_batch()
    with pytest.raises(ValueError, match="query_y holds labels from 5 to"):
        MAML(small_conv(), 0.1, backend="autodiff")(x, y, qx, qy + 5)
    with pytest.raises(ValueError, match="inner_steps is -1"):
        MAML(small_conv(), 0.1, -1, backend="autodiff")


def test_adapt_predict_and_module(backend):
    model, batch = small_mlp(), regression_batch()
    maml = MAML(model, 0.1, 1, "mse", backend=backend)
    adapted = maml.adapt(batch[0], batch[1], inner_steps=4)
    assert adapted.losses.shape == (3, 4)
    assert adapted.params.shape == (3, 78)
    assert (adapted.losses[:, -1] < adapted.losses[:, 0]).all()
    predicted = adapted.predict(batch[2])
    alone = adapted.module(1)
    assert type(alone) is nn.Sequential
    assert torch.allclose(alone(batch[2][1]), predicted[1], rtol=1e-12)
    assert all(p.requires_grad for p in alone.parameters())
    with pytest.raises(ValueError, match="task 3 is not one of the 3 adapted tasks"):
        adapted.module(3)
    assert maml.adapt(batch[0], batch[1]).losses.shape == (3, 1)
    assert torch.equal(maml.adapt(batch[0], batch[1], 0).params, maml.engine.flatten().expand(3, -1))


def test_state_dict_keeps_the_models_own_keys():
    model = small_conv()
    maml = MAML(model, 0.1, backend="autodiff")
    assert list(maml.state_dict()) == list(model.state_dict())
    other = MAML(small_conv(seed=1), 0.2, backend="autodiff")
    assert other.load_state_dict(maml.state_dict()) == ([], [])
    assert torch.equal(other.engine.flatten(), maml.engine.flatten())
    small_conv(seed=2).load_state_dict(maml.state_dict())
    other.load_state_dict(small_conv(seed=3).state_dict())
    assert torch.equal(other.engine.flatten(), maml.engine.flatten(small_conv(seed=3)))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


def test_state_dict_holds_learnable_rates_and_nests():
    def make(value):
        rate = nn.Parameter(torch.tensor(value, dtype=torch.float64))
        return nn.ModuleDict({"learner": MAML(small_mlp(), rate, loss="mse", backend="autodiff")})

    one, two = make(0.1), make(0.7)
    assert set(one.state_dict()) == {f"learner.{k}" for k in [*small_mlp().state_dict(), "inner_lr"]}
    assert two.load_state_dict(one.state_dict()) == ([], [])
    assert float(two["learner"].inner_lr.detach()) == 0.1


def test_fixed_rate_tensors_move_along_and_are_not_saved():
    rates = torch.full((78,), 0.1, dtype=torch.float64)
    maml = MAML(small_mlp(), rates, loss="mse", backend="autodiff").float()
    assert maml.inner_lr.dtype == torch.float32
    assert list(maml.state_dict()) == list(small_mlp().state_dict())
    maml(*(b.float() for b in regression_batch())).loss.backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_independent_and_complete(copied, backend):
    model, batch = small_mlp(), regression_batch()
    rate = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    maml = MAML(model, rate, 2, "mse", backend=backend)
    again = copied(maml)
    assert again.engine.model is again.model
    assert again.model is not model
    maml(*batch).loss.backward()
    assert all(p.grad is None for p in again.parameters())
    again(*batch).loss.backward()
    assert torch.equal(grads(again), grads(maml))
    assert list(again.state_dict()) == list(maml.state_dict())


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, batch = small_mlp(), regression_batch()
        maml = MAML(model, 0.1, loss="mse", backend="autodiff")
        maml(*batch).loss.backward()
        expected = grads(model).clone()
        maml.zero_grad()
        parallel = nn.parallel.DistributedDataParallel(maml)
        for _ in range(2):  # the second forward raises if a parameter got no gradient in the first
            maml.zero_grad()
            parallel(*batch).loss.backward()
        assert torch.allclose(grads(model), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_dropout_is_off_in_eval_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 30), nn.Dropout(0.5), nn.Linear(30, 1)).double()
    maml, batch = MAML(model, 0.1, loss="mse"), regression_batch()
    with torch.no_grad():
        assert not torch.equal(maml(*batch).loss, maml(*batch).loss)
        maml.eval()
        assert torch.equal(maml(*batch).loss, maml(*batch).loss)


def test_a_learner_says_what_it_is():
    text = repr(MAML(small_mlp(), 0.1, 2, "mse", backend="autodiff"))
    assert text.startswith(
        "MAML(\n  inner_lr=0.1, inner_steps=2, first_order=False, backend='autodiff'\n  (model): Sequential("
    )


def test_cross_entropy_learner_improves_on_its_support_set(backend):
    model, batch = small_conv(), image_batch()
    adapted = MAML(model, 0.5, backend=backend).adapt(batch[0], batch[1], inner_steps=5)
    predicted = adapted.predict(batch[0])
    after = torch.stack([cross_entropy(o, y) for o, y in zip(predicted, batch[1])])
    assert (after < adapted.losses[:, 0]).all()


def test_torch_func_is_refused_in_one_sentence():
    model = small_mlp()
    maml = MAML(model, 0.1, 1, "mse", backend="autodiff")
    name, weight = next(iter(model.named_parameters()))

    def loss(value):
        return torch.func.functional_call(maml, {f"model.{name}": value}, regression_batch()).loss

    with pytest.raises(RuntimeError, match="torch.func cannot differentiate a learner"):
        torch.func.grad(loss)(weight.detach())
