# BOIL against unrolled float64 autograd.
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
    out = fm.BOIL(model, rate, steps, backend=backend)(*given)
    out.loss.backward()
    body = 1 - mask_of(model, HEAD[name])
    expected = inner_oracle.unrolled(
        loss_of(model), theta_of(model), given, torch.full_like(body, 0.4)[None], steps, moved=body
    )
    expect_close(out.task_losses, expected.losses, RTOL, "losses")
    expect_close(grad_of(model), expected.grad, RTOL, "theta")
    expect_close(rate.grad, expected.rate_grad.sum(), RTOL, "rate")


def test_the_head_stays_and_is_meta_trained_through_the_hessian():
    model, given = network("conv"), batch("conv")
    learner, head = fm.BOIL(model, 0.4, 2), mask_of(model, "4.").bool()
    adapted = learner.adapt(given.support_x, given.support_y)
    assert torch.equal(adapted.params[:, head], theta_of(model)[head].expand(3, -1))
    learner(*given).loss.backward()
    exact = grad_of(model)[head]
    model.zero_grad()
    fm.BOIL(model, 0.4, 2, first_order=True)(*given).loss.backward()
    assert float((exact - grad_of(model)[head]).norm() / exact.norm()) > 1e-2


def test_the_head_may_be_named_and_must_leave_a_body():
    model = network()
    assert fm.BOIL(model, 0.4).adapted == ["0.weight", "0.bias"]
    assert fm.BOIL(model, 0.4, head="*.bias").adapted == ["0.weight", "2.weight"]
    with pytest.raises(ValueError, match=r"the head \(weight, bias\) is the whole model"):
        fm.BOIL(nn.Linear(3, 3), 0.4)
    with pytest.raises(ValueError, match="'head.*' fits no parameter of the model"):
        fm.BOIL(model, 0.4, head="head.*")


def test_a_loss_function_and_a_layer_that_is_not_fused():
    model, given = nn.Sequential(nn.Linear(3, 7), nn.Softsign(), nn.Linear(7, 3)).double(), batch()
    learner = fm.BOIL(model, 0.4, 2, lambda z, y: nn.functional.cross_entropy(z, y, reduction="none"))
    learner(*given).loss.backward()
    body = mask_of(model, "0.")
    rates = torch.full_like(body, 0.4)[None]
    expected = inner_oracle.unrolled(loss_of(model), theta_of(model), given, rates, 2, moved=body)
    expect_close(grad_of(model), expected.grad, RTOL, "theta")
    with pytest.raises(ValueError, match=r"support_y \[2, 6\] .* \[3, 6, 3\]"):
        learner(given.support_x, given.support_y[:2], *given[2:])


def test_state_dict_is_the_models():
    one, two = fm.BOIL(network(), 0.4), fm.BOIL(network(seed=3), 0.4)
    assert list(one.state_dict()) == list(network().state_dict())
    two.load_state_dict(one.state_dict())
    assert torch.equal(two(*batch()).loss, one(*batch()).loss)
