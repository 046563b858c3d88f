"""The Engine's numbers against unrolled double backward, in float64, on every backend that is built."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from unrolled import (
    BACKENDS,
    Residual,
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

from fastmaml import Engine

EXACT = 1e-9  # float64, both sides on the same branch of every ReLU: what remains is rounding


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def vectors(engine, tasks, seed=1):
    """Different parameters and directions for each task."""
    g = torch.Generator().manual_seed(seed)
    params = engine.flatten() + 0.1 * torch.randn(tasks, engine.layout.size, dtype=torch.float64, generator=g)
    return params, torch.randn(tasks, engine.layout.size, dtype=torch.float64, generator=g)


NETWORKS = {
    "mlp": (small_mlp, regression_batch, mse, "mse"),
    "conv": (small_conv, image_batch, cross_entropy, "cross_entropy"),
    "residual": (Residual, lambda: image_batch(shape=(6,)), cross_entropy, "cross_entropy"),
}


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("network", NETWORKS)
def test_meta_gradient_is_that_of_unrolled_double_backward(network, steps, backend):
    make, batch_of, loss, name = NETWORKS[network]
    model, batch = make(), batch_of()
    losses, grads, rate_grads = meta_gradient(model, batch, rates_like(model, 0.1), steps, loss)
    engine = Engine(model, name, backend)
    result = engine.meta_gradient(engine.flatten(model), batch, inner_lr=0.1, inner_steps=steps)
    assert relative_error(result.loss, losses) < EXACT
    assert relative_error(result.grad, flat(grads)) < EXACT
    assert relative_error(result.inner_lr_grad, flat(rate_grads).sum()) < EXACT
    assert result.inner_lr_grad.shape == ()
    assert result.support_losses.shape == (3, steps)
    assert result.query_output.shape[:2] == batch[2].shape[:2]


@pytest.mark.parametrize("steps", [1, 3])
def test_first_order_is_the_query_gradient_at_the_adapted_parameters(steps, backend):
    model, batch = small_mlp(), regression_batch()
    _, grads, rate_grads = meta_gradient(model, batch, rates_like(model, 0.1), steps, mse, first_order=True)
    engine = Engine(model, "mse", backend)
    result = engine.meta_gradient(engine.flatten(), batch, 0.1, steps, first_order=True)
    assert relative_error(result.grad, flat(grads)) < EXACT
    assert relative_error(result.inner_lr_grad, flat(rate_grads).sum()) < EXACT


@pytest.mark.parametrize("form", ["number", "tensor", "per tensor", "per entry", "dict of tensors"])
def test_every_form_of_inner_lr_has_its_gradient(form, backend):
    model, batch = small_mlp(), regression_batch()
    torch.manual_seed(3)
    if form in ("number", "tensor"):
        rates, given = rates_like(model, 0.1), 0.1 if form == "number" else torch.tensor(0.1, dtype=torch.float64)
    elif form == "per tensor":
        given = {n: 0.05 * (i + 1) for i, (n, _) in enumerate(model.named_parameters())}
        given["0.weight"] = torch.tensor(0.2, dtype=torch.float64)
        rates = {n: torch.full_like(p, float(given[n])) for n, p in model.named_parameters()}
    else:
        rates = {n: 0.1 * torch.rand_like(p) for n, p in model.named_parameters()}
        given = flat(rates) if form == "per entry" else rates
    _, grads, rate_grads = meta_gradient(model, batch, rates, 2, mse)
    engine = Engine(model, "mse", backend)
    result = engine.meta_gradient(engine.flatten(), batch, given, 2)
    assert relative_error(result.grad, flat(grads)) < EXACT
    if form in ("number", "tensor"):
        assert relative_error(result.inner_lr_grad, flat(rate_grads).sum()) < EXACT
    elif form == "per entry":
        assert relative_error(result.inner_lr_grad, flat(rate_grads)) < EXACT
    else:
        for name, grad in rate_grads.items():
            expected = grad if form == "dict of tensors" else grad.sum()
            assert relative_error(result.inner_lr_grad[name], expected) < EXACT, name


def test_weights_of_tasks_and_examples(backend):
    model, batch = small_mlp(), regression_batch()
    torch.manual_seed(4)
    of_task, support, query = torch.rand(3).double(), torch.rand(3, 4).double(), torch.rand(3, 5).double()
    weighted = [(x, torch.cat([y, w.unsqueeze(2)], 2)) for x, y, w in zip(batch[::2], batch[1::2], (support, query))]

    def loss(output, y_and_w):
        return ((output[:, 0] - y_and_w[:, 0]) ** 2 * y_and_w[:, 1]).sum()

    plain = (weighted[0][0], weighted[0][1], weighted[1][0], weighted[1][1])
    losses, grads, _ = meta_gradient(model, plain, rates_like(model, 0.1), 2, loss, task_weights=of_task)
    engine = Engine(model, "mse", backend)
    result = engine.meta_gradient(
        engine.flatten(), batch, 0.1, 2, support_weights=support, query_weights=query, task_weights=of_task
    )
    assert relative_error(result.loss, losses) < EXACT
    assert relative_error(result.grad, flat(grads)) < EXACT


def test_label_smoothing(backend):
    model, batch = small_conv(), image_batch()

    def loss(output, y):
        return nn.functional.cross_entropy(output, y, label_smoothing=0.2)

    _, grads, _ = meta_gradient(model, batch, rates_like(model, 0.1), 1, loss)
    engine = Engine(model, backend=backend, label_smoothing=0.2)
    assert relative_error(engine.meta_gradient(engine.flatten(), batch, 0.1, 1).grad, flat(grads)) < EXACT


def test_a_python_loss_leaves_the_network_fused():
    model, batch = small_mlp(), regression_batch()
    _, grads, _ = meta_gradient(model, batch, rates_like(model, 0.1), 2, lambda o, y: (o - y).abs().pow(3).mean())
    engine = Engine(model, loss=lambda output, y: (output - y).abs().pow(3).mean(1))
    assert (engine.backend, engine.fused) == ("cpu", True)
    assert engine.why.startswith("the loss is a Python function: the network stays fused, but runs layer by layer")
    assert relative_error(engine.meta_gradient(engine.flatten(), batch, 0.1, 2).grad, flat(grads)) < EXACT


def test_torch_mse_loss_works_as_a_python_loss():
    # Forward mode through F.mse_loss raises on torch 2.13; the engine then takes double backward and says so.
    model, batch = small_mlp(), regression_batch()
    _, grads, _ = meta_gradient(model, batch, rates_like(model, 0.1), 2, mse)
    engine = Engine(model, loss=lambda o, y: nn.functional.mse_loss(o, y, reduction="none").mean(1))
    assert relative_error(engine.meta_gradient(engine.flatten(), batch, 0.1, 2).grad, flat(grads)) < EXACT


def test_frozen_parameters_stay_and_have_no_gradient(backend):
    model, batch = small_mlp(), regression_batch()
    model[2].weight.requires_grad_(False)
    rates = rates_like(model, 0.1)
    rates["2.weight"].zero_()
    _, grads, _ = meta_gradient(model, batch, rates, 2, mse)
    grads["2.weight"].zero_()
    engine = Engine(model, "mse", backend)
    result = engine.meta_gradient(engine.flatten(), batch, dict.fromkeys(engine.layout.names, 0.1), 2)
    assert relative_error(result.grad, flat(grads)) < EXACT
    assert float(result.inner_lr_grad["2.weight"]) == 0.0
    adapted = engine.unflatten(engine.adapt(engine.flatten(), batch[0], batch[1], 0.1, 2))
    assert torch.equal(adapted["2.weight"], model[2].weight.expand(3, -1, -1))
    params, v = vectors(engine, 3)
    assert not engine.unflatten(engine.grad(params, *batch[:2])[1])["2.weight"].any()
    assert not engine.unflatten(engine.hvp(params, *batch[:2], v))["2.weight"].any()
    solution = engine.solve(params, *batch[:2], v, lam=5.0, steps=40).solution
    assert relative_error(solution + engine.hvp(params, *batch[:2], solution) / 5.0, v) < 1e-5


class Tied(nn.Module):
    """The same weight matrix twice, and a parameter that nobody uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.inner.weight
        self.unused = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(6, 3)
        self.double()

    def forward(self, x):
        return self.head(torch.tanh(self.again(torch.tanh(self.inner(x)))))


def test_tied_parameters_add_up_and_unused_ones_have_zero_gradient(backend):
    model, batch = Tied(), image_batch(shape=(6,))
    _, grads, _ = meta_gradient(model, batch, rates_like(model, 0.3), 2)
    engine = Engine(model, backend=backend)
    assert engine.layout.names.count("inner.weight") == 1
    assert "again.weight" not in engine.layout.names
    result = engine.unflatten(engine.meta_gradient(engine.flatten(), batch, 0.3, 2).grad)
    for name, grad in grads.items():
        assert torch.allclose(result[name], grad, rtol=EXACT, atol=1e-12), name
    assert not result["unused"].any()


def test_grad_and_hvp_at_parameters_of_each_task(backend):
    model, batch = small_conv(), image_batch()
    engine = Engine(model, backend=backend)
    params, v = vectors(engine, 3)
    loss, grad = engine.grad(params, *batch[:2])
    hv = engine.hvp(params, *batch[:2], v)
    for task in range(3):
        point = params[task].clone().requires_grad_()
        values = {**engine.unflatten(point), **{n: b.clone() for n, b in model.named_buffers()}}
        value = cross_entropy(torch.func.functional_call(model, values, (batch[0][task],)), batch[1][task])
        (g,) = torch.autograd.grad(value, point, create_graph=True)
        (h,) = torch.autograd.grad(g, point, v[task])
        assert relative_error(loss[task], value.detach()) < EXACT
        assert relative_error(grad[task], g.detach()) < EXACT
        assert relative_error(hv[task], h) < EXACT


def test_shared_parameters_are_the_same_as_repeated_ones(backend):
    engine, batch = Engine(small_conv(), backend=backend), image_batch()
    theta = engine.flatten()
    repeated = theta.expand(3, -1)
    assert torch.allclose(engine.forward(theta, batch[0]), engine.forward(repeated, batch[0]), rtol=1e-12)
    assert torch.allclose(
        engine.grad(theta, *batch[:2])[1], engine.grad(repeated, *batch[:2])[1], rtol=1e-10, atol=1e-14
    )


def test_adapt_takes_the_steps_of_gradient_descent(backend):
    engine, batch = Engine(small_mlp(), "mse", backend), regression_batch()
    params = engine.flatten().expand(3, -1)
    for _ in range(3):
        params = params - 0.1 * engine.grad(params, *batch[:2])[1]
    assert relative_error(engine.adapt(engine.flatten(), *batch[:2], inner_lr=0.1, inner_steps=3), params) < EXACT


def test_solve_inverts_the_regularised_hessian(backend):
    engine, batch = Engine(small_mlp(), "mse", backend), regression_batch()
    params, v = vectors(engine, 3)
    solution, residual = engine.solve(params, *batch[:2], v, lam=3.0, steps=60, damping=0.5)[:2]
    back = 1.5 * solution + engine.hvp(params, *batch[:2], solution) / 3.0
    assert relative_error(back, v) < 1e-5  # CG stops at |r| < 1e-5
    assert residual.shape == (3,)
    assert float(residual.max()) < 1e-5


def test_solve_with_one_step_is_the_first_conjugate_gradient_step(backend):
    engine, batch = Engine(small_mlp(), "mse", backend), regression_batch()
    params, v = vectors(engine, 3)
    av = v + engine.hvp(params, *batch[:2], v) / 4.0
    curvature = (v * av).sum(1, keepdim=True)
    step = torch.where(curvature > 0, (v * v).sum(1, keepdim=True) / curvature, 0.0)
    assert relative_error(engine.solve(params, *batch[:2], v, lam=4.0, steps=1).solution, step * v) < EXACT


def test_results_carry_no_graph_and_run_inside_inference_mode(backend):
    engine, batch = Engine(small_mlp(), "mse", backend), regression_batch()
    outside = engine.meta_gradient(engine.flatten().requires_grad_(), batch, 0.1, 2)
    assert not outside.grad.requires_grad
    assert not outside.query_output.requires_grad
    with torch.inference_mode():
        inside = engine.meta_gradient(engine.flatten(), tuple(b + 0 for b in batch), 0.1, 2)
    assert torch.equal(inside.grad, outside.grad)


def test_float32_stays_float32(backend):
    engine = Engine(small_mlp().float(), "mse", backend)
    batch = tuple(b.float() for b in regression_batch())
    result = engine.meta_gradient(engine.flatten(), batch, 0.1, 2)
    assert {t.dtype for t in (result.loss, result.grad, result.query_output, result.inner_lr_grad)} == {torch.float32}


def test_flatten_and_unflatten_follow_named_parameters():
    model = small_conv()
    engine = Engine(model, backend="autodiff")
    pieces = engine.unflatten(engine.flatten(model))
    assert list(pieces) == [n for n, _ in model.named_parameters()]
    assert all(torch.equal(pieces[n], p) for n, p in model.named_parameters())
