"""Runs an inner loop or a meta-gradient from checked inputs.

Compiled backends run one operator; autodiff, and custom update rules, run the sweep in Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmaml.autodiff import adjoint_sweep
from fastmaml.autodiff.update_rules import rule_for
from fastmaml.engine import inner_loop_options
from fastmaml.engine.inputs import QUERY, SUPPORT, Inputs, Names
from fastmaml.engine.options import CallTensors, MetaGradientOptions, optimizer_for
from fastmaml.engine.prepared_calls import PreparedCall
from fastmaml.inner import Optimizer
from fastmaml.network.trace import Program
from fastmaml.problem import checks
from fastmaml.problem.examples import Examples, LoopTensors
from fastmaml.problem.inner_loop import InnerLoop
from fastmaml.problem.inner_rates import collapse_rates, expand_rates
from fastmaml.problem.results import Adaptation, MetaGradient

_OF_ADAPT = Names("support_x", "support_y", "weights")


class LoopOnSupport(NamedTuple):
    """An inner loop, its support sets, and its tensors in the form that the backends take."""

    loop: InnerLoop
    program: Program | None  # None: autodiff runs it
    support: Examples
    tensors: LoopTensors

    @property
    def optimizer(self) -> Optimizer:
        return self.loop.optimizer


def loop_on_support(
    inputs: Inputs,
    theta: Tensor,
    support: tuple[Tensor, Any],
    options: MetaGradientOptions,
    given: CallTensors,
    sweep: bool,
) -> LoopOnSupport:
    """Checks the options, the support sets and the rates. sweep: True for a meta-gradient, False for adapting only."""
    layout, x = inputs.choice.layout, support[0]
    optimizer = optimizer_for(options, given.inner_lr)
    loop = inner_loop_options.inner_loop(layout, options, given, optimizer, sweep)
    names, minibatch = SUPPORT if sweep else _OF_ADAPT, inner_loop_options.minibatch_of(loop, x)
    program, examples = inputs.examples(names, *support, given.support_weights, theta, minibatch=minibatch)
    mask = inner_loop_options.adapted_mask(layout, inputs.trainable(theta), options.adapted, given.step_rows, theta)
    rates = expand_rates(optimizer.lr, layout, mask, theta, loop.steps)
    rows = inner_loop_options.rows(layout, given.step_rows, theta)
    lam = inner_loop_options.proximal_weight(given.proximal)
    return LoopOnSupport(loop, program, examples, LoopTensors(rates, rows, lam, mask))


def adapt(
    inputs: Inputs,
    theta: Tensor,
    support: tuple[Tensor, Any],
    options: MetaGradientOptions,
    given: CallTensors,
    state: Tensor | None,
    steps_taken: int,
) -> Adaptation:
    """The inner loop without a meta-gradient. Arguments as in Engine.adapt_with."""
    choice = inputs.choice
    theta = inputs.parameters("theta", theta)
    x = inputs.one_tensor("support_x", support[0], theta)
    on = loop_on_support(inputs, theta, (x, support[1]), options, given, sweep=False)
    if state is not None:
        expected = (x.shape[0], on.optimizer.vectors * choice.layout.size)
        state = checks.weights("state", state, expected, theta)
    if on.program is not None and given.rule is None:
        compiled = choice.compiled(on.program)
        params, losses, after = compiled.adapt(theta, on.support, on.loop, on.tensors, state, steps_taken)
        return Adaptation(params, losses, after if after.numel() else None)
    rates, rows, lam, mask = on.tensors
    rule = given.rule or rule_for(on.optimizer, rates, mask, state, steps_taken)
    examples = on.support.weighted(options.minibatch)
    params, losses = adjoint_sweep.adapt(
        choice.derivatives(on.program), per_task(theta, x), examples, on.loop, rule, rows, lam
    )
    return Adaptation(params.contiguous(), losses, getattr(rule, "state", None))


def meta_gradient(
    inputs: Inputs, theta: Tensor, batch: Sequence[Any], options: MetaGradientOptions, given: CallTensors
) -> tuple[MetaGradient, PreparedCall | None]:
    """(the meta-gradient, a PreparedCall for later calls). The second is None if the call cannot be prepared."""
    choice = inputs.choice
    if not isinstance(batch, (tuple, list)) or len(batch) != 4:
        raise TypeError("batch must be (support_x, support_y, query_x, query_y)")
    support_x, support_y, query_x, query_y = batch
    theta = inputs.parameters("theta", theta)
    support_x = inputs.one_tensor("support_x", support_x, theta)
    query_x = inputs.one_tensor("query_x", query_x, theta, as_before=True)
    if theta.dim() != 1 and not options.per_task:
        raise ValueError(
            f"theta {checks.shape(theta)} must be one start [{choice.layout.size}] for all tasks, or per_task=True"
        )
    settings = choice.settings
    on = loop_on_support(inputs, theta, (support_x, support_y), options, given, sweep=True)
    _, query = inputs.examples(QUERY, query_x, query_y, given.query_weights, theta, support_x)
    tasks = support_x.shape[0]
    task_weights = given.task_weights
    if task_weights is not None:
        task_weights = checks.weights("task_weights", task_weights, (tasks,), theta)
    given = given._replace(task_weights=task_weights)

    prepared = None
    if on.program is not None and given.rule is None:
        compiled = choice.compiled(on.program)
        over = None if options.per_task else task_weights
        found = compiled.meta_gradient(theta, on.support, query, on.loop, on.tensors, given.loss_weights, over)
        # Not prepared if this call fell back to another backend, or converted the labels: the key would be wrong.
        same = settings == choice.settings and (on.support.y.dtype, query.y.dtype) == (support_y.dtype, query_y.dtype)
        if same and on.tensors.mask is None and isinstance(on.optimizer.lr, float):
            prepared = PreparedCall(compiled, on.loop.text(), on.optimizer.lr, on.loop.rate_grad)
    else:
        found = _in_python(inputs, theta, on, query, options, given)
    return _as_asked(inputs, theta, on, options, given, found), prepared


def _in_python(
    inputs: Inputs, theta: Tensor, on: LoopOnSupport, query: Examples, options: MetaGradientOptions, given: CallTensors
) -> MetaGradient:
    """The sweep in Python, on the derivatives of the chosen backend. The result has the form of the operator's."""
    choice = inputs.choice
    rates, rows, lam, mask = on.tensors
    found = adjoint_sweep.meta_gradient(
        choice.derivatives(on.program),
        per_task(theta, on.support.x),
        on.support.weighted(options.minibatch),
        query.weighted(),
        on.loop,
        given.rule or rule_for(on.optimizer, rates, mask),
        len(rates),
        given.loss_weights,
        rows,
        lam,
        on.support.x if choice.batch_norm == "support" else None,
    )
    if not options.per_task:
        rate_grad, rows_grad = (
            None if of is None else over_tasks(of, given.task_weights)
            for of in (found.inner_lr_grad, found.step_rows_grad)
        )
        grad = over_tasks(found.grad, given.task_weights)
        found = found._replace(grad=grad, inner_lr_grad=rate_grad, step_rows_grad=rows_grad)
    return found if on.program is not None else found._replace(query_output=inputs.as_returned(found.query_output))


def _as_asked(
    inputs: Inputs,
    theta: Tensor,
    on: LoopOnSupport,
    options: MetaGradientOptions,
    given: CallTensors,
    found: MetaGradient,
) -> MetaGradient:
    """Converts gradients to the form of the given rates and rows, and zeros them on frozen parameters."""
    layout, rows, rows_grad = inputs.choice.layout, on.tensors.rows, found.step_rows_grad
    grad = masked(found.grad, inputs.trainable(theta))
    if rows is not None and given.step_rows is not None:
        rows_grad[..., 0, :] += grad[..., rows.places]
        grad = grad.index_fill(-1, rows.places, 0.0)
        rows_grad = inner_loop_options.by_name(given.step_rows, rows_grad)
    rate_grad = found.inner_lr_grad
    if on.loop.rate_grad:
        rate_grad = over_tasks(rate_grad, given.task_weights) if options.per_task else rate_grad
        rate_grad = collapse_rates(rate_grad, on.optimizer.lr, layout, on.tensors.mask, theta)
    return found._replace(grad=grad, inner_lr_grad=rate_grad, step_rows_grad=rows_grad)


def over_tasks(of: Tensor, task_weights: Tensor | None) -> Tensor:
    """The weighted sum of [T, ...] over tasks. Without weights: the mean."""
    weights = of.new_full((len(of),), 1.0 / len(of)) if task_weights is None else task_weights
    return torch.tensordot(weights, of, 1)


def per_task(params: Tensor, x: Tensor) -> Tensor:
    """params as [T, P], for examples x [T, ...]."""
    return params.expand(x.shape[0], -1) if params.dim() == 1 else params


def masked(vector: Tensor, mask: Tensor | None) -> Tensor:
    return vector if mask is None else vector * mask
