"""TaskSource, the base of all task sources: a split, a seed, a position in the stream, and checked arguments."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from typing import Any

from .task_batch import TaskBatch

SPLITS = ("train", "val", "test")


def check_count(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int of at least `least`.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is too small.
    """
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None
    if count < least:
        raise ValueError(f"{name} must be at least {least}, not {count}")
    return count


def check_split(split: str) -> str:
    """Returns `split`. Raises ValueError unless it is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    return split


class TaskSource(ABC):
    """An endless, reproducible stream of task batches.

    Attributes:
        name: name of the data set, such as "omniglot".
        split: "train", "val" or "test".
        seed: seed of the stream, 0 to 2**64 - 1.
        position: index of the batch that `sample()` draws next. Set it, for example, to resume.
        ways: classes in a task; None for regression.
        shots, query_shots: support and query examples, per class for classification.
        input_shape: shape of one example.
        output_size: number of outputs that a model must return per example.
        loss: the loss for the targets, "cross_entropy" or "mse".
    """

    name: str
    ways: int | None
    input_shape: tuple[int, ...]
    output_size: int
    loss: str

    def __init__(self, split: str, shots: int, query_shots: int, seed: int) -> None:
        self.split = check_split(split)
        self.shots = check_count("shots", shots)
        self.query_shots = check_count("query_shots", query_shots)
        self.seed = check_count("seed", seed, least=0)
        if self.seed >= 2**64:
            raise ValueError(f"seed must be below 2**64, not {self.seed}")
        self._position = 0

    @property
    def position(self) -> int:
        """Index of the batch that `sample()` draws next."""
        return self._position

    @position.setter
    def position(self, step: int) -> None:
        self._position = check_count("position", step, least=0)

    def sample(self, tasks: int, step: int | None = None) -> TaskBatch:
        """Draw a batch of `tasks` tasks: batch `step` of the stream, or the batch at `position`, which then advances.

        Raises:
            ValueError, TypeError: `tasks` or `step` is not a positive (for `step`, non-negative) integer.
        """
        tasks = check_count("tasks", tasks)
        if step is not None:
            return self._draw(tasks, check_count("step", step, least=0))
        batch = self._draw(tasks, self._position)
        self._position += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The settings and position of the stream, as plain JSON values."""
        return {**self._identity(), "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position in `state`.

        Raises:
            ValueError: `state` comes from a source with other settings, so its batches would differ.
        """
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise ValueError(f"the saved task stream has {key}={state.get(key)!r}, this one has {key}={value!r}")
        self.position = state["position"]

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in self._identity().items() if key != "name")
        return f"{type(self).__name__}({settings}, position={self._position})"

    def _identity(self) -> dict[str, Any]:
        """The settings that decide the content of the stream."""
        return {
            "name": self.name,
            "split": self.split,
            "seed": self.seed,
            "ways": self.ways,
            "shots": self.shots,
            "query_shots": self.query_shots,
        }

    @abstractmethod
    def _draw(self, tasks: int, step: int) -> TaskBatch:
        """Batch `step` with `tasks` tasks. Must depend only on these, the seed and the split."""
