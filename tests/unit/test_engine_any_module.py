"""autodiff on modules that are not fused: dropout, buffers, loops over tasks, double backward."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from unrolled import flat, image_batch, meta_gradient, mse, rates_like, regression_batch, relative_error, small_mlp

from fastmaml import Engine

EXACT = 1e-9


def dropout_mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Dropout(0.4), nn.Linear(12, 1)).double()


class Recorded(nn.Module):
    """Dropout written out, which keeps every mask it draws or replays a given list of them."""

    def __init__(self):
        super().__init__()
        self.drawn, self.replay = [], None

    def forward(self, x):
        if not self.training:
            return x
        if self.replay is not None:
            return x * self.replay.pop(0)
        mask = (torch.rand_like(x) > 0.4).to(x) / 0.6
        self.drawn.append(mask.detach())
        return x * mask


def test_networks_without_randomness_are_vmapped():
    engine = Engine(small_mlp(), "mse", "autodiff")
    engine.meta_gradient(engine.flatten(), regression_batch(), 0.1, 2)
    assert engine.why == "backend 'autodiff' was asked for"


def test_dropout_repeats_for_the_same_seed_and_differs_between_calls():
    engine, batch = Engine(dropout_mlp(), "mse", "autodiff"), regression_batch()
    theta = engine.flatten()
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        results.append([engine.meta_gradient(theta, batch, 0.1, 2).grad for _ in range(2)])
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][0], results[0][1])
    assert "loop over tasks" in engine.why


def test_dropout_draws_one_seed_a_call_from_torchs_generator():
    engine, batch = Engine(dropout_mlp(), "mse", "autodiff"), regression_batch()
    theta = engine.flatten()
    after = []
    for steps in (1, 4):
        torch.manual_seed(7)
        engine.meta_gradient(theta, batch, 0.1, steps)
        after.append(torch.rand(3))
    assert torch.equal(*after)


def test_a_steps_hessian_replays_the_masks_of_its_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), Recorded(), nn.Linear(12, 1)).double()
    engine, batch = Engine(model, "mse", "autodiff"), regression_batch()
    engine.meta_gradient(engine.flatten(), batch, 0.1, 2)  # decides for the loop over tasks
    model[2].drawn.clear()
    result = engine.meta_gradient(engine.flatten(), batch, 0.1, 2)
    tasks, drawn = 3, model[2].drawn
    assert len(drawn) == tasks * (2 + 1 + 2)  # two inner steps, the query, two Hessians
    steps = [drawn[i * tasks : (i + 1) * tasks] for i in range(5)]
    for task in range(tasks):
        assert torch.equal(steps[0][task], steps[4][task])
        assert torch.equal(steps[1][task], steps[3][task])
        assert not torch.equal(steps[0][task], steps[1][task])
    assert not torch.equal(steps[0][0], steps[0][1])
    model[2].replay = [steps[k][task] for task in range(tasks) for k in range(3)]
    losses, grads, _ = meta_gradient(model, batch, rates_like(model, 0.1), 2, mse)
    assert relative_error(result.loss, losses) < EXACT
    assert relative_error(result.grad, flat(grads)) < EXACT


def test_eval_mode_turns_dropout_off():
    model, batch = dropout_mlp().eval(), regression_batch()
    engine = Engine(model, "mse", "autodiff")
    _, grads, _ = meta_gradient(model, batch, rates_like(model, 0.1), 1, mse)
    assert relative_error(engine.meta_gradient(engine.flatten(), batch, 0.1, 1).grad, flat(grads)) < EXACT


class Counting(nn.Module):
    """A buffer that enters the output and that the forward changes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(1, 1)
        self.register_buffer("scale", torch.tensor(2.0))
        self.double()

    def forward(self, x):
        y = torch.tanh(self.linear(x)) * self.scale.clone()
        self.scale.add_(1.0)
        return y


def test_buffers_are_constants():
    model, batch = Counting(), regression_batch()
    engine = Engine(model, "mse", "autodiff")
    first = engine.meta_gradient(engine.flatten(), batch, 0.1, 2).grad
    assert float(model.scale) == 2.0
    assert torch.equal(first, engine.meta_gradient(engine.flatten(), batch, 0.1, 2).grad)
    _, grads, _ = meta_gradient(model, batch, rates_like(model, 0.1), 2, mse)
    assert relative_error(first, flat(grads)) < EXACT


class Branching(nn.Module):
    """Control flow that depends on the data: neither torch.fx nor vmap takes it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(1, 5)
        self.head = nn.Linear(5, 1)
        self.double()

    def forward(self, x):
        h = self.linear(x)
        h = torch.tanh(h) if float(x.sum()) > 0 else torch.sigmoid(h)
        return self.head(h)


def test_control_flow_on_data_takes_the_loop_over_tasks(caplog):
    model, batch = Branching(), regression_batch()
    engine = Engine(model, "mse")
    assert not engine.fused
    assert "torch.fx cannot trace the forward of Branching" in engine.why
    assert engine.why in caplog.text
    _, grads, _ = meta_gradient(model, batch, rates_like(model, 0.1), 2, mse)
    assert relative_error(engine.meta_gradient(engine.flatten(), batch, 0.1, 2).grad, flat(grads)) < EXACT
    assert "loop over tasks" in engine.why


class Square(torch.autograd.Function):
    """An old-style function: reverse mode only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return 2 * x * dy


class ReverseOnly(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(1, 5)
        self.head = nn.Linear(5, 1)
        self.double()

    def forward(self, x):
        return self.head(Square.apply(self.linear(x)))


def test_functions_without_forward_mode_take_double_backward():
    model, batch = ReverseOnly(), regression_batch()
    engine = Engine(model, "mse", "autodiff")
    _, grads, _ = meta_gradient(model, batch, rates_like(model, 0.1), 2, mse)
    assert relative_error(engine.meta_gradient(engine.flatten(), batch, 0.1, 2).grad, flat(grads)) < EXACT
    assert "double backward" in engine.why


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gru = nn.GRU(4, 6, batch_first=True)
        self.head = nn.Linear(6, 3)
        self.double()

    def forward(self, x):
        return self.head(self.gru(x)[0][:, -1])


def test_a_recurrent_network():
    model, batch = Recurrent(), image_batch(shape=(3, 4))
    _, grads, _ = meta_gradient(model, batch, rates_like(model, 0.3), 2)
    engine = Engine(model)
    assert "layer 'gru' (GRU)" in engine.why
    assert relative_error(engine.meta_gradient(engine.flatten(), batch, 0.3, 2).grad, flat(grads)) < EXACT


def test_the_models_own_error_is_raised_once_as_a_sentence():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 1)
            self.double()

        def forward(self, x):
            raise RuntimeError("the kitchen is closed")

    engine = Engine(Broken(), "mse", "autodiff")
    with pytest.raises(ValueError, match=r"support_x \[3, 4, 1\] does not fit the model: the kitchen is closed"):
        engine.meta_gradient(engine.flatten(), regression_batch(), 0.1, 1)
    assert engine.why == "backend 'autodiff' was asked for"


class PeakBytes(TorchDispatchMode):
    """The largest number of bytes that the tensors made inside it held at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not hasattr(tensor.untyped_storage(), "counted"):
                storage = tensor.untyped_storage()
                storage.counted = True
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _freed(self, size):
        self.now -= size


def test_memory_does_not_grow_with_the_inner_steps():
    # 400 examples x 8 features against 25 parameters: one more step of kept activations would show at once.
    model, batch = small_mlp(), regression_batch(tasks=2, support=400)
    engine = Engine(model, "mse", "autodiff")
    theta = engine.flatten()
    engine.meta_gradient(theta, batch, 0.1, 1)
    peaks = []
    for steps in (1, 6):
        with PeakBytes() as memory:
            engine.meta_gradient(theta, batch, 0.1, steps)
        peaks.append(memory.peak)
    phi = 2 * engine.layout.size * 8
    assert peaks[0] > 2 * 400 * 7 * 8, "the counter sees no activations"
    assert peaks[1] - peaks[0] < 5 * phi + 2000, (peaks, phi)


def test_functional_call_is_left_as_it_was():
    model, batch = small_mlp(), regression_batch()
    before = [p.clone() for p in model.parameters()]
    engine = Engine(model, "mse", "autodiff")
    engine.meta_gradient(engine.flatten(), batch, 0.1, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    assert functional_call(model, dict(model.named_parameters()), (batch[0][0],)).shape == (4, 1)
