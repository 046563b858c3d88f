# ANIL against unrolled float64 autograd, and its identities (ALGORITHMS 9.7).
from __future__ import annotations

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


def test_adapts_the_head_alone():
    model, given = network("conv"), batch("conv")
    learner = fm.ANIL(model, 0.4, 3)
    assert learner.adapted == ["4.weight", "4.bias"]
    adapted = learner.adapt(given.support_x, given.support_y)
    moved = (adapted.params != theta_of(model)).any(0)
    assert torch.equal(moved, mask_of(model, "4.").bool())
    assert bool((adapted.losses[:, -1] < adapted.losses[:, 0]).all())


def test_the_head_may_be_named():
    model = network("conv")
    assert fm.ANIL(model, 0.4, head="*.bias").adapted == ["0.bias", "1.bias", "4.bias"]
    assert fm.ANIL(model, 0.4, head=["4.bias", "1.*"]).adapted == ["1.weight", "1.bias", "4.bias"]
    with pytest.raises(ValueError, match="'head.*' fits no parameter of the model"):
        fm.ANIL(model, 0.4, head="head.*")


def test_a_loss_function_and_a_layer_that_is_not_fused():
    model = nn.Sequential(nn.Linear(3, 7), nn.Softsign(), nn.Linear(7, 3)).double()
    given = batch()

    def loss(output, y):
        return nn.functional.cross_entropy(output, y, reduction="none")

    learner = fm.ANIL(model, 0.4, 2, loss)
    learner(*given).loss.backward()
    head = mask_of(model, "2.")
    rates = torch.full_like(head, 0.4)[None]
    expected = inner_oracle.unrolled(loss_of(model), theta_of(model), given, rates, 2, moved=head)
    expect_close(grad_of(model), expected.grad, RTOL, "theta")
    assert "Softsign" in learner.engine.why or "function" in learner.engine.why


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
