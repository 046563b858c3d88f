# ANIL against unrolled float64 autograd, and its identities (ALGORITHMS 9.7).
from __future__ import annotations

import copy
import pickle

import inner_oracle
import pytest
import torch
from compare import expect_close
from small_tasks import BACKENDS, RTOL, batch, grad_of, loss_of, mask_of, network, theta_of
from torch import nn

import fastmaml as fm

HEAD = {"mlp": "2.", "conv": "4."}


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", ["mlp", "conv"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_meta_gradient_is_exact(backend, name, steps):
    model, given = network(name), batch(name)
    rate = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
    out = fm.ANIL(model, rate, steps, backend=backend)(*given)
    out.loss.backward()
    head = mask_of(model, HEAD[name])
    expected = inner_oracle.unrolled(
        loss_of(model), theta_of(model), given, torch.full_like(head, 0.4)[None], steps, moved=head
    )
    expect_close(out.task_losses, expected.losses, RTOL, "losses")
    expect_close(grad_of(model), expected.grad, RTOL, "theta")
    expect_close(rate.grad, expected.rate_grad.sum(), RTOL, "rate")
    assert bool((grad_of(model)[head == 0] != 0).any())


@pytest.mark.parametrize("how", [{"inner": fm.inner.Adam(0.05)}, {"inner": fm.inner.SGD(0.3, clip_norm=0.2)}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_inner_optimizer(backend, how):
    model, given = network(), batch()
    fm.ANIL(model, inner_steps=3, backend=backend, **how)(*given).loss.backward()
    head = mask_of(model, "2.")
    rule = {"adam": 1} if isinstance(how["inner"], fm.inner.Adam) else {"clip_norm": 0.2}
    rates = torch.full_like(head, how["inner"].lr)[None]
    expected = inner_oracle.unrolled(loss_of(model), theta_of(model), given, rates, 3, rule, moved=head)
    expect_close(grad_of(model), expected.grad, RTOL, "theta")


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_first_order_and_truncated(backend, order):
    model, given = network("conv"), batch("conv")
    how = {"first_order": True} if order == 0 else {"truncate": order}
    fm.ANIL(model, 0.4, 3, backend=backend, **how)(*given).loss.backward()
    head = mask_of(model, "4.")
    rates = torch.full_like(head, 0.4)[None]
    expected = inner_oracle.unrolled(loss_of(model), theta_of(model), given, rates, 3, order=order, moved=head)
    expect_close(grad_of(model), expected.grad, RTOL, "theta")


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_is_maml_with_rate_zero_on_the_body(name):
    model, given = network(name), batch(name)
    fm.ANIL(model, 0.4, 3)(*given).loss.backward()
    anil = grad_of(model)
    model.zero_grad()
    fm.MAML(model, 0.4 * mask_of(model, HEAD[name]), 3)(*given).loss.backward()
    expect_close(anil, grad_of(model), 1e-11, "masked rates")


@pytest.mark.parametrize("rates", ["number", "scalar", "per step", "dict", "vector"])
@pytest.mark.parametrize("backend", ("autodiff", "cpu"))
def test_learned_rates_of_every_form(backend, rates):
    """The features are computed once (cpu) where the rates can be told apart by parameter; the numbers are the same."""
    model, given = network("conv"), batch("conv")
    head, full = mask_of(model, "4."), torch.full_like(theta_of(model), 0.4)
    learned = {
        "number": 0.4,
        "scalar": nn.Parameter(full[0].clone()),
        "per step": nn.Parameter(full[:3, None].clone()),
        "dict": {n: nn.Parameter(torch.full_like(p, 0.4)) for n, p in model.named_parameters()},
        "vector": nn.Parameter(full.clone()),
    }[rates]
    learner = fm.ANIL(model, learned, 3, backend=backend)
    learner(*given).loss.backward()
    expected = inner_oracle.unrolled(loss_of(model), theta_of(model), given, full.expand(3, -1), 3, moved=head)
    expect_close(grad_of(model), expected.grad, RTOL, "theta")
    by_rate = expected.rate_grad
    if rates == "scalar":
        expect_close(learned.grad, by_rate.sum(), RTOL, "rate")
    elif rates == "per step":
        expect_close(learned.grad, by_rate.sum(1, keepdim=True), RTOL, "rates")
    elif rates == "vector":
        expect_close(learned.grad, by_rate.sum(0), RTOL, "rates")
    elif rates == "dict":
        expect_close(torch.cat([r.grad.flatten() for r in learned.values()]), by_rate.sum(0), RTOL, "rates")


@pytest.mark.parametrize("frozen", [["0.weight", "4.bias"], ["0.weight", "0.bias", "1.weight", "1.bias"]], ids=str)
def test_frozen_parameters(frozen):
    model, given = network("conv"), batch("conv")
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    fm.ANIL(model, 0.4, 2, backend="cpu")(*given).loss.backward()
    still = mask_of(model, *frozen)
    moved = mask_of(model, "4.") * (1 - still)
    rates = torch.full_like(moved, 0.4)[None]
    expected = inner_oracle.unrolled(loss_of(model), theta_of(model), given, rates, 2, moved=moved)
    got = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
    expect_close(got, expected.grad * (1 - still), RTOL, "theta")


def test_the_body_runs_once_for_each_set(monkeypatch):
    learner, given = fm.ANIL(network("conv"), 0.4, 5, backend="cpu"), batch("conv")
    calls = []
    forward, vjp = learner.linear_head.body.forward, learner.linear_head.body.vjp
    monkeypatch.setattr(learner.linear_head.body, "forward", lambda *a: calls.append("forward") or forward(*a))
    monkeypatch.setattr(learner.linear_head.body, "vjp", lambda *a: calls.append("vjp") or vjp(*a))
    learner(*given)
    assert sorted(calls) == ["forward", "forward", "vjp", "vjp"]
    calls.clear()
    learner.adapt(*given[:2], inner_steps=10)
    assert calls == ["forward"]


def test_other_networks_take_the_plain_sweep():
    def splits(model, **how):
        return fm.ANIL(model.double(), 0.4, **how).linear_head is not None

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.body(x)))

    tied = nn.Linear(3, 3)
    assert splits(network()) and splits(network("conv"), batch_norm="frozen")
    assert not splits(Own()) and not splits(network(), head="2.bias") and not splits(network(), backend="autodiff")
    assert not splits(nn.Sequential(tied, nn.Tanh(), tied)) and not splits(network("conv"), batch_norm="support")
    assert not splits(nn.Sequential(nn.Tanh(), nn.Linear(3, 3))) and not splits(
        nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    )


@pytest.mark.parametrize("how", [{"batch_norm": "frozen"}, {"label_smoothing": 0.1}], ids=str)
def test_engine_options_reach_body_and_head(how):
    model, given = network("conv"), batch("conv")
    model[1].running_mean.normal_()
    fm.ANIL(model, 0.4, 2, backend="cpu", **how)(*given).loss.backward()
    split = grad_of(model)
    model.zero_grad()
    fm.MAML(model, 0.4, 2, backend="cpu", adapted="4.*", **how)(*given).loss.backward()
    expect_close(split, grad_of(model), 1e-11, "plain sweep")


def test_regression_and_steps_0():
    model, (x, _, qx, _) = network(), batch()
    given = (x, torch.tanh(x), qx, torch.tanh(qx))
    for steps in (0, 2):
        model.zero_grad()
        fm.ANIL(model, 0.4, steps, "mse", backend="cpu")(*given).loss.backward()
        split = grad_of(model)
        model.zero_grad()
        fm.MAML(model, 0.4, steps, "mse", backend="cpu", adapted="2.*")(*given).loss.backward()
        expect_close(split, grad_of(model), 1e-11, f"{steps} steps")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_has_a_body_and_head_of_its_own(copied):
    learner, given = fm.ANIL(network(), 0.4, 2, backend="cpu"), batch()
    again = copied(learner)
    learner(*given).loss.backward()
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.zero_()
    again(*given).loss.backward()
    assert torch.equal(grad_of(again.model), grad_of(learner.model))


def test_adapts_the_head_alone():
    model, given = network("conv"), batch("conv")
    learner = fm.ANIL(model, 0.4, 3)
    assert learner.adapted == ["4.weight", "4.bias"]
    adapted = learner.adapt(given.support_x, given.support_y)
    moved = (adapted.params != theta_of(model)).any(0)
    assert torch.equal(moved, mask_of(model, "4.").bool())
    plain = fm.MAML(model, 0.4, 3, adapted="4.*").adapt(given.support_x, given.support_y)
    expect_close(adapted.params, plain.params, 1e-11, "plain loop")
    expect_close(adapted.losses, plain.losses, 1e-11, "support losses")
    assert bool((adapted.losses[:, -1] < adapted.losses[:, 0]).all())


def test_the_head_may_be_named():
    model = network("conv")
    assert fm.ANIL(model, 0.4, head="*.bias").adapted == ["0.bias", "1.bias", "4.bias"]
    assert fm.ANIL(model, 0.4, head=["4.bias", "1.*"]).adapted == ["1.weight", "1.bias", "4.bias"]
    with pytest.raises(ValueError, match="'head.*' fits no parameter of the model"):
        fm.ANIL(model, 0.4, head="head.*")


@pytest.mark.parametrize("layer", [nn.Tanh, nn.Softsign])
def test_a_loss_function_and_a_layer_that_is_not_fused(layer):
    model = nn.Sequential(nn.Linear(3, 7), layer(), nn.Linear(7, 3)).double()
    given = batch()

    def loss(output, y):
        return nn.functional.cross_entropy(output, y, reduction="none")

    learner = fm.ANIL(model, 0.4, 2, loss)
    learner(*given).loss.backward()
    head = mask_of(model, "2.")
    rates = torch.full_like(head, 0.4)[None]
    expected = inner_oracle.unrolled(loss_of(model), theta_of(model), given, rates, 2, moved=head)
    expect_close(grad_of(model), expected.grad, RTOL, "theta")
    assert (layer is nn.Softsign) == ("Softsign" in learner.engine.why)


def test_task_weights():
    model, given = network(), batch()
    weights = torch.tensor([0.2, 0.0, 1.5]).double()
    out = fm.ANIL(model, 0.4, 2)(*given, task_weights=weights)
    out.loss.backward()
    head = mask_of(model, "2.")
    rates = torch.full_like(head, 0.4)[None]
    expected = inner_oracle.unrolled(loss_of(model), theta_of(model), given, rates, 2, moved=head, task_weights=weights)
    expect_close(out.loss.detach(), expected.losses @ weights, RTOL, "loss")
    expect_close(grad_of(model), expected.grad, RTOL, "theta")


def test_wrong_arguments_name_their_shapes():
    learner, given = fm.ANIL(network(), 0.4), batch()
    with pytest.raises(ValueError, match=r"support_y \[2, 6\] .* \[3, 6, 3\]"):
        learner(given.support_x, given.support_y[:2], given.query_x, given.query_y)
    with pytest.raises(ValueError, match=r"\[3, 6, 2\]"):
        learner(given.support_x[..., :2], given.support_y, given.query_x, given.query_y)


def test_state_dict_is_the_models():
    one, two = fm.ANIL(network(), 0.4), fm.ANIL(network(seed=3), 0.4)
    assert list(one.state_dict()) == list(network().state_dict())
    two.load_state_dict(one.state_dict())
    assert torch.equal(two(*batch()).loss, one(*batch()).loss)
