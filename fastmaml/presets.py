"""What a run is: `RunConfig`, and the published settings of each data set, translated for mean losses."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

ALGORITHMS = ("maml", "fomaml")


@dataclass(frozen=True)
class RunConfig:
    """All that decides the numbers of a run; `config.json` of the run folder holds it.

    `shots` and `query_shots` count per class, or per task where `ways` is None (regression). Rates are for mean losses.
    """

    dataset: str
    loss: str
    model: dict[str, Any] = field(default_factory=dict)
    algorithm: str = "maml"
    ways: int | None = 5
    shots: int = 1
    query_shots: int = 1
    meta_batch: int = 32
    steps: int = 60_000
    inner_lr: float = 0.4
    inner_steps: int = 1
    outer_lr: float = 1e-3
    schedule: str = "constant"  # of outer_lr: "constant" or "cosine" (to zero at the last step)
    backend: str = "auto"
    batch_norm: str = "transductive"
    memory: str = "auto"
    seed: int = 0
    root: str | None = None
    log_every: int = 10
    validate_every: int = 500
    validation_tasks: int = 200
    time_limit: float | None = None  # seconds of training, those before a resume included
    eval_tasks: int = 600
    eval_inner_steps: int = 10
    eval_shots: tuple[int, ...] = ()  # empty: as in training
    eval_query_shots: int | None = None  # None: as in training

    @property
    def metric(self) -> str:
        """The metric's name: "accuracy" or "mse"."""
        return "accuracy" if self.loss == "cross_entropy" else "mse"

    def to_json(self) -> dict[str, Any]:
        """The content of `config.json`, less what describes the machine."""
        return asdict(self) | {"metric": self.metric}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunConfig:
        """From the content of `config.json`; keys that are no setting (versions, machine) are left out."""
        known = {item.name for item in fields(cls)}
        settings = {key: value for key, value in values.items() if key in known}
        missing = sorted({"dataset", "loss", "model"} - settings.keys())
        if missing:
            raise ValueError(f"config.json has no {', '.join(missing)}")
        settings["eval_shots"] = tuple(settings.get("eval_shots", ()))
        return checked(cls(**settings))


# Finn et al. 2017, sections 5.1 and 5.2 with their released code. There the cross-entropy is summed over the ways, so
# its rate of 0.4 is 2.0 for a mean; learn2learn reaches the paper's numbers with 0.5 on the mean, the steadier choice.
PRESETS = {
    "sinusoid": RunConfig(
        dataset="sinusoid",
        loss="mse",
        model={"name": "mlp", "sizes": [1, 40, 40, 1], "init": "truncated_normal"},
        ways=None,
        shots=10,
        query_shots=10,
        meta_batch=25,
        steps=70_000,
        inner_lr=0.01,
        inner_steps=1,
        log_every=100,
        validate_every=2_000,
        validation_tasks=500,
        eval_shots=(5, 10, 20),
        eval_query_shots=100,
    ),
    "glyphs": RunConfig(
        dataset="glyphs",
        loss="cross_entropy",
        model={"name": "conv4", "filters": 32},
        query_shots=5,
        meta_batch=4,
        steps=5_000,
        inner_lr=0.2,
        outer_lr=3e-3,
        schedule="cosine",
        validate_every=500,
        validation_tasks=100,
    ),
    "omniglot": RunConfig(
        dataset="omniglot",
        loss="cross_entropy",
        model={"name": "conv4", "filters": 64},
        query_shots=1,
        meta_batch=32,
        steps=60_000,
        inner_lr=0.5,
        validate_every=500,
    ),
}


def preset(dataset: str, **changes: Any) -> RunConfig:
    """The settings published for `dataset` with `changes`; None keeps the preset's value, `filters` goes to the model.

    Raises ValueError for a data set without a preset and for values out of range.
    """
    if dataset not in PRESETS:
        raise ValueError(f"unknown data set {dataset!r}; there are {', '.join(PRESETS)}")
    base = PRESETS[dataset]
    given = {key: value for key, value in changes.items() if value is not None}
    filters = given.pop("filters", None)
    if filters is not None:
        if "filters" not in base.model:
            raise ValueError(f"--filters {filters}: the network of {dataset} ({base.model['name']}) has no filters")
        given["model"] = base.model | {"filters": filters}
    if base.ways is None and "ways" in given:
        raise ValueError(f"--ways {given['ways']}: {dataset} is a regression, its tasks have no classes")
    if base.ways is None and "shots" in given and given["shots"] not in base.eval_shots:
        given.setdefault("eval_shots", tuple(sorted({*base.eval_shots, given["shots"]})))
    return checked(replace(base, **given))


def checked(config: RunConfig) -> RunConfig:
    """`config` itself, or ValueError that names the first value out of range."""
    least = {
        "shots": 1,
        "query_shots": 1,
        "meta_batch": 1,
        "steps": 1,
        "inner_steps": 0,
        "log_every": 1,
        "validate_every": 1,
    }
    least |= {"validation_tasks": 2, "eval_tasks": 2, "eval_inner_steps": 0, "seed": 0}
    for name, smallest in least.items():
        if getattr(config, name) < smallest:
            raise ValueError(f"{name} is {getattr(config, name)}, it must be at least {smallest}")
    if config.ways is not None and config.ways < 2:
        raise ValueError(f"ways is {config.ways}, it must be at least 2")
    if not config.outer_lr > 0:
        raise ValueError(f"outer_lr is {config.outer_lr}, it must be above 0")
    for name, choices in (("algorithm", ALGORITHMS), ("schedule", ("constant", "cosine"))):
        if getattr(config, name) not in choices:
            raise ValueError(f"{name} {getattr(config, name)!r} is not one of {', '.join(choices)}")
    if config.time_limit is not None and not config.time_limit > 0:
        raise ValueError(f"time_limit is {config.time_limit} seconds, it must be above 0")
    return config
