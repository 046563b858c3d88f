"""Image tasks on images whose pixels encode their class, drawing and rotation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmaml.tasks.image_tasks import ImageTasks

CLASSES, EXAMPLES = 9, 8


class Coded(ImageTasks):
    """4x4 images: row 0 = class, row 1 = drawing, [3, 0] = 255 (so that a turn can be seen), else 0."""

    name = "coded"

    def __init__(self, ways=3, shots=2, query_shots=4, split="train", rotations=False, seed=0):
        images = np.zeros((CLASSES, EXAMPLES, 1, 4, 4), np.uint8)
        images[..., 0, :] = np.arange(CLASSES)[:, None, None, None]
        images[..., 1, :] = np.arange(EXAMPLES)[:, None, None]
        images[..., 3, 0] = 255
        super().__init__(images, [str(i) for i in range(CLASSES)], ways, shots, query_shots, split, rotations, seed)


def decode(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class, drawing and quarter turns of images [..., 1, 4, 4]."""
    pixels = np.rint(255 * x.numpy()).astype(int)[..., 0, :, :]
    found = np.full((3, *pixels.shape[:-2]), -1)
    for turn in range(4):
        upright = np.rot90(pixels, -turn, axes=(-2, -1))
        match = upright[..., 3, 0] == 255
        found[:, match] = np.stack([upright[..., 0, 0], upright[..., 1, 0], np.full(match.shape, turn)])[:, match]
    assert (found >= 0).all()
    return found[0], found[1], found[2]


def test_shapes_dtypes_and_labels():
    batch = Coded().sample(5)
    assert [tuple(t.shape) for t in batch] == [(5, 6, 1, 4, 4), (5, 6), (5, 12, 1, 4, 4), (5, 12)]
    assert [t.dtype for t in batch] == [torch.float32, torch.int64] * 2
    assert all(t.is_contiguous() for t in batch)
    assert batch.support_y[3].tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.query_y[4].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_pixels_are_exactly_value_over_255():
    x = Coded().sample(5).support_x
    assert x.max() == 1.0 and x.min() == 0.0
    assert set((x * 255).round().int().unique().tolist()) <= {*range(9), 255}


def test_a_label_is_one_class_in_support_and_query_and_no_drawing_is_in_both():
    batch = Coded().sample(40)
    support_class, support_drawing, _ = decode(batch.support_x)
    query_class, query_drawing, _ = decode(batch.query_x)
    for task in range(40):
        classes = []
        for label in range(3):
            support, query = batch.support_y[task].numpy() == label, batch.query_y[task].numpy() == label
            (one,) = {*support_class[task][support], *query_class[task][query]}
            drawings = [*support_drawing[task][support], *query_drawing[task][query]]
            assert len(set(drawings)) == len(drawings) == 6
            classes.append(one)
        assert len(set(classes)) == 3


def test_labels_are_permuted():
    support_class, _, _ = decode(Coded(shots=1).sample(600).support_x)
    counts = np.bincount(support_class[:, 0], minlength=CLASSES)  # 67 expected, standard deviation 7.7
    assert counts.min() > 28 and counts.max() < 106


def test_rotations_make_four_classes_of_each_and_keep_characters_apart():
    source = Coded(rotations=True)
    assert source.classes == 4 * CLASSES and source.characters == CLASSES
    batch = source.sample(200)
    support_class, _, support_turn = decode(batch.support_x)
    query_class, _, query_turn = decode(batch.query_x)
    for turns in (support_turn, query_turn):  # one turn for a class in a task
        assert (turns.reshape(200, 3, -1) == turns.reshape(200, 3, -1)[..., :1]).all()
    assert (support_turn[:, ::2] == query_turn[:, ::4]).all()
    assert (support_class[:, ::2] == query_class[:, ::4]).all()
    assert all(len(set(task)) == 3 for task in support_class[:, ::2].tolist())
    pairs = {(c, t) for c, t in zip(support_class.ravel(), support_turn.ravel())}
    assert len(pairs) == 4 * CLASSES  # 600 draws miss one of 36 with probability 2e-6


@pytest.mark.parametrize(
    ("split", "rotations", "turned"), [("val", True, False), ("test", True, False), ("test", "all", True)]
)
def test_rotations_are_for_training_unless_all(split, rotations, turned):
    source = Coded(split=split, rotations=rotations)
    _, _, turns = decode(source.sample(50).query_x)
    assert source.turned is turned and bool(turns.any()) is turned


def test_images_gives_the_upright_store():
    images = Coded(rotations=True).images
    assert images.shape == (CLASSES, EXAMPLES, 1, 4, 4) and (images[..., 3, 0] == 255).all()


@pytest.mark.parametrize("rotations", [False, True])
def test_batches_are_reproducible_and_prefixes_agree(rotations):
    source, again = Coded(rotations=rotations, seed=4), Coded(rotations=rotations, seed=4)
    source.sample(7)
    second = source.sample(7)
    assert all(torch.equal(a, b) for a, b in zip(second, again.sample(7, step=1)))
    assert all(torch.equal(a[:3], b) for a, b in zip(second, again.sample(3, step=1)))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"ways": 10}, "ways=10 is more than the 9 characters of coded train"),
        ({"ways": 0}, "ways must be at least 1, not 0"),
        ({"shots": 3, "query_shots": 6}, "shots=3 \\+ query_shots=6 is more than the 8 images a character has"),
        ({"split": "dev"}, "unknown split 'dev'"),
        ({"rotations": "some"}, "rotations must be True .* not 'some'"),
    ],
    ids=str,
)
def test_tasks_that_do_not_fit_are_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Coded(**arguments)


def test_the_largest_task_that_fits_uses_everything():
    source = Coded(ways=9, shots=3, query_shots=5)
    classes, drawings, _ = decode(torch.cat(source.sample(1)[::2], dim=1))
    assert len(set(zip(classes[0], drawings[0]))) == CLASSES * EXAMPLES


def test_state_of_other_ways_is_refused():
    with pytest.raises(ValueError, match="ways=3, this one has ways=4"):
        Coded(ways=4).load_state_dict(Coded(ways=3).state_dict())
