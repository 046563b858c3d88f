# Every row of ALGORITHMS 1.2 to 1.4 against unrolled float64 autograd (inner_oracle.py): meta-gradient, gradient of the
# rates, gradient of per-step rows, on every backend. The networks are smooth: with ReLU both sides may take different
# branches near a kink.
from __future__ import annotations

from functools import cache

import inner_oracle
import pytest
import torch
from compare import expect_close
from torch import nn
from torch.func import functional_call

import fastmaml as fm

RTOL = 1e-8
TASKS, SUPPORT, QUERY, CLASSES = 3, 6, 4, 3


@cache
def network(name: str) -> nn.Module:
    torch.manual_seed(1)
    if name == "mlp":
        model = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, CLASSES))
    else:
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, CLASSES)
        )
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@cache
def batch(name: str, support: int = SUPPORT) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    shape = (3,) if name == "mlp" else (2, 4, 4)

    def examples(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(TASKS, n, *shape, generator=generator, dtype=torch.float64)
        return x, torch.randint(0, CLASSES, (TASKS, n), generator=generator)

    return fm.tasks.TaskBatch(*examples(support), *examples(QUERY))


def loss_of(model: nn.Module):
    # torch's own batch norm is right here: double backward in a plain loop, no vmap
    layout = [(n, p.shape, p.numel()) for n, p in model.named_parameters()]

    def loss(phi, x, y):
        pieces = phi.split([size for _, _, size in layout])
        named = {n: piece.view(shape) for (n, shape, _), piece in zip(layout, pieces)}
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        return nn.functional.cross_entropy(functional_call(model, {**named, **buffers}, (x,)), y)

    return loss


def rates_for(size: int, rows: int, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return scale * (0.2 + torch.rand(rows, size, generator=generator, dtype=torch.float64))


def optimizer(rule: dict[str, float], lr):
    given = dict(rule)
    if given.pop("adam", 0):
        kind = fm.inner.AdamW if given.pop("decoupled", 0) else fm.inner.Adam
        given["betas"] = (given.pop("beta1", 0.9), given.pop("beta2", 0.999))
        return kind(lr, **{"weight_decay": 0.0, **given})
    given["nesterov"] = bool(given.get("nesterov"))
    return fm.inner.SGD(lr, **given)


RULES = {
    "sgd": {},
    "weight decay": {"weight_decay": 0.3},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.7, "nesterov": 1, "weight_decay": 0.1},
    "clip by value": {"clip_value": 0.05},
    "clip by value, momentum": {"clip_value": 0.05, "momentum": 0.5},
    "clip by norm": {"clip_norm": 0.2},
    "clip by norm, decay": {"clip_norm": 0.2, "weight_decay": 0.2},
    "adam": {"adam": 1},
    "adam without momentum": {"adam": 1, "beta1": 0.0, "weight_decay": 0.1},
    "adam, clip by norm": {"adam": 1, "clip_norm": 0.2},
    "adamw": {"adam": 1, "decoupled": 1, "weight_decay": 0.2, "eps": 1e-4},
}


@cache  # every backend is held to the same numbers
def exact(name: str, support: int, rule: tuple, steps: int, rows: int, how: tuple) -> inner_oracle.Unrolled:
    model, rule = network(name), dict(rule)
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    rates = rates_for(theta.numel(), rows, 0.05 if "adam" in rule else 0.3)
    return inner_oracle.unrolled(loss_of(model), theta, batch(name, support), rates, steps, rule, **dict(how))


def compare(name, backend, rule, steps, rows, label, memory="auto", **how):
    model, given = network(name), how.pop("batch", None) or batch(name)
    engine = fm.Engine(model, backend=backend.name, memory=memory)
    theta = engine.flatten()
    rates = rates_for(theta.numel(), rows, 0.05 if "adam" in rule else 0.3)
    engine_how = dict(how)
    if "loss_weights" in how:
        engine_how["loss_weights"] = torch.tensor(how["loss_weights"], dtype=torch.float64)
    if "order" in engine_how:
        order = engine_how.pop("order")
        engine_how |= {"first_order": True} if order == 0 else {"truncate": order}
    lr = rates[0] if rows == 1 else rates
    got = engine.meta_gradient(theta, given, inner=optimizer(rule, lr), inner_steps=steps, **engine_how)
    hashable = tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in how.items())
    expected = exact(name, given.support_x.shape[1], tuple(rule.items()), steps, rows, hashable)
    expect_close(got.loss, expected.losses, RTOL, f"{label} loss")
    expect_close(got.grad, expected.grad, RTOL, f"{label} grad")
    expect_close(got.inner_lr_grad, expected.rate_grad[0] if rows == 1 else expected.rate_grad, RTOL, f"{label} rates")
    return got


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_optimizer_is_differentiated_exactly(rule, steps, backend):
    compare("mlp", backend, RULES[rule], steps, 1, f"{rule}, K={steps}")


@pytest.mark.parametrize("memory", ["low", "stash"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_optimizer_on_a_convolutional_network_with_rates_per_step(rule, memory, backend):
    compare("conv", backend, RULES[rule], 3, 3, rule, memory)


@pytest.mark.parametrize("rule", ["sgd", "weight decay", "dampening", "nesterov", "adam", "adamw"])
def test_first_order_drops_the_hessian_terms_only(rule, backend):
    compare("mlp", backend, RULES[rule], 3, 3, rule, order=0)


@pytest.mark.parametrize("last", [1, 2, 4, 9])
@pytest.mark.parametrize("rule", ["sgd", "nesterov", "adamw"])
def test_truncation_keeps_the_last_steps(rule, last, backend):
    compare("mlp", backend, RULES[rule], 4, 4, f"{rule}, last {last}", order=last)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_multi_step_loss(rule, steps, backend):
    weights = [0.0, *(0.1 * (k + 1) for k in range(steps))]
    got = compare("mlp", backend, RULES[rule], steps, steps, f"{rule}, K={steps}", loss_weights=weights)
    assert got.query_losses.shape == (TASKS, steps)


def test_multi_step_loss_counts_the_start_and_skips_zeros(backend):
    got = compare("conv", backend, {}, 3, 1, "MSL", loss_weights=[0.4, 0.0, 0.3, 0.5])
    assert got.query_losses.shape == (TASKS, 3)
    compare("mlp", backend, {}, 4, 1, "MSL truncated", loss_weights=[0.4, 0.2, 0.3, 0.5, 1.0], order=2)


def test_multi_step_loss_with_all_weight_on_the_last_step_is_maml(backend):
    model = network("mlp")
    engine = fm.Engine(model, backend=backend.name)
    theta, one_hot = engine.flatten(), torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    got = engine.meta_gradient(theta, batch("mlp"), 0.3, 3, loss_weights=one_hot)
    expected = engine.meta_gradient(theta, batch("mlp"), 0.3, 3)
    expect_close(got.grad, expected.grad, 1e-13, "one-hot weights")


def test_rates_per_step_sum_to_the_gradient_of_one_rate(backend):
    engine = fm.Engine(network("mlp"), backend=backend.name)
    theta = engine.flatten()
    per_step = engine.meta_gradient(theta, batch("mlp"), torch.full((4, 1), 0.3, dtype=torch.float64), 4)
    scalar = engine.meta_gradient(theta, batch("mlp"), 0.3, 4)
    assert per_step.inner_lr_grad.shape == (4, 1)
    expect_close(per_step.inner_lr_grad.sum(), scalar.inner_lr_grad, 1e-12, "sum over steps")


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_proximal_inner_loop(rule, backend):
    compare("mlp", backend, RULES[rule], 4, 4, rule, proximal=0.7)


@pytest.mark.parametrize("rule", ["sgd", "momentum"])
def test_every_step_sees_its_own_minibatch(rule, backend):
    given = batch("mlp", 15)
    compare("mlp", backend, RULES[rule], 5, 5, rule, minibatch=3, batch=given)


@pytest.mark.parametrize("rule", ["sgd", "clip by norm", "adamw"])
def test_parameters_that_are_not_adapted_are_meta_trained(rule, backend):
    model = network("mlp")
    engine = fm.Engine(model, backend=backend.name)
    theta = engine.flatten()
    rates, moved = rates_for(theta.numel(), 1, 0.1), engine.layout.matching(["2.*"], theta)
    got = engine.meta_gradient(
        theta, batch("mlp"), inner=optimizer(RULES[rule], rates[0]), inner_steps=3, adapted=["2.*"]
    )
    expected = inner_oracle.unrolled(loss_of(model), theta, batch("mlp"), rates, 3, RULES[rule], moved=moved)
    expect_close(got.grad, expected.grad, RTOL, "grad")
    expect_close(got.inner_lr_grad, expected.rate_grad[0], RTOL, "rates")
    body = (1 - moved).bool()
    assert bool((got.grad[body] != 0).any()) and bool((got.inner_lr_grad[body] == 0).all())


@pytest.mark.parametrize("weights", [None, [0.0, 0.2, 0.3, 0.5]], ids=["last", "msl"])
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_rows_per_step(rule, weights, backend):
    """MAML++: batch norm's gamma and beta have a row for every step, which the query after that step shares."""
    model = network("conv")
    engine = fm.Engine(model, backend=backend.name)
    generator = torch.Generator().manual_seed(5)
    rows = {n: torch.randn(3, 3, generator=generator, dtype=torch.float64) for n in ("1.weight", "1.bias")}
    theta, places = engine.flatten(), engine.layout.positions(tuple(rows))
    values = torch.cat(list(rows.values()), dim=1)
    moved = torch.ones_like(theta).index_fill(0, places, 0.0)
    rates = rates_for(theta.numel(), 3, 0.1)
    loss_weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    got = engine.meta_gradient(
        theta,
        batch("conv"),
        inner=optimizer(RULES[rule], rates),
        inner_steps=3,
        step_rows=rows,
        loss_weights=loss_weights,
    )
    expected = inner_oracle.unrolled(
        loss_of(model), theta, batch("conv"), rates, 3, RULES[rule], weights, moved=moved, rows=(places, values)
    )
    expect_close(got.loss, expected.losses, RTOL, "loss")
    expect_close(got.grad, expected.grad * moved, RTOL, "grad")
    expect_close(torch.cat(list(got.step_rows_grad.values()), dim=1), expected.rows_grad, RTOL, "rows")
    adapted = engine.adapt(
        theta, *batch("conv")[:2], inner=optimizer(RULES[rule], rates), inner_steps=3, step_rows=rows
    )
    expect_close(adapted[:, places], values[2].expand(TASKS, -1), 1e-15, "the last row stays")


def test_tasks_may_start_from_their_own_parameters(backend):
    model = network("mlp")
    engine = fm.Engine(model, backend=backend.name)
    generator = torch.Generator().manual_seed(6)
    starts = engine.flatten() + 0.1 * torch.randn(TASKS, engine.layout.size, generator=generator, dtype=torch.float64)
    got = engine.meta_gradient(starts, batch("mlp"), 0.3, 2, per_task=True)
    assert got.grad.shape == starts.shape
    for task in range(TASKS):
        one = tuple(part[task : task + 1] for part in batch("mlp"))
        expected = inner_oracle.unrolled(loss_of(model), starts[task], one, rates_for(1, 1, 0) + 0.3, 2)
        expect_close(got.grad[task], expected.grad, RTOL, f"task {task}")


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_updates_are_those_of_torch_optim(rule, backend):
    if "clip" in rule:
        pytest.skip("torch clips outside its optimizers")
    model, (x, y, _, _) = network("mlp"), batch("mlp")
    engine = fm.Engine(model, backend=backend.name)
    theta = engine.flatten()
    own = optimizer(RULES[rule], 0.05)
    got = engine.adapt(theta, x, y, inner=own, inner_steps=5)
    for task in range(TASKS):
        phi = theta.clone().requires_grad_()
        if isinstance(own, fm.inner.SGD):
            how = {"momentum": own.momentum, "dampening": own.dampening, "nesterov": own.nesterov}
            stepper = torch.optim.SGD([phi], 0.05, weight_decay=own.weight_decay, **how)
        else:
            kind = torch.optim.AdamW if own.decoupled else torch.optim.Adam
            stepper = kind([phi], 0.05, betas=own.betas, eps=own.eps, weight_decay=own.weight_decay)
        for _ in range(5):
            stepper.zero_grad()
            loss_of(model)(phi, x[task], y[task]).backward()
            stepper.step()
        expect_close(got[task], phi.detach(), 1e-6, f"{rule}, task {task}")


@pytest.mark.parametrize("rule", ["momentum", "nesterov", "adam", "adamw"])
def test_a_loop_goes_on_from_its_state(rule, backend):
    engine = fm.Engine(network("mlp"), backend=backend.name)
    theta, (x, y, _, _), own = engine.flatten(), batch("mlp"), optimizer(RULES[rule], 0.05)
    whole = engine.adapt_with(theta, x, y, inner=own, inner_steps=5)
    first = engine.adapt_with(theta, x, y, inner=own, inner_steps=2)
    second = engine.adapt_with(first.params, x, y, inner=own, inner_steps=3, state=first.state, steps_taken=2)
    expect_close(second.params, whole.params, 1e-12, "parameters")
    expect_close(second.state, whole.state, 1e-12, "state")


def test_adam_is_finite_where_a_second_moment_is_zero(backend):
    """A bias in front of batch norm has gradient zero: 0 / sqrt(0) must not reach the sweep."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, CLASSES)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # every ReLU is dead
    engine = fm.Engine(model, backend=backend.name)
    got = engine.meta_gradient(
        engine.flatten(), batch("mlp"), inner=fm.inner.Adam(0.1, betas=(0.0, 0.999)), inner_steps=3
    )
    assert bool(torch.isfinite(got.grad).all()) and bool(torch.isfinite(got.inner_lr_grad).all())
