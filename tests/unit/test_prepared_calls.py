"""Prepared calls: repeated settings and sizes give the same as a new engine, whatever has changed in between."""

from __future__ import annotations

import pytest
import torch
from unrolled import BACKENDS, image_batch, regression_batch, small_conv, small_mlp

from fastmaml import Engine, inner


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def known(engine, theta, batch, *arguments, **options):
    """The third call of its kind."""
    for _ in range(2):
        engine.meta_gradient(theta, batch, *arguments, **options)
    return engine.meta_gradient(theta, batch, *arguments, **options)


def expect_same(result, expected):
    for ours, theirs in zip(result, expected):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


OPTIONS = {
    "plain": {"inner_lr": 0.1, "inner_steps": 2},
    "first order": {"inner_lr": 0.1, "inner_steps": 2, "first_order": True},
    "truncated": {"inner_lr": 0.1, "inner_steps": 3, "truncate": 1},
    "no gradient of the rate": {"inner_lr": 0.1, "inner_steps": 2, "inner_lr_grad": False},
    "no steps": {"inner_lr": 0.1, "inner_steps": 0},
    "momentum": {"inner": inner.SGD(0.1, momentum=0.9), "inner_steps": 2},
    "adam": {"inner": inner.Adam(0.01), "inner_steps": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_known_call_gives_what_the_first_gave(name, backend):
    model, batch = small_conv(), image_batch()
    engine = Engine(model, backend=backend)
    for other in OPTIONS.values():
        known(engine, engine.flatten(), batch, **other)
    result = engine.meta_gradient(engine.flatten(), batch, **OPTIONS[name])
    expect_same(result, Engine(model, backend=backend).meta_gradient(engine.flatten(), batch, **OPTIONS[name]))


def test_rates_sizes_and_memory_may_change_from_call_to_call(backend):
    model = small_mlp()
    engine = Engine(model, "mse", backend)
    theta, batch = engine.flatten(), regression_batch()
    fewer = tuple(part[:2] for part in batch)
    changes = [
        (batch, 0.1, "low"),
        (batch, 0.2, "low"),
        (fewer, 0.1, "stash"),
        (batch, 0.1, "stash"),
        (fewer, 0.2, "low"),
    ]
    for given, rate, engine.memory in 2 * changes:
        expected = Engine(model, "mse", backend, engine.memory).meta_gradient(theta, given, rate, 2)
        expect_same(engine.meta_gradient(theta, given, rate, 2), expected)


def test_a_parameter_that_is_frozen_later_is_seen(backend):
    model = small_mlp()
    engine = Engine(model, "mse", backend)
    theta, batch = engine.flatten(), regression_batch()
    known(engine, theta, batch, 0.1, 2)
    first = next(model.parameters()).requires_grad_(False)
    assert engine.meta_gradient(theta, batch, 0.1, 2).grad[: first.numel()].abs().max() == 0
    first.requires_grad_(True)
    expect_same(known(engine, theta, batch, 0.1, 2), Engine(model, "mse", backend).meta_gradient(theta, batch, 0.1, 2))


def test_a_model_of_another_type_later_is_seen(backend):
    model = small_mlp()
    engine = Engine(model, "mse", backend)
    known(engine, engine.flatten(), regression_batch(), 0.1, 2)
    model.float()
    batch = tuple(part.float() for part in regression_batch())
    result = known(engine, engine.flatten(), batch, 0.1, 2)
    assert result.grad.dtype == torch.float32
    expect_same(result, Engine(model, "mse", backend).meta_gradient(engine.flatten(), batch, 0.1, 2))


def test_labels_of_any_integer_type(backend):
    engine = Engine(small_conv(), backend=backend)
    theta, (x, y, query_x, query_y) = engine.flatten(), image_batch()
    expected = known(engine, theta, (x, y, query_x, query_y), 0.1, 1)
    expect_same(known(engine, theta, (x, y.int(), query_x, query_y.short()), 0.1, 1), expected)


def test_gaps_graphs_and_inference_tensors(backend):
    engine = Engine(small_mlp(), "mse", backend)
    theta, batch = engine.flatten(), regression_batch()
    expected = known(engine, theta, batch, 0.1, 2)
    expect_same(engine.meta_gradient(theta, [part.mT.contiguous().mT for part in batch], 0.1, 2), expected)
    with_graph = engine.meta_gradient(theta.clone().requires_grad_(), batch, 0.1, 2)
    expect_same(with_graph, expected)
    assert not with_graph.grad.requires_grad
    with torch.inference_mode():
        expect_same(engine.meta_gradient(theta.clone(), tuple(part.clone() for part in batch), 0.1, 2), expected)


@pytest.mark.parametrize("given", [{"inner_steps": True}, {"inner_lr": True}, {"truncate": True}])
def test_what_equals_a_known_number_but_is_none_is_refused(given, backend):
    engine = Engine(small_mlp(), "mse", backend)
    theta, batch, plain = engine.flatten(), regression_batch(), {"inner_lr": 1.0, "inner_steps": 1, "truncate": 1}
    known(engine, theta, batch, **plain)
    with pytest.raises(TypeError, match="must be a"):
        engine.meta_gradient(theta, batch, **plain | given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_by_name_are_theta(dtype, backend):
    model, batch = small_mlp().to(dtype), tuple(part.to(dtype) for part in regression_batch())
    model[0].weight.data = model[0].weight.data.T.contiguous().T  # with gaps
    engine = Engine(model, "mse", backend)
    expected = engine.meta_gradient(engine.flatten(), batch, 0.1, 2)
    result = known(engine, dict(model.named_parameters()), batch, 0.1, 2)
    expect_same(result, expected)
    assert not result.grad.requires_grad
    assert result.total_loss is None or not result.total_loss.requires_grad


def test_parameters_by_name_that_are_not_the_models_are_refused(backend):
    engine = Engine(small_mlp(), "mse", backend)
    named = dict(small_mlp().named_parameters())
    known(engine, named, regression_batch(), 0.1, 2)
    first = next(iter(named))
    with pytest.raises(ValueError, match="this model's parameters do not fit the Engine's model"):
        engine.meta_gradient({n: p for n, p in named.items() if n != first}, regression_batch(), 0.1, 2)
    with pytest.raises(ValueError, match="this model's parameters do not fit the Engine's model"):
        engine.meta_gradient(named | {first: named[first][:1]}, regression_batch(), 0.1, 2)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)])
def test_the_total_loss_is_what_grad_is_the_gradient_of(weights, backend):
    engine = Engine(small_mlp(), "mse", backend)
    result = known(engine, engine.flatten(), regression_batch(), 0.1, 2, task_weights=weights)
    if result.total_loss is not None:
        expected = result.loss.mean() if weights is None else (result.loss * weights).sum()
        torch.testing.assert_close(result.total_loss, expected, rtol=1e-14, atol=0.0)
    assert (result.total_loss is None) == (backend == "autodiff")


# ---------------------------------------------------------------- Hessian-vector products


def product_inputs(engine, tasks=3):
    x, y = (part[:tasks] for part in regression_batch()[:2])
    v = torch.randn(tasks, engine.layout.size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return engine.flatten(), x, y, v


@pytest.mark.parametrize("of_tasks", [False, True])
def test_a_known_product_gives_what_the_first_gave(of_tasks, backend):
    model = small_mlp()
    engine = Engine(model, "mse", backend)
    theta, x, y, v = product_inputs(engine)
    params = theta.expand(len(x), -1) + torch.arange(len(x))[:, None] / 8 if of_tasks else theta
    expected = Engine(model, "mse", backend).hvp(params, x, y, v)
    for _ in range(3):
        assert torch.equal(engine.hvp(params, x, y, v), expected)
    assert torch.equal(engine.hvp(params[..., :], x.mT.contiguous().mT, y, v.T.contiguous().T), expected)
    with_graph = engine.hvp(params.clone().requires_grad_(), x, y, v)
    assert torch.equal(with_graph, expected)
    assert not with_graph.requires_grad


def test_a_product_after_a_parameter_was_frozen(backend):
    model = small_mlp()
    engine = Engine(model, "mse", backend)
    given = product_inputs(engine)
    expected = [engine.hvp(*given) for _ in range(2)][-1]
    first = next(model.parameters()).requires_grad_(False)
    assert engine.hvp(*given)[:, : first.numel()].abs().max() == 0
    first.requires_grad_(True)
    assert torch.equal(engine.hvp(*given), expected)


@pytest.mark.parametrize("place", ["x", "y", "v"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_known_product_refuses_what_is_not_finite(place, bad, backend):
    engine = Engine(small_mlp(), "mse", backend)
    theta, x, y, v = product_inputs(engine)
    for _ in range(2):
        engine.hvp(theta, x, y, v)
    given = {"x": x.clone(), "y": y.clone(), "v": v.clone()}
    given[place][2].view(-1)[-1] = bad
    with pytest.raises(ValueError, match=rf"^{place} \[.*\] holds 1 NaN or infinite values, the first at \[2"):
        engine.hvp(theta, **given)


@pytest.mark.parametrize("place", range(4))
def test_a_known_meta_gradient_refuses_what_is_not_finite(place, backend):
    engine = Engine(small_mlp(), "mse", backend)
    theta, batch = engine.flatten(), [part.clone() for part in regression_batch()]
    known(engine, theta, tuple(batch), 0.1, 2)
    batch[place][1].view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=r"holds 1 NaN or infinite values, the first at \[1, 0"):
        engine.meta_gradient(theta, tuple(batch), 0.1, 2)
