"""Reptile: move the start towards the adapted parameters (Nichol, Achiam, Schulman 2018, algorithms 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fastmaml.algorithms.learner import (
    MODEL,
    Adapted,
    Batch,
    Gradients,
    Learner,
    LearnerOutput,
    weighted,
    weights_of_tasks,
)
from fastmaml.inner import Adam, InnerLr, Optimizer, optimizer_of
from fastmaml.problem.checks import any_target, whole_number
from fastmaml.problem.losses import Loss
from fastmaml.problem.results import Adaptation


class Reptile(Learner):
    """theta <- theta + eps mean_i(phi_i - theta), with phi_i the parameters after inner_steps on task i's support set.

    backward() writes theta - mean_i phi_i into .grad. The paper's update is then SGD with lr = eps (`outer_optimizer`).
    In the paper eps goes from 1 to 0 over training. The query loss is only reported; it has no effect on training.

        reptile = Reptile(model)                      # the released settings of Omniglot 5-way
        optimizer = reptile.outer_optimizer(1.0)

    inner: an optimizer of fm.inner. Default: Adam(1e-3, betas=(0, 0.999)).
    inner_lr: plain gradient descent with this rate, instead of inner.
    minibatch: examples in each inner step, drawn from the support set without replacement. None: all examples.
        Each pass over the support set has its own order, and a batch may straddle two passes. The draws come from
        torch's generator.
    serial: how tasks share the inner optimizer's moments in training. True runs one task after the other, as the
        released code does. Each task starts from theta, with the moments that the task before left. False: all tasks of
        a batch start from the same moments, and the mean of their moments is carried on.
    eval_steps, eval_minibatch: inner steps and mini-batch size of adapt() in eval mode.
    transductive: True runs the query examples as one batch for batch norm. False runs each query example together with
        the whole support set, one at a time.
    loss, backend, memory, batch_norm, label_smoothing, adapted, precision: as in Learner.

    The moments and the step counter are the buffers "moments" and "moment_steps". In eval mode adapt() starts from
    them and does not change them.
    Raises TypeError for learned inner rates, and ValueError for values out of range.
    """

    moments: Tensor
    moment_steps: Tensor

    def __init__(
        self,
        model: nn.Module,
        inner: Optimizer | None = None,
        inner_steps: int = 5,
        minibatch: int | None = 10,
        loss: Loss = "cross_entropy",
        *,
        inner_lr: InnerLr | None = None,
        serial: bool = False,
        eval_steps: int = 50,
        eval_minibatch: int | None = 5,
        transductive: bool = True,
        backend: str = "auto",
        memory: str = "auto",
        batch_norm: str = "transductive",
        label_smoothing: float = 0.0,
        adapted: str | Sequence[str] | None = None,
        precision: str = "float32",
    ):
        if inner is None and inner_lr is None:
            inner = Adam(1e-3, betas=(0.0, 0.999))
        inner = optimizer_of(inner_lr, inner)
        how: dict[str, Any] = {"inner": inner, "adapted": adapted, "precision": precision}
        super().__init__(model, None, inner_steps, loss, False, backend, memory, batch_norm, label_smoothing, **how)
        if self.learnable_rates():
            raise TypeError(f"{type(self).__name__} has no gradient for a learned inner rate; give a number")
        whole_number("inner_steps", inner_steps, 1)
        self.minibatch = None if minibatch is None else whole_number("minibatch", minibatch, 1)
        self.eval_steps = whole_number("eval_steps", eval_steps, 0)
        self.eval_minibatch = None if eval_minibatch is None else whole_number("eval_minibatch", eval_minibatch, 1)
        self.serial = bool(serial)
        self.transductive = bool(transductive)
        if not transductive and batch_norm != "transductive":
            raise ValueError(f"transductive=False goes with batch_norm='transductive', not {batch_norm!r}")
        if inner.vectors:
            self.register_buffer("moments", self.engine.flatten().new_zeros(inner.vectors * self.engine.layout.size))
            self.register_buffer("moment_steps", torch.zeros((), dtype=torch.int64))

    def outer_optimizer(self, lr: float) -> torch.optim.Optimizer:
        """Gradient descent: lr is the paper's eps."""
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=lr, foreach=False)

    def meta_step(self, batch: Batch, task_weights: Tensor | None) -> tuple[LearnerOutput, Gradients]:
        support_x, support_y, query_x, query_y = batch
        _same_examples(support_x, support_y)
        tasks = len(support_y)
        directions, loops = [], []
        for group in [slice(t, t + 1) for t in range(tasks)] if self.serial else [slice(0, tasks)]:
            direction, loop = self.direction(tree_map(lambda x: x[group], support_x), support_y[group])  # noqa: B023
            if loop.state is not None and self.training:
                self.moments.copy_(loop.state.mean(0))
                self.moment_steps += self.inner_steps
            directions.append(direction)
            loops.append(loop)
        output = self.engine.forward(torch.cat([loop.params for loop in loops]), query_x, support_x=support_x)
        task_losses = self.engine.loss(output, query_y)
        support_losses = torch.cat([loop.losses for loop in loops])
        grad = torch.tensordot(weights_of_tasks(task_weights, task_losses), torch.cat(directions), 1)
        loss = weighted(task_losses, task_weights)
        return LearnerOutput(loss, task_losses, output, support_losses), {MODEL: grad}

    def direction(self, x: Any, y: Tensor) -> tuple[Tensor, Adaptation]:
        """(each task's gradient for the outer optimizer [T, P], the inner loop that gave this gradient)."""
        theta = self.start(x, y)
        given = mini_batches(x, y, self.inner_steps, self.minibatch)
        loop = self.descend(theta, *given, self.inner_steps, self.minibatch, *self.carried(len(y)))
        return theta - loop.params, loop

    def carried(self, tasks: int) -> tuple[Tensor | None, int]:
        """(the inner optimizer's moments for each task, the number of steps taken so far)."""
        return (self.moments.expand(tasks, -1), int(self.moment_steps)) if self._optimizer.vectors else (None, 0)

    def descend(
        self, params: Tensor, x: Any, y: Tensor, steps: int, minibatch: int | None, moments: Tensor | None, taken: int
    ) -> Adaptation:
        """Runs inner steps on the examples that `mini_batches` has drawn."""
        if steps == 0:
            return Adaptation(params.expand(len(y), -1), params.new_zeros(len(y), 0), moments)
        options = replace(self.options(), inner_steps=steps, minibatch=minibatch)
        return self.engine.adapt_with(params, x, y, self.inner_lr, options=options, state=moments, steps_taken=taken)

    def adapt(self, support_x: Tensor, support_y: Tensor, inner_steps: int | None = None) -> Adapted:
        steps, size = (self.inner_steps, self.minibatch) if self.training else (self.eval_steps, self.eval_minibatch)
        _same_examples(support_x, support_y)
        steps = steps if inner_steps is None else whole_number("inner_steps", inner_steps, 0)
        given = mini_batches(support_x, support_y, steps, size)
        loop = self.descend(self.start(support_x, support_y), *given, steps, size, *self.carried(len(support_y)))
        kind = Adapted if self.transductive else OneAtATime
        return kind(self.engine, loop.params, loop.losses, support_x)


class OneAtATime(Adapted):
    """Predicts each query example together with the whole support set, which dominates the batch norm statistics."""

    def predict(self, query_x: Tensor) -> Tensor:
        outputs = []
        for one in query_x.split(1, dim=1):
            together = torch.cat([self._support_x, one], dim=1)
            outputs.append(self.engine.forward(self.params, together)[:, -1:])
        return torch.cat(outputs, dim=1)

    def module(self, task: int) -> nn.Module:
        raise ValueError("use predict(query_x): transductive=False needs the support set, which a module does not hold")


def mini_batches(x: Any, y: Tensor, steps: int, size: int | None) -> tuple[Any, Tensor]:
    """(x, y) [T, steps * size, ...]: each task's examples pass after pass, each pass in its own order.

    size=None: x and y unchanged.
    """
    if size is None:
        return x, y
    tasks, examples = y.shape[:2]
    passes = -(-steps * size // max(examples, 1))
    order = torch.rand(tasks, passes, examples).argsort(dim=2).flatten(1)[:, : steps * size].to(y.device)
    task = torch.arange(tasks, device=y.device)[:, None]
    return tree_map(lambda part: part[task, order], (x, y))


def _same_examples(x: Any, y: Any) -> None:
    for part in tree_leaves(x):
        any_target("support_y", y, "support_x", part)
