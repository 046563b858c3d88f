# A recorded and replayed call computes the same as a call that launches every Step, whatever changes between replays.
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from compare import expect_same_bits
from torch import nn

import fastmaml as fm

_C = pytest.importorskip("fastmaml._C", reason="make build")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    _C.release_memory()
    _C.set_recording(True)
    _C.set_cuda_walk("layered")  # a resident walk is one launch already
    yield
    _C.set_cuda_walk("auto")
    _C.set_recording(True)
    _C.release_memory()


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return fm.models.conv4(ways=3, filters=5, image_size=16)


def regressor() -> nn.Module:
    torch.manual_seed(1)
    return fm.models.mlp([2, 9, 3])


def images(seed: int, tasks: int = 2) -> fm.TaskBatch:
    generator = torch.Generator().manual_seed(seed)
    x, labels = torch.rand(tasks, 9, 1, 16, 16, generator=generator), torch.randint(3, (tasks, 9), generator=generator)
    return fm.TaskBatch(x[:, :3], labels[:, :3], x[:, 3:], labels[:, 3:])


def numbers(seed: int, tasks: int = 3) -> fm.TaskBatch:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(tasks, 7, 2, generator=generator), torch.randn(tasks, 7, 3, generator=generator)
    return fm.TaskBatch(x[:, :3], y[:, :3], x[:, 3:], y[:, 3:])


def meta_gradient(engine: fm.Engine, theta, batch, rate, recorded: bool, **how):
    """The result, and how many replays it took."""
    _C.set_recording(recorded)
    before = _C.recordings()[1]
    result = engine.meta_gradient(theta, batch, inner_lr=rate, inner_steps=2, **how)
    return result, _C.recordings()[1] - before


def same(a, b) -> None:
    for name, of_a, of_b in zip(a._fields, a, b):
        if isinstance(of_a, torch.Tensor):
            expect_same_bits(of_a, of_b, label=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("model, draw, loss", [(classifier, images, "cross_entropy"), (regressor, numbers, "mse")])
def test_replays_see_other_rates_data_and_pointers(model, draw, loss, dtype):
    engine = fm.Engine(model().to(dtype), loss, "cuda_emulated")
    start, results = engine.flatten(), []
    for i in range(4):  # seen, recorded, replayed, replayed
        theta, batch = start * (1 + 0.1 * i), fm.TaskBatch(*(t.clone() for t in draw(i).to(dtype=dtype)))
        weights = torch.rand(batch.support_x.shape[0], generator=torch.Generator().manual_seed(i)).to(dtype)
        rate = torch.full_like(theta, 0.05 * (i + 1))
        results.append((theta, batch, rate, weights))
    recorded = [meta_gradient(engine, t, b, r, True, task_weights=w) for t, b, r, w in results]
    assert [replays for _, replays in recorded] == [0, 1, 1, 1]
    for (t, b, r, w), (result, _) in zip(results, recorded):
        plainly, replays = meta_gradient(engine, t, b, r, False, task_weights=w)
        assert replays == 0
        same(result, plainly)


def test_results_of_one_replay_outlive_the_next():
    engine = fm.Engine(regressor(), "mse", "cuda_emulated")
    theta = engine.flatten()
    first = [engine.meta_gradient(theta, numbers(i), 0.1, 2) for i in range(3)]
    kept = [(m.grad.clone(), m.loss.clone(), m.query_output.clone()) for m in first]
    engine.meta_gradient(theta, numbers(9), 0.1, 2)
    for m, (grad, loss, output) in zip(first, kept):
        expect_same_bits(m.grad, grad, label="grad")
        expect_same_bits(m.loss, loss, label="loss")
        expect_same_bits(m.query_output, output, label="query_output")


def test_adams_count_of_steps_is_no_part_of_a_recording():
    engine = fm.Engine(regressor(), "mse", "cuda_emulated")
    theta, (x, y, *_), inner = engine.flatten(), numbers(0), fm.inner.Adam(lr=0.1)

    def loop() -> list[torch.Tensor]:
        now, results = engine.adapt_with(theta, x, y, inner=inner, inner_steps=1), []
        for step in range(1, 5):
            now = engine.adapt_with(now.params, x, y, inner=inner, inner_steps=1, state=now.state, steps_taken=step)
            results.append(now.params)
        return results

    replays = _C.recordings()[1]
    recorded = loop()
    assert _C.recordings()[1] > replays
    _C.set_recording(False)
    for k, (a, b) in enumerate(zip(recorded, loop())):
        expect_same_bits(a, b, label=f"step {k}")


def test_other_sizes_and_shared_parameters_are_other_recordings():
    engine = fm.Engine(regressor(), "mse", "cuda_emulated")
    reference = fm.Engine(engine.model, "mse", "reference")
    theta = engine.flatten()
    for _ in range(3):
        for tasks in (1, 2, 5):
            x, y, *_ = numbers(tasks, tasks)
            for params in (theta, theta.expand(tasks, -1).contiguous()):
                loss, grad = engine.grad(params, x, y)
                expected = reference.grad(params, x, y)
                torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(grad, expected[1], rtol=1e-4, atol=1e-6)
    assert _C.recordings()[0] == 6


def test_a_loss_in_python_is_not_recorded():
    engine = fm.Engine(regressor(), lambda output, target: (output - target).abs().mean(1), "cuda_emulated")
    before = _C.recordings()[1]
    results = [engine.meta_gradient(engine.flatten(), numbers(0), 0.1, 2).grad for _ in range(3)]
    assert _C.recordings() == (0, before)
    expect_same_bits(results[0], results[2], label="grad")


def test_few_recordings_are_held_and_released():
    engine = fm.Engine(regressor(), "mse", "cuda_emulated")
    for examples in range(2, 30):
        x, y = torch.randn(1, examples, 2), torch.randn(1, examples, 3)
        for _ in range(2):
            engine.grad(engine.flatten(), x, y)
    assert _C.recordings()[0] == 16
    _C.release_memory()
    assert _C.recordings()[0] == 0


def test_an_error_while_recording_leaves_nothing_behind():
    engine = fm.Engine(regressor(), "mse", "cuda_emulated")
    x, y, *_ = numbers(0)
    program = engine.program(x)
    wrong = program.text.replace("loss mse", "loss none")
    empty = torch.empty(0)
    for _ in range(2):
        with pytest.raises(ValueError, match="has no loss"):
            torch.ops.fastmaml.grad(wrong, "cuda_emulated", engine.flatten(), x, y, None, empty)
    for _ in range(3):
        engine.grad(engine.flatten(), x, y)
    assert _C.recordings()[0] == 1
