# Reptile against plain loops around torch.optim. (Serial: one optimizer passes its moments from task to task.) Also its
# mini-batches, its two kinds of evaluation, and its state from step to step.
from __future__ import annotations

import copy

import pytest
import torch
from compare import expect_close
from small_tasks import BACKENDS, TASKS, batch, grad_of, loss_of, mask_of, network, theta_of
from torch import nn

import fastmaml as fm
from fastmaml.algorithms.reptile import mini_batches

F64 = torch.float64
ADAM = fm.inner.Adam(0.03, betas=(0.0, 0.999))
INNER = {
    "sgd": fm.inner.SGD(0.1),
    "momentum": fm.inner.SGD(0.1, momentum=0.9),
    "adam": ADAM,
}


def torch_optimizer(inner, phi):
    if isinstance(inner, fm.inner.SGD):
        return torch.optim.SGD([phi], inner.lr, momentum=inner.momentum)
    return torch.optim.Adam([phi], inner.lr, betas=inner.betas, eps=inner.eps)


def descend(model, phi, optimizer, x, y, steps, size):
    """`steps` steps of a torch optimizer on consecutive slices of x, y; phi changes in place."""
    losses = []
    for k in range(steps):
        rows = slice(None) if size is None else slice(k * size, (k + 1) * size)
        optimizer.zero_grad()
        loss = loss_of(model)(phi, x[rows], y[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def drawn(given, steps, size, seed, serial=False):
    """The mini-batches that a learner draws after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    if not serial:
        return mini_batches(given.support_x, given.support_y, steps, size)
    each = [mini_batches(x[None], y[None], steps, size) for x, y in zip(*given[:2])]
    return torch.cat([x for x, _ in each]), torch.cat([y for _, y in each])


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("kind", INNER)
@pytest.mark.parametrize("backend", BACKENDS)
def test_serial_is_the_released_loop(backend, kind, size):
    """Weights go back to theta for every task, the optimizer's moments and step counter do not: over three batches."""
    model = network()
    learner = fm.Reptile(model, INNER[kind], 3, size, serial=True, backend=backend)
    outer = learner.outer_optimizer(0.5)
    phi = nn.Parameter(theta_of(model))
    optimizer = torch_optimizer(INNER[kind], phi)
    for step in range(3):
        given, theta = batch(seed=step), theta_of(model)
        x, y = drawn(given, 3, size, seed=step, serial=True)
        adapted, losses = [], []
        for task in range(TASKS):
            phi.data.copy_(theta)
            losses.append(descend(model, phi, optimizer, x[task], y[task], 3, size))
            adapted.append(phi.detach().clone())
        torch.manual_seed(step)
        outer.zero_grad()
        out = learner(*given)
        out.loss.backward()
        expect_close(out.support_losses, torch.stack(losses), 1e-9, f"support losses of step {step}")
        expect_close(grad_of(model), theta - torch.stack(adapted).mean(0), 1e-8, f"direction of step {step}")
        outer.step()
        expect_close(theta_of(model), theta + 0.5 * (torch.stack(adapted).mean(0) - theta), 1e-9, f"step {step}")
    if kind == "adam":
        assert int(learner.moment_steps) == 27


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("kind", INNER)
@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_tasks_share_the_carried_moments(backend, kind, size):
    model = network()
    learner = fm.Reptile(model, INNER[kind], 3, size, backend=backend)
    weights = torch.tensor([0.5, 0.2, 0.9], dtype=F64)
    template = nn.Parameter(theta_of(model))
    carried = torch_optimizer(INNER[kind], template).state_dict()
    for step in range(2):
        given, theta = batch(seed=step), theta_of(model)
        x, y = drawn(given, 3, size, seed=step)
        adapted, states = [], []
        for task in range(TASKS):
            phi = nn.Parameter(theta.clone())
            optimizer = torch_optimizer(INNER[kind], phi)
            optimizer.load_state_dict(copy.deepcopy(carried))
            descend(model, phi, optimizer, x[task], y[task], 3, size)
            adapted.append(phi.detach())
            states.append(optimizer.state_dict())
        carried = states[0]
        for key in carried["state"].get(0, {}):
            values = [state["state"][0][key] for state in states]
            carried["state"][0][key] = torch.stack(values).mean(0) if values[0] is not None else None
        torch.manual_seed(step)
        model.zero_grad()
        out = learner(*given, task_weights=weights)
        out.loss.backward()
        expect_close(grad_of(model), torch.tensordot(weights, theta - torch.stack(adapted), 1), 1e-8, f"step {step}")
        expected = torch.stack([loss_of(model)(p, qx, qy) for p, qx, qy in zip(adapted, *given[2:])])
        expect_close(out.task_losses, expected, 1e-8, "query losses")
        expect_close(out.loss.detach(), expected @ weights, 1e-8, "loss")


@pytest.mark.parametrize("name", ["mlp", "conv"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_direction_of_gradient_descent_is_the_sum_of_its_gradients(backend, name):
    """(theta - phi) / a = sum_k g_k (ALGORITHMS 2.3)."""
    model, given = network(name), batch(name)
    fm.Reptile(model, fm.inner.SGD(0.3), 4, None, backend=backend)(*given).loss.backward()
    total = torch.zeros_like(theta_of(model))
    for x, y in zip(*given[:2]):
        phi = theta_of(model)
        for _ in range(4):
            phi.requires_grad_()
            (g,) = torch.autograd.grad(loss_of(model)(phi, x, y), phi)
            total += g / TASKS
            phi = (phi - 0.3 * g).detach()
    expect_close(grad_of(model) / 0.3, total, 1e-9, "sum of gradients")


def test_serial_and_batched_agree_without_moments():
    model, given = network("conv"), batch("conv")
    fm.Reptile(model, fm.inner.SGD(0.3), 3, None, serial=True)(*given).loss.backward()
    serial = grad_of(model)
    model.zero_grad()
    fm.Reptile(model, fm.inner.SGD(0.3), 3, None)(*given).loss.backward()
    expect_close(grad_of(model), serial, 1e-12, "batched")


def test_one_inner_step_is_joint_training():
    model, given = network(), batch()
    fm.Reptile(model, fm.inner.SGD(0.3), 1, None)(*given).loss.backward()
    phi = theta_of(model).requires_grad_()
    loss = sum(loss_of(model)(phi, x, y) for x, y in zip(*given[:2])) / TASKS
    expect_close(grad_of(model) / 0.3, torch.autograd.grad(loss, phi)[0], 1e-10, "mean gradient")


# ---- mini-batches


@pytest.mark.parametrize("steps, size", [(3, 2), (5, 4), (1, 6), (2, 20)])
def test_mini_batches_pass_over_the_examples_without_replacement(steps, size):
    x = torch.arange(TASKS * 6).reshape(TASKS, 6)
    got_x, got_y = mini_batches(x, x + 100, steps, size)
    assert got_x.shape == (TASKS, steps * size) and torch.equal(got_y, got_x + 100)
    for task in range(TASKS):
        for start in range(0, steps * size, 6):  # batches straddle passes, passes are complete
            one_pass = got_x[task, start : start + 6]
            assert len(set(one_pass.tolist())) == len(one_pass)
            assert set(one_pass.tolist()) <= set(x[task].tolist())


def test_mini_batches_are_shuffled_anew_and_uniform():
    torch.manual_seed(0)
    x = torch.arange(5).expand(4000, 5)
    first, second = mini_batches(x, x, 2, 5)[0].split(5, dim=1)
    assert float((first == second).double().mean()) == pytest.approx(0.2, abs=0.02)
    counts = torch.stack([(first == value).double().mean(0) for value in range(5)])
    expect_close(counts, torch.full((5, 5), 0.2), 0.15, "how often each example stands at each place")


def test_draws_come_from_torchs_generator():
    def grad(seed):
        model = network()
        torch.manual_seed(seed)
        fm.Reptile(model, ADAM, 3, 2)(*batch()).loss.backward()
        return grad_of(model)

    assert torch.equal(grad(1), grad(1)) and not torch.equal(grad(1), grad(2))


# ---- evaluation


def test_evaluation_takes_its_own_steps_and_leaves_the_moments():
    model, given = network(), batch()
    learner = fm.Reptile(model, ADAM, 2, 3, eval_steps=7, eval_minibatch=2)
    learner(*given)
    before = copy.deepcopy(learner.state_dict())
    assert learner.adapt(*given[:2]).losses.shape == (TASKS, 2)
    learner.eval()
    x, y = drawn(given, 7, 2, seed=5)
    torch.manual_seed(5)
    adapted = learner.adapt(*given[:2])
    assert adapted.losses.shape == (TASKS, 7)
    assert learner.adapt(*given[:2], inner_steps=0).losses.shape == (TASKS, 0)
    learner(*given)  # a gradient in eval mode carries nothing on either
    with torch.no_grad():
        assert learner(*given).support_losses.shape == (TASKS, 7)
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())

    for task in range(TASKS):  # every task begins with the moments of training
        phi = nn.Parameter(theta_of(model))
        optimizer = torch_optimizer(ADAM, phi)
        moments = learner.moments.reshape(2, -1).clone()
        optimizer.state[phi] = {"step": torch.tensor(2.0), "exp_avg": moments[0], "exp_avg_sq": moments[1]}
        descend(model, phi, optimizer, x[task], y[task], 7, 2)
        expect_close(adapted.params[task], phi.detach(), 1e-8, f"task {task}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_transduction_every_query_example_goes_beside_the_support_set(backend):
    model, given = network("conv"), batch("conv")
    learner = fm.Reptile(model, fm.inner.SGD(0.1), 2, None, transductive=False, backend=backend).eval()
    adapted = learner.adapt(*given[:2], inner_steps=2)
    got = adapted.predict(given.query_x)
    for task in range(TASKS):
        own = network("conv")
        nn.utils.vector_to_parameters(adapted.params[task], own.parameters())
        for i, x in enumerate(given.query_x[task]):
            expected = own(torch.cat([given.support_x[task], x[None]]))[-1].detach()
            expect_close(got[task, i], expected, 1e-10, f"task {task}, query {i}")
    expect_close(got[:, :1], adapted.predict(given.query_x[:, :1]), 1e-12, "no query example sees another")
    with torch.no_grad():
        assert torch.isfinite(learner(*given).loss)
    with pytest.raises(ValueError, match="use predict"):
        adapted.module(0)


def test_transductive_predictions_are_one_batch():
    model, given = network("conv"), batch("conv")
    adapted = fm.Reptile(model, fm.inner.SGD(0.1), 2, None).eval().adapt(*given[:2], inner_steps=2)
    expect_close(adapted.module(1)(given.query_x[1]).detach(), adapted.predict(given.query_x)[1], 1e-12, "module")


# ---- as any learner


def test_state_dict_carries_the_moments():
    one, two = fm.Reptile(network(), ADAM, 2, None), fm.Reptile(network(seed=3), ADAM, 2, None)
    one(*batch())
    assert set(one.state_dict()) == {*network().state_dict(), "moments", "moment_steps"}
    assert two.load_state_dict(one.state_dict()) == ([], [])
    for learner in (one, two):
        learner(*batch(seed=4)).loss.backward()
    assert torch.equal(grad_of(one.model), grad_of(two.model)) and torch.equal(one.moments, two.moments)
    assert int(two.moment_steps) == 4
    assert list(fm.Reptile(network(), fm.inner.SGD(0.1)).state_dict()) == list(network().state_dict())


def test_learns():
    torch.manual_seed(0)
    learner, given = fm.Reptile(network(), ADAM, 5, 3, eval_steps=5), batch(tasks=8)
    outer, losses = learner.outer_optimizer(0.5), []
    for _ in range(30):
        outer.zero_grad()
        out = learner(*given)
        out.loss.backward()
        outer.step()
        losses.append(float(out.support_losses[:, -1].mean()))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_a_loss_function_frozen_parameters_and_a_layer_that_is_not_fused():
    model = nn.Sequential(nn.Linear(3, 5), nn.Softsign(), nn.Linear(5, 3)).double()
    model[0].bias.requires_grad_(False)
    learner = fm.Reptile(model, ADAM, 2, 4, lambda z, y: nn.functional.cross_entropy(z, y, reduction="none"))
    learner(*batch()).loss.backward()
    assert model[0].bias.grad is None and bool(model[2].weight.grad.abs().min() > 0)
    head = fm.Reptile(network(), ADAM, 2, 4, adapted="2.*")
    head(*batch()).loss.backward()
    assert torch.equal(grad_of(head.model) != 0, mask_of(head.model, "2.").bool())


def test_the_inner_optimizer_is_adam_without_momentum_unless_said_otherwise():
    assert fm.Reptile(network()).inner == fm.inner.Adam(1e-3, betas=(0.0, 0.999))
    assert fm.Reptile(network(), inner_lr=0.2).inner == fm.inner.SGD(0.2)
    with pytest.raises(TypeError, match="either inner_lr .* or inner"):
        fm.Reptile(network(), ADAM, inner_lr=0.2)


def test_wrong_arguments_say_so():
    with pytest.raises(TypeError, match="no gradient for a learned inner rate"):
        fm.Reptile(network(), fm.inner.SGD(nn.Parameter(torch.tensor(0.1))))
    with pytest.raises(ValueError, match="minibatch is 0"):
        fm.Reptile(network(), minibatch=0)
    with pytest.raises(ValueError, match="goes with batch_norm='transductive', not 'support'"):
        fm.Reptile(network("conv"), transductive=False, batch_norm="support")
    learner, given = fm.Reptile(network()), batch()
    for wrong in (learner, learner.adapt):
        rest = given[2:] if wrong is learner else ()
        with pytest.raises(ValueError, match=r"support_y \[2, 6\] .* \[3, 6, 3\]"):
            wrong(given.support_x, given.support_y[:2], *rest)
    with pytest.raises(ValueError, match=r"support_x \[3, 6, 2\]"):
        learner(given.support_x[..., :2], *given[1:])
