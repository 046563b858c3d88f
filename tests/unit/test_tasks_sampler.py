"""The random streams and the choice of classes and examples."""

from __future__ import annotations

import numpy as np
import pytest

from fastmaml.tasks.sampler import choose_classes, choose_examples, random_stream


def numbers(*key: object) -> list[float]:
    return random_stream(*key).random(4).tolist()  # type: ignore[arg-type]


def test_a_stream_is_a_function_of_its_key():
    assert numbers(3, "train", 7, 1) == numbers(3, "train", 7, 1)


@pytest.mark.parametrize(
    "other", [(4, "train", 7, 1), (3, "val", 7, 1), (3, "train", 8, 1), (3, "train", 7, 2)], ids=str
)
def test_every_part_of_the_key_makes_another_stream(other):
    assert not set(numbers(*other)) & set(numbers(3, "train", 7, 1))


def test_streams_of_large_seeds_and_steps_differ():
    assert numbers(2**64 - 1, "train", 2**63) != numbers(2**64 - 1, "train", 2**63 + 1)


def test_classes_of_a_task_differ_and_all_classes_come_in_every_place():
    chosen = choose_classes(random_stream(0, "train", 0), 4000, 3, 7)
    assert chosen.shape == (4000, 3)
    assert all(len(set(task)) == 3 for task in chosen.tolist())
    counts = np.stack([np.bincount(column, minlength=7) for column in chosen.T])
    # 4000 / 7 = 571 expected, standard deviation 22: five of them on either side
    assert counts.min() > 460 and counts.max() < 680


def test_choosing_every_class_gives_a_permutation():
    chosen = choose_classes(random_stream(0, "train", 0), 50, 6, 6)
    assert (np.sort(chosen, axis=1) == np.arange(6)).all()
    assert len(set(map(tuple, chosen.tolist()))) > 40


def test_examples_of_a_class_differ_and_are_uniform():
    chosen = choose_examples(random_stream(0, "train", 0), 500, 4, 5, 20)
    assert chosen.shape == (500, 4, 5)
    assert all(len(set(row)) == 5 for row in chosen.reshape(-1, 5).tolist())
    counts = np.bincount(chosen.ravel(), minlength=20)  # 500 expected, standard deviation about 19
    assert counts.min() > 400 and counts.max() < 600


def test_the_first_tasks_do_not_depend_on_how_many_follow():
    few, many = (choose_classes(random_stream(1, "train", 5), tasks, 5, 100) for tasks in (3, 32))
    assert (few == many[:3]).all()
    few, many = (choose_examples(random_stream(1, "train", 5), tasks, 5, 6, 20) for tasks in (3, 32))
    assert (few == many[:3]).all()
