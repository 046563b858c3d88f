"""Evaluation of a finished run on held-out tasks, after 0 and more inner steps, against two reference predictors.

results = evaluate_run("runs/glyphs")          # writes evaluation.json and examples.npz there
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmaml.algorithms import Learner
from fastmaml.inner import SGD
from fastmaml.tasks import Sinusoid, TaskBatch
from fastmaml.training import checkpoint
from fastmaml.training.experiment import load_learners, make_learner, make_tasks, read_config, seeded
from fastmaml.training.metrics import METRICS, summarise
from fastmaml.training.progress import progress
from fastmaml.training.run_config import RunConfig, checked
from fastmaml.training.trainer import CHUNK, chunks
from fastmaml.training.trivial_predictors import WITHOUT_NETWORK

SEEN_STEPS = (0, 1, 2, 3, 5, 10, 20, 50, 100)  # the numbers of inner steps in every evaluation
EXAMPLE_TASKS = 6
GRID_POINTS = 201


@torch.no_grad()
def evaluate_run(
    run_dir: str | Path,
    tasks: int | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Evaluate a run on the test split and write `evaluation.json` and `examples.npz`.

    Uses the best checkpoint. With `config.ensemble` above 1, averages the outputs of the best checkpoints.

    Args:
        run_dir: folder of the run.
        tasks: number of held-out tasks (default: from the run's config, 600).
        seed: seed of the test tasks (default: the run's seed).
        out: folder to write to (default: the run's folder).
        quiet: no progress bar.

    Returns:
        The content of `evaluation.json`, for each number of shots and of inner steps. It compares the learner, the same
        network from its random initialisation, and a predictor without a network. Each has the mean over tasks, its
        95 % interval (1.96 std / sqrt(tasks)) and the median.
    """
    started = time.perf_counter()
    config = read_config(run_dir)
    config = checked(replace(config, eval_tasks=config.eval_tasks if tasks is None else tasks))
    seed = config.seed if seed is None else seed
    trained, origin = load_learners(run_dir, config)
    untrained = [make_learner(config).eval()]
    quoted = quoted_steps(trained[0])
    seen = evaluation_steps(config, trained[0])
    shots_list = config.eval_shots or (config.shots,)
    tables = []
    with seeded(seed), progress(len(shots_list) * config.eval_tasks, "evaluation", "task", quiet=quiet) as bar:
        for shots in shots_list:
            source = make_tasks(config, "test", shots, config.eval_query_shots, seed)
            batches = (source.sample(count, step=i) for i, count in enumerate(chunks(config.eval_tasks, CHUNK)))
            tables.append({"shots": shots, "rows": _rows(config, seen, [trained, untrained], batches, bar.update)})
    results = {
        "dataset": config.dataset,
        "algorithm": config.algorithm,
        "split": "test",
        "tasks": config.eval_tasks,
        "metric": config.metric,
        "ways": config.ways,
        "query_shots": config.eval_query_shots or config.query_shots,
        "inner_steps": seen,
        "quoted_steps": quoted,
        "inner_lr": config.settings()["inner_lr"],
        "batch_norm": config.batch_norm,
        "seed": seed,
        **origin,
        "wall_s": time.perf_counter() - started,
        "tables": tables,
    }
    folder = Path(out or run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with seeded(seed):
        arrays = examples(config, trained, seed)
    _write(folder / "examples.npz", _archive(arrays))
    _write(folder / "evaluation.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    return results


def quoted_steps(learner: Learner) -> int:
    """The number of inner steps of a learner's headline result: its number at test, else in training."""
    return int(getattr(learner, "eval_steps", None) or learner.inner_steps)


def evaluation_steps(config: RunConfig, learner: Learner) -> list[int]:
    """The numbers of inner steps in an evaluation. Includes all first steps if adaptation can continue step by step."""
    quoted = quoted_steps(learner)
    last = max(config.eval_inner_steps, quoted)
    seen = {*SEEN_STEPS, *range(11)} if _goes_on(learner) else {*SEEN_STEPS}
    return sorted({quoted, last, *(k for k in seen if k <= last)})


def adapted_outputs(learner: Learner, batch: TaskBatch, steps: Sequence[int]) -> Iterator[Tensor]:
    """Query outputs [T, N, ...], on the CPU, after each number of inner `steps` (ascending)."""
    batch = batch.to(learner.device)
    if not _goes_on(learner):
        for count in steps:
            yield learner.adapt(batch.support_x, batch.support_y, inner_steps=count).predict(batch.query_x).cpu()
        return
    engine, taken = learner.engine, 0
    params = learner.start(batch.support_x, batch.support_y)
    for count in steps:
        if count > taken:
            options = replace(learner.options(), inner_steps=count - taken)
            params = engine.adapt(params, batch.support_x, batch.support_y, learner.inner_lr, options=options)
            taken = count
        yield engine.forward(params, batch.query_x, batch.support_x).cpu()


def _goes_on(learner: Learner) -> bool:
    """Whether k + 1 inner steps equal k steps and one more: plain gradient descent at one rate, as in Learner.adapt."""
    own = (type(learner).adapt, type(learner).call_tensors) == (Learner.adapt, Learner.call_tensors)
    plain = isinstance(learner.inner, SGD) and not learner.inner.momentum and isinstance(learner.inner_lr, (int, float))
    return own and plain


def ensemble_outputs(learners: Sequence[Learner], batch: TaskBatch, steps: Sequence[int]) -> Iterator[Tensor]:
    """Like adapted_outputs, averaged over `learners` (for classes: their logits)."""
    for outputs in zip(*(adapted_outputs(learner, batch, steps) for learner in learners)):
        yield torch.stack(outputs).mean(0) if len(outputs) > 1 else outputs[0]


def examples(config: RunConfig, learners: Sequence[Learner], seed: int) -> dict[str, np.ndarray]:
    """A few test tasks with the learners' outputs, for the report: the arrays of `examples.npz`."""
    source = make_tasks(config, "test", query_shots=config.eval_query_shots, seed=seed)
    if isinstance(source, Sinusoid):
        return _curves(config, learners, source)
    batch = source.sample(EXAMPLE_TASKS, step=0)
    before, after = ensemble_outputs(learners, batch, (0, quoted_steps(learners[0])))
    return {
        **{name: value.numpy() for name, value in batch._asdict().items()},
        "predictions_before": before.argmax(-1).numpy(),
        "predictions_after": after.argmax(-1).numpy(),
        "probabilities_after": after.softmax(-1).numpy(),
    }


def _curves(config: RunConfig, learners: Sequence[Learner], source: Sinusoid) -> dict[str, np.ndarray]:
    batch, waves = source.sample_with_parameters(EXAMPLE_TASKS, step=0)
    grid = torch.linspace(-5, 5, GRID_POINTS)
    grid_x = grid[None, :, None].expand(EXAMPLE_TASKS, -1, -1).contiguous()
    true_y = waves.at(grid_x)
    on_grid = TaskBatch(batch.support_x, batch.support_y, grid_x, true_y)
    every_step = range(evaluation_steps(config, learners[0])[-1] + 1)
    curves = torch.stack(list(ensemble_outputs(learners, on_grid, every_step)), dim=1)
    return {
        "support_x": batch.support_x.numpy(),
        "support_y": batch.support_y.numpy(),
        "grid_x": grid.numpy(),
        "true_y": true_y.squeeze(-1).numpy(),
        "curves": curves.squeeze(-1).numpy(),
    }


def _rows(
    config: RunConfig,
    steps: Sequence[int],
    learners: Sequence[Sequence[Learner]],
    batches: Iterator[TaskBatch],
    done: Callable[[int], Any],
) -> list[dict[str, Any]]:
    """The rows of one table: the `learners` (trained, untrained) and the predictor without a network."""
    metric = METRICS[config.metric]
    plain_name, predictor = WITHOUT_NETWORK[config.loss]
    found: list[list[Tensor]] = [[], [], []]
    for batch in batches:
        for column, group in zip(found, learners):
            outputs = ensemble_outputs(group, batch, steps)
            column.append(torch.stack([metric(output, batch.query_y) for output in outputs]))
        found[2].append(metric(predictor(*batch[:3]), batch.query_y)[None])
        done(len(batch.query_y))
    trained, untrained, plain = (torch.cat(column, dim=1) for column in found)
    return [
        _row(f"{config.title}, meta-trained", "learner", trained),
        _row("same network, random initialisation", "baseline", untrained),
        _row(plain_name, "baseline", plain),
    ]


def _row(name: str, kind: str, values: Tensor) -> dict[str, Any]:
    """A row of a table from `values` [steps, tasks]. Null if some tasks diverged."""
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
