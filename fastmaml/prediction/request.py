"""From the arguments of `fastmaml plan` to a learner, and a batch of the right shapes that takes no memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from fastmaml import algorithms
from fastmaml.algorithms.names import ALGORITHMS
from fastmaml.benchmark import own_model
from fastmaml.prediction.engine_calls import empty_batch
from fastmaml.training.experiment import make_learner
from fastmaml.training.presets import PRESETS, preset
from fastmaml.training.run_config import RunConfig


class Sizes(NamedTuple):
    """Sizes that replace those of a preset or a file. None: unchanged."""

    tasks: int | None = None
    ways: int | None = None
    shots: int | None = None  # per class, or per task for a regression or a file
    query_shots: int | None = None
    inner_steps: int | None = None

    def check(self) -> None:
        for name, value in self._asdict().items():
            least = 0 if name == "inner_steps" else 2 if name == "ways" else 1
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")


class Request(NamedTuple):
    """A learner with its tasks, and a title for both."""

    learner: Any
    batch: tuple[Any, ...]
    title: str


def of_dataset(
    name: str, algorithm: str, sizes: Sizes, memory: str, double: bool, filters: int | None, seed: int = 0
) -> Request:
    """The network and settings of `fastmaml train`. Raises ValueError for sizes that do not fit."""
    sizes.check()
    config = preset(
        name, algorithm=algorithm, memory=memory, backend="cpu", filters=filters, meta_batch=sizes.tasks, ways=sizes.ways,
        shots=sizes.shots, query_shots=sizes.query_shots, inner_steps=sizes.inner_steps, seed=seed,
    )  # fmt: skip
    learner = make_learner(config)
    if double:
        learner.double()
    support = config.shots if sizes.shots is not None else config.train_shots or config.shots
    classes = config.ways or 1
    batch = _batch(
        learner, config.meta_batch, classes * support, classes * config.query_shots, _shape(config), config.ways
    )
    title = f"{config.title} on {name}, {_sizes(batch)}, K = {config.inner_steps}"
    return Request(learner, batch, title)


def of_file(target: str, algorithm: str, sizes: Sizes, memory: str, double: bool, seed: int = 0) -> Request:
    """The user's own model (FILE.py:FUNCTION) with an algorithm that needs only a model."""
    sizes.check()
    if sizes.ways is not None:
        raise ValueError(f"--ways {sizes.ways}: the model of {target} fixes the number of classes")
    given = own_model.problem_of(target, seed)
    case, loss = given.case, given.case.loss
    learners: dict[str, Any] = {"maml": algorithms.MAML, "fomaml": algorithms.FOMAML}
    if algorithm not in learners:
        raise ValueError(f"--algorithm {algorithm}: your own model can be planned with {' and '.join(learners)}")
    steps = case.inner_steps if sizes.inner_steps is None else sizes.inner_steps
    model: nn.Module = given.model.double() if double else given.model
    learner = learners[algorithm](
        model, inner_lr=case.inner_lr, inner_steps=steps, loss=loss, backend="cpu", memory=memory
    )
    y = given.batch.support_y
    labels = not y.is_floating_point()
    tasks, support, query = sizes.tasks or case.tasks, sizes.shots or case.support, sizes.query_shots or case.query
    targets = tuple(y.shape[2:])
    batch = empty_batch(tasks, support, query, case.input_shape, targets, 1 if labels else None, _dtype(learner))
    return Request(
        learner, batch, f"{ALGORITHMS[algorithm]} on {case.name} ({case.network}), {_sizes(batch)}, K = {steps}"
    )


def is_dataset(target: str) -> bool:
    return target in PRESETS


def _shape(config: RunConfig) -> tuple[int, ...]:
    if "sizes" in config.model:
        return (int(config.model["sizes"][0]),)
    size = int(config.model.get("image_size", 28))
    return (int(config.model.get("in_channels", 1)), size, size)


def _batch(
    learner: Any, tasks: int, support: int, query: int, shape: tuple[int, ...], ways: int | None
) -> tuple[Any, ...]:
    return empty_batch(tasks, support, query, shape, () if ways else (1,), ways, _dtype(learner))


def _dtype(learner: Any) -> torch.dtype:
    dtype: torch.dtype = next(learner.parameters()).dtype
    return dtype


def _sizes(batch: tuple[Any, ...]) -> str:
    return f"{len(batch[0])} tasks, {batch[0].shape[1]} support and {batch[2].shape[1]} query examples"
