# Meta-SGD against unrolled float64 autograd, and the start of its rates.
from __future__ import annotations

import inner_oracle
import pytest
import torch
from compare import expect_close
from small_tasks import BACKENDS, RTOL, batch, grad_of, loss_of, network, per_parameter, theta_of
from torch import nn

import fastmaml as fm


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", ["mlp", "conv"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_theta_and_rates_have_their_exact_gradient(backend, name, steps):
    model, given = network(name), batch(name)
    learner = fm.MetaSGD(model, (0.1, 0.5), steps, backend=backend)
    rates = learner.inner_lr
    out = learner(*given)
    out.loss.backward()
    expected = inner_oracle.unrolled(
        loss_of(model), theta_of(model), given, per_parameter(model, lambda n: rates[n].detach())[None], steps
    )
    expect_close(out.task_losses, expected.losses, RTOL, "losses")
    expect_close(grad_of(model), expected.grad, RTOL, "theta")
    expect_close(per_parameter(model, lambda n: rates[n].grad), expected.rate_grad[0], RTOL, "rates")


@pytest.mark.parametrize("backend", BACKENDS)
def test_rates_may_drive_another_optimizer(backend):
    model, given = network(), batch()
    learner = fm.MetaSGD(model, inner_steps=3, inner=fm.inner.SGD(0.1, momentum=0.9), backend=backend)
    learner(*given).loss.backward()
    rates = torch.full_like(theta_of(model), 0.1)[None]
    expected = inner_oracle.unrolled(loss_of(model), theta_of(model), given, rates, 3, {"momentum": 0.9})
    expect_close(grad_of(model), expected.grad, RTOL, "theta")
    expect_close(per_parameter(model, lambda n: learner.inner_lr[n].grad), expected.rate_grad[0], RTOL, "rates")


def test_equal_rates_give_the_gradients_of_maml():
    model, given = network(), batch()
    rate = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    fm.MAML(model, rate, 2)(*given).loss.backward()
    expected = grad_of(model)
    model.zero_grad()
    learner = fm.MetaSGD(model, 0.3, 2)
    learner(*given).loss.backward()
    expect_close(grad_of(model), expected, 1e-12, "theta")
    expect_close(sum(r.grad.sum() for r in learner.inner_lr.values()), rate.grad, 1e-12, "sum of the rates' gradients")


def test_rates_start_in_their_range_and_follow_the_seed():
    def rates(**how):
        return torch.cat([r.detach().reshape(-1) for r in fm.MetaSGD(network(), **how).inner_lr.values()])

    before = torch.get_rng_state()
    drawn = rates()
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn.dtype == torch.float64 and 0.005 <= float(drawn.min()) < float(drawn.max()) <= 0.1
    assert torch.equal(drawn, rates(seed=0)) and not torch.equal(drawn, rates(seed=1))
    assert torch.equal(rates(inner_lr=-0.2), torch.full_like(drawn, -0.2))
    for wrong in ((0.1, 0.005), (0.1,), "0.1"):
        with pytest.raises(ValueError, match="a number or a range"):
            rates(inner_lr=wrong)
    with pytest.raises(TypeError, match="either inner_lr .* or inner"):
        rates(inner_lr=0.1, inner=fm.inner.SGD(0.1))


def test_only_what_moves_has_a_rate():
    model = network()
    model[0].weight.requires_grad_(False)
    assert set(fm.MetaSGD(model).inner_lr) == {"0.bias", "2.weight", "2.bias"}
    learner = fm.MetaSGD(model, adapted="2.*")
    assert set(learner.inner_lr) == {"2.weight", "2.bias"}
    learner(*batch()).loss.backward()
    assert learner.inner_lr["2.weight"].grad.abs().min() > 0


def test_state_dict_holds_the_rates():
    one, two = fm.MetaSGD(network(), seed=1), fm.MetaSGD(network(seed=4), seed=2)
    names = [n for n, _ in network().named_parameters()]
    assert set(one.state_dict()) == {*names, *(f"inner_lr.{n}" for n in names)}
    two.load_state_dict(one.state_dict())
    assert torch.equal(two(*batch()).loss, one(*batch()).loss)


def test_learns_and_moves_its_rates():
    learner, given = fm.MetaSGD(network(), 0.1), batch()
    optimizer = learner.outer_optimizer(0.02)
    losses = []
    for _ in range(15):
        out = learner(*given)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(float(out.loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert float(learner.inner_lr["0.weight"].detach().std()) > 0


def test_a_loss_function_and_a_layer_that_is_not_fused():
    model, given = nn.Sequential(nn.Linear(3, 7), nn.Softsign(), nn.Linear(7, 3)).double(), batch()
    learner = fm.MetaSGD(model, 0.3, 2, lambda z, y: nn.functional.cross_entropy(z, y, reduction="none"))
    learner(*given).loss.backward()
    rates = torch.full_like(theta_of(model), 0.3)[None]
    expected = inner_oracle.unrolled(loss_of(model), theta_of(model), given, rates, 2)
    expect_close(grad_of(model), expected.grad, RTOL, "theta")
    expect_close(per_parameter(model, lambda n: learner.inner_lr[n].grad), expected.rate_grad[0], RTOL, "rates")
    with pytest.raises(ValueError, match=r"support_y \[2, 6\] .* \[3, 6, 3\]"):
        learner(given.support_x, given.support_y[:2], *given[2:])
