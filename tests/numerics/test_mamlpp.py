# MAML++ against unrolled float64 autograd, and its identities (ALGORITHMS 9.6). Parts: the multi-step loss and its
# schedule, rates per step and tensor, batch norm per step (affine rows, running statistics), derivative-order annealing.
from __future__ import annotations

import inner_oracle
import pytest
import torch
from compare import expect_close
from small_tasks import BACKENDS, NORM, RTOL, TASKS, batch, grad_of, loss_of, mask_of, network, per_parameter, theta_of
from torch import nn
from torch.func import functional_call

import fastmaml as fm

F64 = torch.float64


def perturbed(learner: fm.MAMLPlusPlus) -> fm.MAMLPlusPlus:
    """Rates and rows that differ from step to step, as after some training."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in [*learner.learned_rates.values(), *learner.step_rows.values()]:
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return learner


def rates_of(learner: fm.MAMLPlusPlus) -> torch.Tensor:
    """[K, P]; 0 where a parameter has no rate."""
    rates, K = learner.inner_lr, learner.inner_steps

    def of_step(k):
        def of_name(name):
            rate = rates.get(name)
            return 0.0 if rate is None else rate.detach()[k]

        return per_parameter(learner.model, of_name)

    return torch.stack([of_step(k) for k in range(K)])


def rows_of(learner: fm.MAMLPlusPlus, grad: bool = False) -> torch.Tensor:
    rows = [learner.step_rows[name.replace(".", "/")] for name in NORM]
    return torch.cat([r.grad if grad else r.detach() for r in rows], dim=1)


def places_of(model: nn.Module) -> torch.Tensor:
    return mask_of(model, "1.").nonzero().squeeze(1)


def weights_at(epoch: int, steps: int, epochs: int) -> list[float]:
    """Written from the paper's schedule as ALGORITHMS 2.4 quotes it."""
    if epoch >= epochs:
        return [0.0] * steps + [1.0]
    least = 0.03 / steps
    others = max(1 / steps - epoch / (steps * epochs), least)
    last = min(1 / steps + epoch * (steps - 1) / (steps * epochs), 1 - (steps - 1) * least)
    return [0.0] + [others] * (steps - 1) + [last]


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("epoch", [0, 4, 10])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_gradient_is_exact(backend, epoch, steps):
    model, given = network("conv"), batch("conv")
    learner = perturbed(fm.MAMLPlusPlus(model, 0.3, steps, backend=backend))
    learner.at_step(500 * epoch)
    out = learner(*given)
    out.loss.backward()
    moved = 1 - mask_of(model, "1.")
    rows = (places_of(model), rows_of(learner))
    expected = inner_oracle.unrolled(
        loss_of(model), theta_of(model), given, rates_of(learner), steps,
        loss_weights=weights_at(epoch, steps, 10), moved=moved, rows=rows,
    )  # fmt: skip
    expect_close(out.task_losses, expected.losses, RTOL, "losses")
    expect_close(out.loss.detach(), expected.losses.mean(), RTOL, "loss")
    expect_close(grad_of(model), expected.grad * moved, RTOL, "theta")
    expect_close(rows_of(learner, grad=True), expected.rows_grad, RTOL, "rows")
    pieces = learner.engine.layout.split(expected.rate_grad)
    got = torch.stack([rate.grad.flatten() for rate in learner.inner_lr.values()])
    expect_close(got, torch.stack([pieces[n].flatten(1).sum(1) for n in learner.inner_lr]), RTOL, "rates [tensor, K]")


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_first_order_until_the_annealing_ends(backend, first_order):
    model, given = network("conv"), batch("conv")
    learner = perturbed(fm.MAMLPlusPlus(model, 0.3, 3, da_epochs=2, steps_per_epoch=10, backend=backend))
    learner.at_step(29 if first_order else 30)  # epochs 2 and 3: first order while epoch <= 2
    learner(*given).loss.backward()
    moved = 1 - mask_of(model, "1.")
    expected = inner_oracle.unrolled(
        loss_of(model), theta_of(model), given, rates_of(learner), 3, order=0 if first_order else None,
        loss_weights=weights_at(2 if first_order else 3, 3, 10), moved=moved, rows=(places_of(model), rows_of(learner)),
    )  # fmt: skip
    expect_close(grad_of(model), expected.grad * moved, RTOL, "theta")
    expect_close(rows_of(learner, grad=True), expected.rows_grad, RTOL, "rows")


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_inner_optimizer(backend):
    model, given = network("conv"), batch("conv")
    how = {"inner": fm.inner.SGD(0.2, momentum=0.9, clip_norm=1.0), "msl_epochs": 0}
    learner = perturbed(fm.MAMLPlusPlus(model, inner_steps=3, backend=backend, **how))
    learner(*given).loss.backward()
    moved = 1 - mask_of(model, "1.")
    expected = inner_oracle.unrolled(
        loss_of(model), theta_of(model), given, rates_of(learner), 3, {"momentum": 0.9, "clip_norm": 1.0},
        moved=moved, rows=(places_of(model), rows_of(learner)),
    )  # fmt: skip
    expect_close(grad_of(model), expected.grad * moved, RTOL, "theta")


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_weights_of_the_multi_step_loss(steps):
    learner = fm.MAMLPlusPlus(network(), inner_steps=steps, msl_epochs=15, steps_per_epoch=4)
    for epoch in range(15):
        learner.at_step(4 * epoch + 3)
        weights = learner.loss_weights()
        assert weights.tolist() == pytest.approx(weights_at(epoch, steps, 15), rel=1e-12)
        assert epoch > 0 or weights[1:].tolist() == pytest.approx([1 / steps] * steps)
    learner.at_step(60)
    assert learner.loss_weights() is None
    assert fm.MAMLPlusPlus(network(), msl_epochs=0).loss_weights() is None


def test_after_the_schedule_without_the_rest_it_is_maml():
    model, given = network("conv"), batch("conv")
    how = {"msl_epochs": 0, "learn_rates": False, "per_step_norm": False}
    fm.MAMLPlusPlus(model, 0.3, 3, adapt_norm=True, **how)(*given).loss.backward()
    plain = grad_of(model)
    model.zero_grad()
    fm.MAML(model, 0.3, 3)(*given).loss.backward()
    expect_close(plain, grad_of(model), 1e-12, "MAML")


def test_one_hot_weights_give_maml(monkeypatch):
    model, given = network("conv"), batch("conv")
    learner = fm.MAMLPlusPlus(model, 0.3, 3, learn_rates=False, adapt_norm=True)
    monkeypatch.setattr(learner, "loss_weights", lambda: torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=F64))
    learner(*given).loss.backward()
    one_hot = grad_of(model)
    model.zero_grad()
    fm.MAML(model, 0.3, 3)(*given).loss.backward()
    expect_close(one_hot, grad_of(model), 1e-12, "MAML")


def test_gradients_of_equal_rates_sum_to_that_of_one_rate():
    model, given = network(), batch()
    learner = fm.MAMLPlusPlus(model, 0.3, 4, msl_epochs=0)
    learner(*given).loss.backward()
    rate = nn.Parameter(torch.tensor(0.3, dtype=F64))
    fm.MAML(network(), rate, 4)(*given).loss.backward()
    expect_close(sum(r.grad.sum() for r in learner.inner_lr.values()), rate.grad, 1e-11, "sum")


def test_equal_rows_sum_to_the_gradient_of_shared_affines():
    """Rows that are equal are batch norm's own gamma and beta, not adapted but meta-trained."""
    model, given = network("conv"), batch("conv")
    per_step = fm.MAMLPlusPlus(model, 0.3, 4)
    per_step(*given).loss.backward()
    shared = fm.MAMLPlusPlus(network("conv"), 0.3, 4, per_step_norm=False)
    shared(*given).loss.backward()
    for name, row in per_step.step_rows.items():
        expect_close(row.grad.sum(0), shared.model.get_parameter(name.replace("/", ".")).grad, 1e-11, name)
    assert set(shared.adapted) == set(per_step.adapted) == {"0.weight", "0.bias", "4.weight", "4.bias"}


def test_norm_may_be_adapted():
    learner = fm.MAMLPlusPlus(network("conv"), 0.3, 2, adapt_norm=True)
    assert len(learner.step_rows) == 0 and set(NORM) <= set(learner.inner_lr)
    adapted = learner.adapt(*batch("conv")[:2])
    assert bool(
        (adapted.params[:, places_of(learner.model)] != theta_of(learner.model)[places_of(learner.model)]).any()
    )


def test_rates_and_rows_start_as_given():
    learner = fm.MAMLPlusPlus(network("conv"), 0.3, 4)
    assert {n: list(r.shape) for n, r in learner.inner_lr.items()} == {
        "0.weight": [4, 1, 1, 1, 1], "0.bias": [4, 1], "4.weight": [4, 1, 1], "4.bias": [4, 1],
    }  # fmt: skip
    assert all(bool((r == 0.3).all()) for r in learner.inner_lr.values())
    assert torch.equal(learner.step_rows["1/bias"], learner.model[1].bias.expand(4, 3))
    assert len(list(learner.parameters())) == 6 + 4 + 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_further_steps_reuse_the_last_rate_and_row(backend):
    model, given = network("conv"), batch("conv")
    learner = perturbed(fm.MAMLPlusPlus(model, 0.3, 2, backend=backend))
    adapted = learner.adapt(given.support_x, given.support_y, inner_steps=4)
    rates, rows, places = rates_of(learner), rows_of(learner), places_of(model)
    for task in range(TASKS):
        phi = theta_of(model)
        for k in range(4):
            phi = phi.index_copy(0, places, rows[min(k, 1)]).requires_grad_()
            (g,) = torch.autograd.grad(loss_of(model)(phi, given.support_x[task], given.support_y[task]), phi)
            phi = (phi - rates[min(k, 1)] * g).detach()
        expect_close(adapted.params[task], phi, 1e-11, f"task {task}")
    at_once = learner.adapt(given.support_x, given.support_y, inner_steps=0)
    expect_close(at_once.params[0][places], rows[0], 1e-15, "without a step, row 0")


@pytest.mark.parametrize("per_task", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("steps", [0, 3])
def test_the_engine_takes_more_or_fewer_rows_than_steps(steps, rows, per_task):
    model, given = network("conv"), batch("conv")
    generator = torch.Generator().manual_seed(5)
    values = {n: torch.randn(rows, 3, generator=generator, dtype=F64) for n in NORM}
    got, expected = (
        fm.Engine(model, backend=backend).meta_gradient(
            theta_of(model), given, 0.3, steps, step_rows=values, per_task=per_task
        )
        for backend in ("cpu", "autodiff")
    )
    expect_close(got.loss, expected.loss, 1e-11, "loss")
    expect_close(got.grad, expected.grad, 1e-10, "grad")
    for name in NORM:
        assert got.step_rows_grad[name].shape == (*([TASKS] if per_task else []), rows, 3)
        expect_close(got.step_rows_grad[name], expected.step_rows_grad[name], 1e-10, name)


def test_validation_judges_the_last_step_alone():
    model, given = network("conv"), batch("conv")
    learner = fm.MAMLPlusPlus(model, 0.3, 3)
    with torch.no_grad():
        out = learner(*given)
    predicted = learner.adapt(given.support_x, given.support_y).predict(given.query_x)
    expect_close(out.task_losses, learner.engine.loss(predicted, given.query_y), 1e-12, "loss at phi[K]")


# ---- bn_stats="running_per_step"


def norm_twin(model: nn.Module, steps: int, values: torch.Tensor) -> list[nn.BatchNorm2d]:
    """A plain nn.BatchNorm2d for each step, with that step's affine row."""
    twins = [nn.BatchNorm2d(3, eps=model[1].eps).double() for _ in range(steps)]
    for twin, row in zip(twins, values):
        twin.weight.data, twin.bias.data = row[:3].clone(), row[3:].clone()
    return twins


def forward_with(model: nn.Module, norm: nn.Module, phi: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    pieces = dict(zip((n for n, _ in model.named_parameters()), phi.split([p.numel() for p in model.parameters()])))
    values = {n: pieces[n].view(p.shape) for n, p in model.named_parameters() if not n.startswith("1.")}
    swapped = nn.Sequential(model[0], norm, *model[2:])
    return functional_call(swapped, values, (x,))


@pytest.mark.parametrize("epoch", [0, 10])
@pytest.mark.parametrize("backend", BACKENDS)
def test_running_statistics_are_those_of_torch(backend, epoch):
    model, given, steps = network("conv"), batch("conv"), 3
    learner = perturbed(fm.MAMLPlusPlus(model, 0.3, steps, bn_stats="running_per_step", backend=backend))
    learner.at_step(500 * epoch)
    twins, rates = norm_twin(model, steps, rows_of(learner)), rates_of(learner)
    for _ in range(2):
        learner(*given).loss.backward()
        for support_x, support_y, query_x, _ in zip(*given):
            phi = theta_of(model)
            for k, twin in enumerate(twins):
                phi.requires_grad_()
                loss = nn.functional.cross_entropy(forward_with(model, twin, phi, support_x), support_y)
                phi = (phi - rates[k] * torch.autograd.grad(loss, phi, materialize_grads=True)[0]).detach()
                if epoch == 0 or k == steps - 1:  # the query passes of the multi-step loss
                    forward_with(model, twin, phi, query_x)
    expect_close(learner.running_mean, torch.stack([t.running_mean for t in twins]), 1e-10, "mean")
    expect_close(learner.running_var, torch.stack([t.running_var for t in twins]), 1e-10, "var")
    assert torch.equal(model[1].running_mean, torch.zeros(3, dtype=F64))  # the model's own are left alone

    # At evaluation they normalise; further steps use the last row.
    learner.eval()
    adapted = learner.adapt(given.support_x, given.support_y, inner_steps=4)
    assert adapted.losses.shape == (TASKS, 4)
    for twin in twins:
        twin.eval()
    for task in range(TASKS):
        phi = theta_of(model)
        for k in range(4):
            twin = twins[min(k, 2)]
            phi.requires_grad_()
            output = forward_with(model, twin, phi, given.support_x[task])
            (g,) = torch.autograd.grad(
                nn.functional.cross_entropy(output, given.support_y[task]), phi, materialize_grads=True
            )
            phi = (phi - rates[min(k, 2)] * g).detach()
        expected = forward_with(model, twins[2], phi, given.query_x[task]).detach()
        expect_close(adapted.predict(given.query_x)[task], expected, 1e-9, f"task {task}")
        expect_close(adapted.module(task)(given.query_x[task]).detach(), expected, 1e-9, f"module of task {task}")
    before = learner.running_mean.clone()
    with torch.no_grad():
        learner(*given)
    assert torch.equal(learner.running_mean, before)


def test_bn_stats_must_be_known_and_possible():
    with pytest.raises(ValueError, match="bn_stats 'running' is not one of batch, running_per_step"):
        fm.MAMLPlusPlus(network("conv"), bn_stats="running")
    with pytest.raises(ValueError, match=r"the model \(Sequential\) has no batch norm"):
        fm.MAMLPlusPlus(network(), bn_stats="running_per_step")
    with pytest.raises(ValueError, match="does not go with batch_norm='support'"):
        fm.MAMLPlusPlus(network("conv"), bn_stats="running_per_step", batch_norm="support")
    with pytest.raises(ValueError, match="inner_steps is 0"):
        fm.MAMLPlusPlus(network(), inner_steps=0)


# ---- as any learner


def test_state_dict_holds_rates_rows_and_statistics():
    def make(seed):
        return fm.MAMLPlusPlus(network("conv", seed), 0.1 * seed, 3, bn_stats="running_per_step")

    one, two = perturbed(make(1)), make(2)
    one(*batch("conv"))
    extra = {f"inner_lr.{n}" for n in one.inner_lr} | {f"step_rows.{n}" for n in NORM} | {"running_mean", "running_var"}
    assert set(one.state_dict()) == set(network("conv").state_dict()) | extra
    assert two.load_state_dict(one.state_dict()) == ([], [])
    assert torch.equal(two.running_var, one.running_var) and not torch.equal(two.running_var, torch.ones(3, 3))
    with torch.no_grad():
        assert torch.equal(one.eval()(*batch("conv")).loss, two.eval()(*batch("conv")).loss)


def test_a_frozen_parameter_has_neither_rate_nor_row():
    model = network("conv")
    for name in ("0.weight", "1.bias"):
        model.get_parameter(name).requires_grad_(False)
    learner = fm.MAMLPlusPlus(model, 0.3, 2)
    assert "0.weight" not in learner.inner_lr and set(learner.step_rows) == {"1/weight"}
    learner(*batch("conv")).loss.backward()
    assert model[0].weight.grad is None and bool(learner.step_rows["1/weight"].grad.abs().min() > 0)


def test_learns():
    learner, given = fm.MAMLPlusPlus(network("conv"), 0.1, 2, msl_epochs=2, steps_per_epoch=5), batch("conv")
    optimizer = learner.outer_optimizer(0.02)
    losses = []
    for step in range(20):
        learner.at_step(step)
        with torch.no_grad():
            losses.append(float(learner(*given).loss))
        optimizer.zero_grad()
        learner(*given).loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_a_loss_function_and_a_layer_that_is_not_fused():
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Softsign(), nn.Linear(5, 3)).double()
    learner = fm.MAMLPlusPlus(model, 0.2, 2, lambda z, y: nn.functional.cross_entropy(z, y, reduction="none"))
    learner(*batch()).loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in learner.parameters())
    with pytest.raises(ValueError, match=r"\[3, 6, 2\]"):
        learner(batch().support_x[..., :2], *batch()[1:])
