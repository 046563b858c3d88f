"""The user's own model as a benchmark problem: checks the result of FILE.py:FUNCTION and cuts it into tasks."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fastmaml.algorithms.learner import Learner
from fastmaml.benchmark.hvp import with_directions
from fastmaml.benchmark.problem import Case, HvpProblem, Problem, without_running_statistics
from fastmaml.checking.oracle import switch_dropout_off
from fastmaml.tasks import TaskBatch
from fastmaml.user_function import first_line, load_function

IN_SHORT = """\
FUNCTION takes no arguments and returns a dict:

  def problem():
      return {
          "model": model,                    # any nn.Module with one tensor in and one out
          "batch": (support_x, support_y, query_x, query_y),      # each [tasks, examples, ...]
          "examples": (x, y),                # or this instead of "batch": [examples, ...], sampled for every task
          "loss": "mse",                     # or "cross_entropy" (the default), or a function (output, target) -> [examples]
          "inner_lr": 0.01,                  # (the default)
          "inner_steps": 1,                  # (the default)
      }

A tuple works too: (model, batch or examples, loss, inner_lr, inner_steps), the last three optional. A file for
`fastmaml check` works unchanged. The model is measured in float32, with dropout off and batch statistics in batch norms.
"""
_TUPLE = ("model", "batch", "loss", "inner_lr", "inner_steps", "meta_loss")
_KEYS = {*_TUPLE, "examples"}


def problem_of(target: str, seed: int = 0, tasks: int | None = None, inner_steps: int | None = None) -> Problem:
    """The problem of a target. tasks, inner_steps: replace the target's own numbers.

    Raises ValueError, in one sentence, for a target that cannot be measured.
    """
    given, where = _given(target, seed)
    batch = _batch(given, where, seed, tasks)
    steps = given.get("inner_steps", 1) if inner_steps is None else inner_steps
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{where}() returned inner_steps {steps!r}; the benchmark takes a whole number from 1 on")
    rate = given.get("inner_lr", 0.01)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not math.isfinite(rate):
        raise ValueError(f"{where}() returned inner_lr {rate!r}; the benchmark takes one number")
    loss = given.get("loss", "cross_entropy")
    support, query = batch.support_x.shape[1], batch.query_x.shape[1]
    model = given["model"]
    case = Case(where, _in_words(model), lambda: copy.deepcopy(model), loss, tuple(batch.support_x.shape[2:]), None,
                len(batch.support_x), support, query, float(rate), steps)  # fmt: skip
    _fits(model, batch.support_x[0], where)
    return Problem(case, model, batch)


def hvp_problem_of(target: str, seed: int = 0, tasks: int | None = None) -> HvpProblem:
    """The Hessian products of the support loss. Every task gets weights near the model's own."""
    given, where = _given(target, seed)
    batch = _batch(given, where, seed, tasks)
    model = given["model"]
    _fits(model, batch.support_x[0], where)
    random = torch.Generator().manual_seed(seed)
    return with_directions(where, model, given.get("loss", "cross_entropy"), batch.support_x, batch.support_y, random)


def _given(target: str, seed: int) -> tuple[dict[str, Any], str]:
    """(the function's result by key, with its model ready to measure; the function's name)."""
    function, where = load_function(target)
    torch.manual_seed(seed)
    try:
        returned = function()
    except Exception as error:
        raise ValueError(f"{where}() raised {type(error).__name__}: {first_line(error)}") from error
    if isinstance(returned, tuple) and 2 <= len(returned) <= len(_TUPLE):
        returned = dict(zip(_TUPLE, returned))
    if not isinstance(returned, Mapping):
        raise ValueError(
            f"{where}() returned {type(returned).__name__}; it must return a dict or a tuple (model, batch, ...)"
        )
    unknown = [key for key in returned if key not in _KEYS]
    if unknown:
        raise ValueError(f"{where}() returned the key '{unknown[0]}', which is none of {', '.join(sorted(_KEYS))}")
    model = returned.get("model")
    if not isinstance(model, nn.Module) or isinstance(model, Learner):
        raise ValueError(f"{where}() returned a {type(model).__name__} as model; it must be a plain nn.Module")
    frozen = next((name for name, p in model.named_parameters() if not p.requires_grad), None)
    if frozen is not None:
        raise ValueError(f"parameter '{frozen}' of {where}() is frozen; the benchmark takes models without frozen ones")
    if not list(model.parameters()):
        raise ValueError(f"the model of {where}() has no parameters")
    model = copy.deepcopy(model).float().cpu().train()
    _remove_dropout(model)
    without_running_statistics(model)
    return {**returned, "model": model}, where


def _remove_dropout(model: nn.Module) -> None:
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, _DropoutNd):
                setattr(parent, name, nn.Identity())
    switch_dropout_off(model)  # of attention and recurrent layers


def _batch(given: Mapping[str, Any], where: str, seed: int, tasks: int | None) -> TaskBatch:
    """The given tasks, repeated if more are wanted, or tasks sampled from the examples."""
    sets = given.get("batch", given.get("examples"))
    if not isinstance(sets, Sequence) or len(sets) not in (2, 4) or not all(isinstance(part, Tensor) for part in sets):
        raise ValueError(
            f"{where}() must return batch (support_x, support_y, query_x, query_y) or examples (x, y), all of them tensors"
        )
    parts = [part.detach().cpu().float() if part.is_floating_point() else part.detach().cpu() for part in sets]
    if len(parts) == 4:
        have = len(parts[0])
        if not have or any(len(part) != have for part in parts):
            raise ValueError(
                f"{where}() returned sets of {[len(part) for part in parts]} tasks; all sets need the same number"
            )
        chosen = torch.arange(tasks or have).remainder(have)
        return TaskBatch(*(part[chosen] for part in parts))
    x, y = parts
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"{where}() returned {len(x)} examples and {len(y)} targets; give equal numbers, at least two")
    random = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(len(x), generator=random) for _ in range(tasks or 8)])
    support, query = order[:, : len(x) // 2], order[:, len(x) // 2 :]
    return TaskBatch(x[support], y[support], x[query], y[query])


def _fits(model: nn.Module, x: Tensor, where: str) -> None:
    try:
        with torch.no_grad():
            output = copy.deepcopy(model)(x)
    except Exception as error:
        raise ValueError(f"the model of {where}() cannot run examples {list(x.shape)}: {first_line(error)}") from error
    if not isinstance(output, Tensor) or output.dim() < 2 or len(output) != len(x):
        raise ValueError(f"the model of {where}() must return one tensor with a row for each of the {len(x)} examples")


def _in_words(model: nn.Module) -> str:
    return f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters"
