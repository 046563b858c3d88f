"""Evaluation of a finished run on held-out tasks, after 0 to 10 inner steps, beside two baselines.

results = evaluate_run("runs/glyphs")          # writes evaluation.json and examples.npz there
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmaml import checkpoint
from fastmaml.baselines import WITHOUT_NETWORK
from fastmaml.experiment import load_learner, make_learner, make_tasks, read_config
from fastmaml.metrics import METRICS, Metric, summarise
from fastmaml.presets import RunConfig, checked
from fastmaml.progress import progress
from fastmaml.tasks import Sinusoid, TaskBatch
from fastmaml.trainer import CHUNK, chunks

EXAMPLE_TASKS = 6
GRID_POINTS = 201


def evaluate_run(
    run_dir: str | Path,
    tasks: int | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Evaluate the best checkpoint of a run on the test split and write `evaluation.json` and `examples.npz`.

    Args:
        run_dir: folder of the run.
        tasks: how many held-out tasks (default: those of the run's config, 600).
        seed: of the test tasks (default: the run's seed).
        out: folder to write to (default: the run's folder).
        quiet: no progress bar.

    Returns:
        What `evaluation.json` holds: for each number of shots the learner, the same network from its random
        initialisation and a predictor without a network, with mean, 95 % interval (1.96 std / sqrt(tasks)) and median
        over tasks after each number of inner steps.
    """
    started = time.perf_counter()
    config = read_config(run_dir)
    config = checked(replace(config, eval_tasks=config.eval_tasks if tasks is None else tasks))
    seed = config.seed if seed is None else seed
    trained, origin = load_learner(run_dir, config)
    untrained = make_learner(config).eval()
    shots_list = config.eval_shots or (config.shots,)
    tables = []
    with progress(len(shots_list) * config.eval_tasks, "evaluation", "task", quiet=quiet) as bar:
        for shots in shots_list:
            source = make_tasks(config, "test", shots, config.eval_query_shots, seed)
            batches = (source.sample(count, step=i) for i, count in enumerate(chunks(config.eval_tasks, CHUNK)))
            tables.append({"shots": shots, "rows": _rows(config, [trained, untrained], batches, bar.update)})
    results = {
        "dataset": config.dataset,
        "split": "test",
        "tasks": config.eval_tasks,
        "metric": config.metric,
        "ways": config.ways,
        "query_shots": config.eval_query_shots or config.query_shots,
        "inner_steps": list(range(config.eval_inner_steps + 1)),
        "inner_lr": config.inner_lr,
        "batch_norm": config.batch_norm,
        "seed": seed,
        **origin,
        "wall_s": time.perf_counter() - started,
        "tables": tables,
    }
    folder = Path(out or run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "examples.npz", _archive(examples(config, trained, seed)))
    _write(folder / "evaluation.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    return results


def adapted_outputs(learner: Any, batch: TaskBatch, inner_steps: int) -> Iterator[Tensor]:
    """Query outputs [T, N, ...] after 0, 1, .. `inner_steps` inner steps, each one step on from the last."""
    engine = learner.engine
    with torch.no_grad():
        params = engine.flatten()
        for step in range(inner_steps + 1):
            if step:
                params = engine.adapt(
                    params, batch.support_x, batch.support_y, inner_lr=learner.inner_lr, inner_steps=1
                )
            yield engine.forward(params, batch.query_x, batch.support_x)


def adapted_metric(learner: Any, batch: TaskBatch, metric: Metric, inner_steps: int) -> Tensor:
    """The metric of every task after each number of inner steps: [inner_steps + 1, T]."""
    return torch.stack([metric(output, batch.query_y) for output in adapted_outputs(learner, batch, inner_steps)])


def examples(config: RunConfig, learner: Any, seed: int) -> dict[str, np.ndarray]:
    """A few test tasks with what the learner makes of them, to look at (the arrays of `examples.npz`)."""
    source = make_tasks(config, "test", query_shots=config.eval_query_shots, seed=seed)
    if isinstance(source, Sinusoid):
        return _curves(config, learner, source)
    batch = source.sample(EXAMPLE_TASKS, step=0)
    *_, after = outputs = list(adapted_outputs(learner, batch, config.inner_steps))
    return {
        **{name: value.numpy() for name, value in batch._asdict().items()},
        "predictions_before": outputs[0].argmax(-1).numpy(),
        "predictions_after": after.argmax(-1).numpy(),
        "probabilities_after": after.softmax(-1).numpy(),
    }


def _curves(config: RunConfig, learner: Any, source: Sinusoid) -> dict[str, np.ndarray]:
    batch, waves = source.sample_with_parameters(EXAMPLE_TASKS, step=0)
    grid = torch.linspace(-5, 5, GRID_POINTS)
    grid_x = grid[None, :, None].expand(EXAMPLE_TASKS, -1, -1).contiguous()
    true_y = waves.at(grid_x)
    on_grid = TaskBatch(batch.support_x, batch.support_y, grid_x, true_y)
    curves = torch.stack(list(adapted_outputs(learner, on_grid, config.eval_inner_steps)), dim=1)
    return {
        "support_x": batch.support_x.numpy(),
        "support_y": batch.support_y.numpy(),
        "grid_x": grid.numpy(),
        "true_y": true_y.squeeze(-1).numpy(),
        "curves": curves.squeeze(-1).numpy(),
    }


def _rows(
    config: RunConfig, learners: list[Any], batches: Iterator[TaskBatch], done: Callable[[int], Any]
) -> list[dict[str, Any]]:
    """The rows of one table: the `learners` (trained, untrained) and the predictor without a network."""
    metric, steps = METRICS[config.metric], config.eval_inner_steps
    plain_name, predictor = WITHOUT_NETWORK[config.loss]
    found: list[list[Tensor]] = [[], [], []]
    for batch in batches:
        for column, learner in zip(found, learners):
            column.append(adapted_metric(learner, batch, metric, steps))
        found[2].append(metric(predictor(*batch[:3]), batch.query_y)[None])
        done(len(batch.query_y))
    trained, untrained, plain = (torch.cat(column, dim=1) for column in found)
    return [
        _row(f"{config.algorithm.upper()}, meta-trained", "learner", trained),
        _row("same network, random initialisation", "baseline", untrained),
        _row(plain_name, "baseline", plain),
    ]


def _row(name: str, kind: str, values: Tensor) -> dict[str, Any]:
    """A row of a table from `values` [steps, tasks]; null where some tasks diverged."""
    columns = [summarise(column) for column in values]
    return {
        "name": name,
        "kind": kind,
        "mean": [column.mean for column in columns],
        "ci95": [column.ci95 for column in columns],
        "median": [column.median for column in columns],
    }


def _archive(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    try:
        checkpoint.write_durably(path, data)
    except OSError as error:
        raise OSError(f"cannot write {path}: {checkpoint.why(error)}") from error
