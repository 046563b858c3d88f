"""ImageTasks: N-way classification tasks from a store of images, gathered by one fancy index."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .sampler import choose_classes, choose_examples, random_stream
from .source import TaskSource, check_count
from .task_batch import TaskBatch

TURNS = 4  # rotations by multiples of 90 degrees


class ImageTasks(TaskSource):
    """Classification tasks over the classes of one split.

    `sample(tasks)` gives float32 images in [0, 1]: `support_x` [T, ways * shots, C, H, W] and `query_x`
    [T, ways * query_shots, C, H, W]. The labels `support_y` and `query_y` are int64. Examples are ordered by class.

    With rotations every class becomes four classes, turned by 0, 90, 180 and 270 degrees. Santoro et al. (2016) and
    Vinyals et al. (2016) do the same for Omniglot. As in MAML's code, a task takes different characters and turns each
    at random. So a task never holds the same character at two angles (a circle and a turned circle look the same).

    Args:
        images: uint8 [classes, examples, C, H, W], 255 = 1.0.
        class_names: one name for each class.
        ways, shots, query_shots: classes in a task, and support and query examples of each.
        rotations: True turns the classes of split "train", "all" the classes of every split, False none.

    Raises:
        ValueError: a task needs more classes or examples than exist.
    """

    loss = "cross_entropy"

    def __init__(
        self,
        images: np.ndarray,
        class_names: list[str],
        ways: int,
        shots: int,
        query_shots: int,
        split: str,
        rotations: bool | str,
        seed: int,
    ) -> None:
        super().__init__(split, shots, query_shots, seed)
        ways = check_count("ways", ways)
        characters, examples = images.shape[:2]
        if ways > characters:
            raise ValueError(f"ways={ways} is more than the {characters} characters of {self.name} {split}")
        if self.shots + self.query_shots > examples:
            raise ValueError(
                f"shots={self.shots} + query_shots={self.query_shots} is more than the {examples} images a character has"
            )
        if rotations not in (True, False, "all"):
            raise ValueError(f"rotations must be True (train only), False or 'all', not {rotations!r}")
        self.ways: int = ways
        self.output_size = ways
        self.input_shape = tuple(images.shape[2:])
        self.class_names = class_names
        self.characters, self.examples = characters, examples
        self.turned = rotations == "all" or (rotations is True and split == "train")
        turns = [np.rot90(images, turn, axes=(-2, -1)) for turn in range(TURNS if self.turned else 1)]
        self._rows = np.stack(turns).reshape(-1, int(np.prod(self.input_shape)))  # [turns * classes * examples, pixels]

    @property
    def images(self) -> np.ndarray:
        """Every image of the split, without rotations: uint8 [characters, examples, C, H, W], 255 = 1.0."""
        upright = self._rows[: self.characters * self.examples]
        return upright.reshape(self.characters, self.examples, *self.input_shape)

    @property
    def classes(self) -> int:
        """Number of classes, including rotations."""
        return self.characters * (TURNS if self.turned else 1)

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "classes": self.classes}

    def _draw(self, tasks: int, step: int) -> TaskBatch:
        rows = self._choose(tasks, step)
        support_rows, query_rows = rows[:, :, : self.shots], rows[:, :, self.shots :]
        return TaskBatch(
            self._gather(support_rows), self._labels(support_rows), self._gather(query_rows), self._labels(query_rows)
        )

    def _choose(self, tasks: int, step: int) -> np.ndarray:
        """Rows of the store: int [tasks, ways, shots + query_shots]."""
        stream = [random_stream(self.seed, self.split, step, part) for part in range(3)]
        chosen = choose_classes(stream[0], tasks, self.ways, self.characters)
        if self.turned:
            chosen = chosen + self.characters * stream[1].integers(TURNS, size=chosen.shape)
        example = choose_examples(stream[2], tasks, self.ways, self.shots + self.query_shots, self.examples)
        return chosen[:, :, None] * self.examples + example

    def _gather(self, rows: np.ndarray) -> torch.Tensor:
        tasks = len(rows)
        pixels = self._rows[rows.reshape(-1)]
        return torch.from_numpy(pixels).to(torch.float32).div_(255).view(tasks, -1, *self.input_shape)

    def _labels(self, rows: np.ndarray) -> torch.Tensor:
        tasks, ways, examples = rows.shape
        return torch.arange(ways).repeat_interleave(examples).repeat(tasks, 1)
