"""Sinusoid tasks, and the base of every task source: the stream, its position, its state, its checks."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fastmaml.tasks import Sinusoid, TaskBatch


def same(a: TaskBatch, b: TaskBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


def test_shapes_and_dtypes():
    batch = Sinusoid(shots=5, query_shots=7).sample(3)
    assert [tuple(t.shape) for t in batch] == [(3, 5, 1), (3, 5, 1), (3, 7, 1), (3, 7, 1)]
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in batch)


def test_targets_are_the_wave_that_is_exposed():
    batch, waves = Sinusoid(shots=5, query_shots=100, split="test").sample_with_parameters(50, step=2)
    for x, y in (batch[:2], batch[2:]):
        expected = waves.amplitude[:, None, None] * torch.sin(x.double() - waves.phase[:, None, None])
        assert torch.equal(y, expected.float())
        assert torch.equal(waves.at(x), y)


def test_ranges_are_those_of_the_paper_and_filled():
    batch, waves = Sinusoid(shots=10, query_shots=10).sample_with_parameters(5000)
    # 5000 uniform draws leave a gap of more than 0.5 % of the range at an end with probability below 1e-10
    for values, low, high in ((waves.amplitude, 0.1, 5.0), (waves.phase, 0.0, math.pi), (batch.support_x, -5.0, 5.0)):
        edge = 0.005 * (high - low)
        assert low <= values.min() < low + edge and high - edge < values.max() <= high
        assert abs(values.double().mean() - (low + high) / 2) < 0.03 * (high - low)


def test_waves_and_query_points_do_not_depend_on_shots():
    (a, waves_a), (b, waves_b) = (
        Sinusoid(shots=shots, query_shots=100, split="test").sample_with_parameters(20, step=0) for shots in (5, 20)
    )
    assert torch.equal(waves_a.amplitude, waves_b.amplitude) and torch.equal(waves_a.phase, waves_b.phase)
    assert torch.equal(a.query_x, b.query_x) and torch.equal(a.query_y, b.query_y)


def test_sample_with_parameters_moves_the_position_like_sample():
    plain, with_parameters = Sinusoid(), Sinusoid()
    plain.sample(2), with_parameters.sample_with_parameters(2)
    batch, waves = with_parameters.sample_with_parameters(2)
    assert same(batch, plain.sample(2)) and with_parameters.position == 2
    assert torch.equal(waves.at(batch.query_x), batch.query_y)


def test_step_reproduces_a_batch_and_leaves_the_position():
    source = Sinusoid(seed=3)
    drawn = [source.sample(4) for _ in range(3)]
    assert source.position == 3
    assert all(same(source.sample(4, step=i), batch) for i, batch in enumerate(drawn))
    assert source.position == 3
    assert not same(drawn[0], drawn[1])


def test_position_can_be_set():
    source = Sinusoid()
    expected = source.sample(4, step=17)
    source.position = 17
    assert same(source.sample(4), expected) and source.position == 18


def test_a_split_does_not_depend_on_what_is_drawn_from_another():
    train, val = Sinusoid(split="train"), Sinusoid(split="val")
    expected = Sinusoid(split="train").sample(4)
    val.sample(100)
    assert same(train.sample(4), expected)
    assert not same(val.sample(4, step=0), expected)


def test_the_first_tasks_do_not_depend_on_the_meta_batch():
    source = Sinusoid()
    assert same(source.sample(3, step=1), TaskBatch(*(t[:3] for t in source.sample(25, step=1))))


def test_state_survives_json_and_continues():
    source = Sinusoid(seed=5)
    source.sample(4), source.sample(4)
    resumed = Sinusoid(seed=5)
    resumed.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert same(resumed.sample(4), source.sample(4)) and resumed.position == source.position == 3


def test_state_of_another_stream_is_refused():
    with pytest.raises(ValueError, match="seed=5, this one has seed=6"):
        Sinusoid(seed=6).load_state_dict(Sinusoid(seed=5).state_dict())


def test_a_model_can_be_sized_from_the_source():
    source = Sinusoid()
    assert (source.name, source.ways, source.input_shape, source.output_size, source.loss) == (
        "sinusoid",
        None,
        (1,),
        1,
        "mse",
    )


def test_batch_to_converts_floats_only():
    batch = TaskBatch(
        torch.zeros(1, 2, 1), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, 1), torch.ones(1, 2).long()
    )
    assert [t.dtype for t in batch.to(dtype=torch.float64)] == [torch.float64, torch.int64] * 2


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"split": "tset"}, ValueError, "unknown split 'tset': choose one of train, val, test"),
        ({"shots": 0}, ValueError, "shots must be at least 1, not 0"),
        ({"query_shots": -1}, ValueError, "query_shots must be at least 1, not -1"),
        ({"shots": 2.5}, TypeError, "shots must be an integer, not 2.5"),
        ({"seed": -1}, ValueError, "seed must be at least 0, not -1"),
        ({"seed": 2**64}, ValueError, f"seed must be below 2\\*\\*64, not {2**64}"),
    ],
    ids=str,
)
def test_bad_settings_are_one_sentence(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        Sinusoid(**arguments)


@pytest.mark.parametrize(
    ("tasks", "step", "error", "sentence"),
    [
        (0, None, ValueError, "tasks must be at least 1, not 0"),
        (-3, None, ValueError, "tasks must be at least 1, not -3"),
        (1.0, None, TypeError, "tasks must be an integer, not 1.0"),
        (1, -1, ValueError, "step must be at least 0, not -1"),
    ],
)
def test_bad_requests_are_one_sentence_and_move_nothing(tasks, step, error, sentence):
    source = Sinusoid()
    with pytest.raises(error, match=sentence):
        source.sample(tasks, step)
    with pytest.raises(error, match=sentence):
        source.sample_with_parameters(tasks, step)
    assert source.position == 0
