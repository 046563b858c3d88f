"""From a `RunConfig` to its tasks, network and learner; where the files of a run folder lie; what machine this is."""

from __future__ import annotations

import json
import os
import platform
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastmaml import checkpoint, models, tasks
from fastmaml.algorithms import FOMAML, MAML
from fastmaml.presets import RunConfig
from fastmaml.tasks.source import TaskSource
from fastmaml.trainer import model_tensors

_SOURCES = {"sinusoid": tasks.Sinusoid, "glyphs": tasks.Glyphs, "omniglot": tasks.Omniglot}
_LEARNERS: dict[str, Any] = {"maml": MAML, "fomaml": FOMAML}


def make_tasks(
    config: RunConfig, split: str, shots: int | None = None, query_shots: int | None = None, seed: int | None = None
) -> TaskSource:
    """The tasks of a run's data set: `split` "train", "val" or "test"; other shots, query shots or seed where given."""
    settings: dict[str, Any] = {
        "shots": shots or config.shots,
        "query_shots": query_shots or config.query_shots,
        "split": split,
        "seed": config.seed if seed is None else seed,
    }
    if config.ways is not None:
        settings |= {"ways": config.ways, "root": config.root}
    return _SOURCES[config.dataset](**settings)


def make_model(config: RunConfig) -> nn.Module:
    """The network of a run with its random initialisation, which the run's seed decides."""
    settings = {key: value for key, value in config.model.items() if key != "name"}
    name = config.model["name"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if name == "mlp":
            return models.mlp(**settings)
        if name == "conv4" and config.ways is not None:
            return models.conv4(ways=config.ways, **settings)
    raise ValueError(f"there is no model {name!r} for {config.dataset}; there are mlp, and conv4 for classification")


def make_learner(config: RunConfig) -> Any:
    """The learner of a run around a freshly initialised network."""
    return _LEARNERS[config.algorithm](
        make_model(config),
        inner_lr=config.inner_lr,
        inner_steps=config.inner_steps,
        loss=config.loss,
        backend=config.backend,
        memory=config.memory,
        batch_norm=config.batch_norm,
    )


def load_learner(run_dir: str | Path, config: RunConfig) -> tuple[Any, dict[str, Any]]:
    """The meta-trained learner of a run, in eval mode, and where it comes from: the best checkpoint, else the last."""
    folder = Path(run_dir) / "checkpoints"
    name = "best" if checkpoint.exists(folder, "best") else "last"
    tensors, state = checkpoint.load(folder, name)
    learner = make_learner(config)
    learner.load_state_dict(model_tensors(tensors))
    return learner.eval(), {"checkpoint": name, "step": state["step"]}


def seed_generators(seed: int) -> None:
    """Seed the generators of torch, numpy and Python, for dropout and a user's code; tasks have their own streams."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def write_config(run_dir: str | Path, config: RunConfig, engine: Any) -> None:
    """Write `config.json`: the settings, and what versions, machine and engine they meet."""
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
    """The settings of a run folder. Raises ValueError where there is none."""
    path = Path(run_dir) / "config.json"
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{run_dir} is no run folder of fastmaml: it has no config.json") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return RunConfig.from_json(values)


def machine() -> str:
    """Processor, cores this process may use, and operating system, in one line."""
    return f"{_processor()}, {usable_cores()} cores, {platform.system()} {platform.release()}"


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
