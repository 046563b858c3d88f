"""`RunConfig`: all settings that decide the numbers of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from fastmaml.algorithms.names import ALGORITHMS

NEEDS_CLASSES = ("protomaml",)  # these need tasks with classes
SCHEDULES = ("constant", "cosine", "linear")


@dataclass(frozen=True)
class RunConfig:
    """All settings that decide the numbers of a run, kept in `config.json` of the run folder.

    `shots` and `query_shots` count per class, or per task if `ways` is None (regression). Rates are for mean losses.
    """

    dataset: str
    loss: str
    model: dict[str, Any] = field(default_factory=dict)
    algorithm: str = "maml"
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of the algorithm's class, such as lam
    ways: int | None = 5
    shots: int = 1
    train_shots: int | None = None  # support examples in training, if different from `shots` (Reptile)
    query_shots: int = 1
    meta_batch: int = 32
    steps: int = 60_000
    inner_lr: float | tuple[float, ...] = 0.4  # two numbers: the algorithm draws its initial rates between them
    inner_steps: int = 1
    outer_lr: float = 1e-3
    schedule: str = "constant"  # of outer_lr; "cosine" and "linear" fall to outer_lr_min
    outer_lr_min: float = 0.0
    clip_grad: float | None = None  # limit of every entry of the network's meta-gradient
    backend: str = "auto"
    batch_norm: str = "transductive"
    memory: str = "auto"
    precision: str = "float32"
    seed: int = 0
    root: str | None = None
    log_every: int = 10
    validate_every: int = 500
    validation_tasks: int = 200
    ensemble: int = 1  # number of best checkpoints by validation whose outputs are averaged at test
    time_limit: float | None = None  # seconds of training, including those before a resume
    eval_tasks: int = 600
    eval_inner_steps: int = 10
    eval_shots: tuple[int, ...] = ()  # empty: `shots`
    eval_query_shots: int | None = None  # None: as in training

    @property
    def metric(self) -> str:
        """The metric's name: "accuracy" or "mse"."""
        return "accuracy" if self.loss == "cross_entropy" else "mse"

    @property
    def title(self) -> str:
        """The algorithm's name as papers write it."""
        return ALGORITHMS[self.algorithm]

    def settings(self) -> dict[str, Any]:
        """Every setting by name, as plain lists, numbers, texts and mappings."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def to_json(self) -> dict[str, Any]:
        """The content of `config.json`, without the description of the machine."""
        return self.settings() | {"metric": self.metric}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunConfig:
        """From the content of `config.json`. Other keys (versions, machine) are ignored."""
        known = {item.name for item in fields(cls)}
        settings = {key: value for key, value in values.items() if key in known}
        missing = sorted({"dataset", "loss", "model"} - settings.keys())
        if missing:
            raise ValueError(f"config.json has no {', '.join(missing)}")
        return checked(cls(**typed(settings)))


class Kind(NamedTuple):
    """The kind of value that a setting takes."""

    words: str
    fits: Callable[[Any], bool]

    def or_null(self) -> Kind:
        return Kind(f"{self.words} or null", lambda value: value is None or self.fits(value))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_WHOLE = Kind("a whole number", _is_whole)
_NUMBER = Kind("a number", _is_number)
_TEXT = Kind("text", lambda value: isinstance(value, str))
_MAPPING = Kind("a mapping", lambda value: isinstance(value, dict) and all(isinstance(key, str) for key in value))
_RATE = Kind("a number or two in a list", lambda value: _is_number(value) or _all(_is_number, value, (2,)))
_COUNTS = Kind("a list of whole numbers", lambda value: _all(_is_whole, value))


def _all(fits: Callable[[Any], bool], value: Any, lengths: tuple[int, ...] = ()) -> bool:
    return isinstance(value, tuple) and all(map(fits, value)) and (not lengths or len(value) in lengths)


_KINDS = {
    **dict.fromkeys(
        ("dataset", "loss", "algorithm", "schedule", "backend", "batch_norm", "memory", "precision"), _TEXT
    ),
    **dict.fromkeys(("model", "options"), _MAPPING),
    **dict.fromkeys(("outer_lr", "outer_lr_min"), _NUMBER),
    **dict.fromkeys(("clip_grad", "time_limit"), _NUMBER.or_null()),
    **dict.fromkeys(("ways", "train_shots", "eval_query_shots"), _WHOLE.or_null()),
    "root": _TEXT.or_null(),
    "inner_lr": _RATE,
    "eval_shots": _COUNTS,
}  # the others: _WHOLE


def typed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from a file, with lists as tuples. Raises ValueError for a value of the wrong kind."""
    result = {}
    for name, value in settings.items():
        kind = _KINDS.get(name, _WHOLE)
        if name in ("eval_shots", "inner_lr") and isinstance(value, list):
            value = tuple(value)
        if not kind.fits(value):
            raise ValueError(f"{name} is {value!r}; it must be {kind.words}")
        result[name] = value
    return result


_SETTINGS = {item.name for item in fields(RunConfig)}
_LEAST = {
    "shots": 1,
    "query_shots": 1,
    "meta_batch": 1,
    "steps": 1,
    "inner_steps": 0,
    "log_every": 1,
    "validate_every": 1,
    "validation_tasks": 2,
    "ensemble": 1,
    "eval_tasks": 2,
    "eval_inner_steps": 0,
    "seed": 0,
    "ways": 2,
    "train_shots": 1,
    "eval_query_shots": 1,
}


def checked(config: RunConfig) -> RunConfig:
    """Returns `config`. Raises ValueError that names the first value out of range."""
    for name, smallest in _LEAST.items():
        value = getattr(config, name)
        if value is not None and value < smallest:
            raise ValueError(f"{name} is {value}; it must be at least {smallest}")
    for name in ("outer_lr", "clip_grad", "time_limit"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            unit = " seconds" if name == "time_limit" else ""
            raise ValueError(f"{name} is {value}{unit}; it must be above 0")
    if not 0 <= config.outer_lr_min <= config.outer_lr:
        raise ValueError(
            f"outer_lr_min is {config.outer_lr_min}; it must be between 0 and outer_lr ({config.outer_lr})"
        )
    for name, choices in (("algorithm", ALGORITHMS), ("schedule", SCHEDULES)):
        if getattr(config, name) not in choices:
            raise ValueError(f"{name} {getattr(config, name)!r} is not one of {', '.join(choices)}")
    for name in config.options:
        if name in _SETTINGS:
            raise ValueError(f"{name} is a separate setting, not one of the options ({config.options})")
    if config.ways is None and config.algorithm in NEEDS_CLASSES:
        raise ValueError(
            f"{config.title} builds its head from the classes of a task, and {config.dataset} is a regression; "
            "choose another algorithm"
        )
    return config
