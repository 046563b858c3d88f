"""Checks the options and tensors of an inner loop, and converts them to the form that the sweeps take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmaml.engine.options import CallTensors, MetaGradientOptions
from fastmaml.inner import Optimizer
from fastmaml.problem import checks
from fastmaml.problem.examples import Rows
from fastmaml.problem.inner_loop import InnerLoop
from fastmaml.problem.parameters import ParameterLayout

StepRows = Mapping[str, Tensor]


def inner_loop(
    layout: ParameterLayout, options: MetaGradientOptions, given: CallTensors, optimizer: Optimizer, sweep: bool
) -> InnerLoop:
    """The InnerLoop that a backend runs. sweep: whether the adjoint sweep follows the loop."""
    names, step_rows = layout.names, given.step_rows or {}
    unknown = [name for name in step_rows if name not in names]
    if unknown:
        raise ValueError(f"step_rows names '{unknown[0]}', which is not a parameter of the model")
    loop = InnerLoop(
        optimizer,
        options.inner_steps,
        minibatch=options.minibatch,
        rows=tuple(names.index(name) for name in step_rows),
        proximal=given.proximal is not None,
    )
    if sweep:
        loop = loop._replace(
            order=options.order,
            queries=query_steps(given.loss_weights, options.inner_steps),
            per_task=options.per_task,
            rate_grad=options.inner_lr_grad,
        )
    if loop.proximal and (optimizer.clip_value is not None or optimizer.clip_norm is not None):
        raise ValueError("proximal and gradient clipping do not go together: their order is not defined")
    return loop


def minibatch_of(loop: InnerLoop, x: Any) -> int | None:
    """The number of examples that one inner step sees. None: all of the support set."""
    if loop.minibatch is None:
        return None
    if isinstance(x, Tensor) and x.dim() > 1 and x.shape[1] != loop.steps * loop.minibatch:
        raise ValueError(f"support_x {checks.shape(x)} must hold {loop.steps} inner steps of {loop.minibatch} examples")
    return loop.minibatch


def adapted_mask(
    layout: ParameterLayout,
    mask: Tensor | None,
    adapted: Sequence[str] | None,
    step_rows: StepRows | None,
    like: Tensor,
) -> Tensor | None:
    """A mask [P], 1 on the entries that the inner loop moves: adapted, without step rows, and in `mask`. None: all."""
    if adapted is not None:
        chosen = layout.matching(adapted, like)
        mask = chosen if mask is None else mask * chosen
    if step_rows:
        mask = torch.ones_like(like[..., :].reshape(-1)[: layout.size]) if mask is None else mask.clone()
        mask[layout.positions(tuple(step_rows))] = 0.0
    return mask


def rows(layout: ParameterLayout, step_rows: StepRows | None, like: Tensor) -> Rows | None:
    if not step_rows:
        return None
    shapes = dict(zip(layout.names, layout.shapes))
    steps = {len(row) for row in step_rows.values()}
    for name, row in step_rows.items():
        if tuple(row.shape[1:]) != shapes[name] or len(row) == 0 or len(steps) > 1:
            raise ValueError(
                f"step_rows['{name}'] {checks.shape(row)} must be {['steps', *shapes[name]]}, with the same number "
                "of steps as the others"
            )
    values = torch.cat([row.detach().to(like).flatten(1) for row in step_rows.values()], dim=1)
    return Rows(layout.positions(tuple(step_rows)).to(like.device), values)


def by_name(step_rows: StepRows, values: Tensor) -> dict[str, Tensor]:
    """Splits the gradient [.., K, R] of all rows into {name: gradient of its rows}."""
    pieces = values.split([row[0].numel() for row in step_rows.values()], dim=-1)
    lead = values.shape[:-1]
    return {n: p.reshape(*lead, *row.shape[1:]) for (n, row), p in zip(step_rows.items(), pieces)}


def query_steps(loss_weights: Tensor | None, inner_steps: int) -> tuple[int, ...]:
    """The steps k whose query loss counts: every k with a nonzero weight, and the last k = K."""
    if loss_weights is None:
        return ()
    if not isinstance(loss_weights, Tensor) or tuple(loss_weights.shape) != (inner_steps + 1,):
        form = checks.shape(loss_weights) if isinstance(loss_weights, Tensor) else type(loss_weights).__name__
        raise ValueError(f"loss_weights {form} must hold one weight for each of phi[0] .. phi[{inner_steps}]")
    checks.finite("loss_weights", loss_weights)
    return (*(k for k in range(inner_steps) if float(loss_weights[k]) != 0.0), inner_steps)


def proximal_weight(proximal: float | Tensor | None) -> float:
    if proximal is None:
        return 0.0
    lam = checks.number("proximal", proximal)
    if lam < 0:
        raise ValueError(f"proximal is {lam}; it must not be negative")
    return lam
