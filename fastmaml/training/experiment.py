"""Makes the tasks, network and learner of a `RunConfig`, and reads and writes a run folder's config.json."""

from __future__ import annotations

import json
import platform
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastmaml import algorithms, inner, models, tasks
from fastmaml.compiled.loading import load_cuda
from fastmaml.machine import machine
from fastmaml.tasks.source import TaskSource
from fastmaml.training import checkpoint
from fastmaml.training.run_config import RunConfig
from fastmaml.training.trainer import member_name, model_tensors

_SOURCES = {"sinusoid": tasks.Sinusoid, "glyphs": tasks.Glyphs, "omniglot": tasks.Omniglot}
_LEARNERS: dict[str, Any] = {
    "maml": algorithms.MAML,
    "fomaml": algorithms.FOMAML,
    "reptile": algorithms.Reptile,
    "foml": algorithms.FOML,
    "maml++": algorithms.MAMLPlusPlus,
    "imaml": algorithms.IMAML,
    "metasgd": algorithms.MetaSGD,
    "anil": algorithms.ANIL,
    "boil": algorithms.BOIL,
    "protomaml": algorithms.ProtoMAML,
    "metacurvature": algorithms.MetaCurvature,
    "cavia": algorithms.CAVIA,
}
_VECTOR_MODELS, _IMAGE_MODELS = ("mlp", "context_mlp"), ("conv4", "context_conv4")
_INNER = {"sgd": inner.SGD, "adam": inner.Adam, "adamw": inner.AdamW}


def make_tasks(
    config: RunConfig, split: str, shots: int | None = None, query_shots: int | None = None, seed: int | None = None
) -> TaskSource:
    """The tasks of a run's data set. split: "train", "val" or "test". shots, query_shots, seed: default the config's."""
    usual = config.train_shots or config.shots if split == "train" else config.shots
    settings: dict[str, Any] = {
        "shots": shots or usual,
        "query_shots": query_shots or config.query_shots,
        "split": split,
        "seed": config.seed if seed is None else seed,
    }
    if config.ways is not None:
        settings |= {"ways": config.ways, "root": config.root}
    return _SOURCES[config.dataset](**settings)


def make_model(config: RunConfig) -> nn.Module:
    """The network of a run, with random weights from the run's seed."""
    with seeded(config.seed):
        return _model(config)


def make_learner(config: RunConfig) -> Any:
    """The learner of a run, with a new network. Raises ValueError for options that the learner does not take."""
    options = dict(config.options)
    described = options.pop("inner", None)
    given: dict[str, Any] = {"inner_lr": config.inner_lr}
    if described is not None:
        given = {"inner": inner_optimizer(described, config.inner_lr)}
    if options.get("solver") == "newton_cg":
        given = {}  # this solver finds its own step lengths
    if config.algorithm == "metasgd":
        given["seed"] = config.seed  # of the initial rates
    engine = {name: getattr(config, name) for name in ("backend", "memory", "batch_norm", "precision")}
    if config.algorithm == "maml++" and config.batch_norm == "per_step":
        engine["batch_norm"], given["bn_stats"] = "transductive", "running_per_step"
    with seeded(config.seed):
        model = _model(config)
        if config.backend == "cuda":
            if missing := load_cuda():
                raise ValueError(f"backend 'cuda' cannot run: {missing}")
            model = model.to("cuda")
        try:
            return _LEARNERS[config.algorithm](
                model, inner_steps=config.inner_steps, loss=config.loss, **given, **engine, **options
            )
        except TypeError as error:
            raise ValueError(f"{config.title} with options {config.options}: {error}") from error


def inner_optimizer(described: Any, rate: float | tuple[float, ...]) -> inner.Optimizer:
    """An inner optimizer from its name, or from a mapping like {"name": "adam", "betas": [0.0, 0.999]}."""
    settings = dict(described) if isinstance(described, dict) else {"name": described}
    name = settings.pop("name", None)
    if name not in _INNER:
        raise ValueError(f"the inner optimizer {name!r} is not one of {', '.join(_INNER)}")
    if "betas" in settings:
        settings["betas"] = tuple(settings["betas"])
    try:
        return _INNER[name](lr=rate, **settings)
    except TypeError as error:
        raise ValueError(f"the inner optimizer {name} with {settings}: {error}") from error


def load_learners(run_dir: str | Path, config: RunConfig) -> tuple[list[Any], dict[str, Any]]:
    """The meta-trained learners of a run, in eval mode, and the checkpoints they come from.

    Usually one learner, from the best checkpoint, or from the last if nothing was validated. With `config.ensemble`
    above 1, one from each of the best checkpoints, the best first.
    """
    folder = Path(run_dir) / "checkpoints"
    names = ["best" if checkpoint.exists(folder, "best") else "last"]
    if config.ensemble > 1 and checkpoint.exists(folder, "last"):
        members = checkpoint.load(folder, "last")[1].get("members", [])
        names = [member_name(member["step"]) for member in members] or names
    learners, steps = [], []
    for name in names:
        tensors, state = checkpoint.load(folder, name)
        learner = make_learner(config)
        learner.load_state_dict(model_tensors(tensors))
        learners.append(learner.eval())
        steps.append(state["step"])
    if len(steps) > 1:
        return learners, {"checkpoint": "ensemble", "step": steps[0], "ensemble": steps}
    return learners, {"checkpoint": "last" if names == ["last"] else "best", "step": steps[0]}


def _model(config: RunConfig) -> nn.Module:
    settings = {key: value for key, value in config.model.items() if key != "name"}
    name = config.model.get("name")
    if name in _IMAGE_MODELS and config.ways is not None:
        settings["ways"] = config.ways
    elif name not in _VECTOR_MODELS:
        raise ValueError(
            f"there is no model {name!r} for {config.dataset}; there are {', '.join(_VECTOR_MODELS)} and, for images, "
            f"{', '.join(_IMAGE_MODELS)}"
        )
    try:
        model: nn.Module = getattr(models, name)(**settings)
    except TypeError as error:
        raise ValueError(f"the model {config.model}: {error}") from error
    return model


def seed_generators(seed: int) -> None:
    """Seed the generators of torch, numpy and Python, for dropout and users' code. Tasks have their own streams."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block torch's generator starts from `seed`. Afterwards its old state is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def write_config(run_dir: str | Path, config: RunConfig, engine: Any) -> None:
    """Write `config.json`: the settings, the versions, the machine and the engine."""
    facts = {
        "engine": {"backend": engine.backend, "fused": engine.fused, "why": engine.why},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "machine": machine(),
        "threads": torch.get_num_threads(),
    }
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    text = json.dumps(config.to_json() | facts, indent=1) + "\n"
    checkpoint.write_durably(Path(run_dir) / "config.json", text.encode())


def read_config(run_dir: str | Path) -> RunConfig:
    """The settings of a run folder. Raises ValueError if config.json is missing or damaged."""
    path = Path(run_dir) / "config.json"
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{run_dir} is not a run folder of fastmaml: it has no config.json") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return RunConfig.from_json(values)
