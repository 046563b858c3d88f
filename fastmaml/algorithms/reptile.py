"""Reptile: move the start towards the adapted parameters (Nichol, Achiam, Schulman 2018, algorithms 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fastmaml.algorithms.learner import MODEL, Adapted, Batch, Gradients, Learner, LearnerOutput, weighted
from fastmaml.inner import Adam, InnerLr, Optimizer, optimizer_of
from fastmaml.problem.checks import any_target, whole_number
from fastmaml.problem.losses import Loss
from fastmaml.problem.results import Adaptation


class Reptile(Learner):
    """theta <- theta + eps mean_i(phi_i - theta), with phi_i the parameters after inner_steps on task i's support set.

    backward() leaves theta - mean_i phi_i in .grad, so that SGD with lr = eps (`outer_optimizer`) is the update of the
    paper. eps goes from 1 to 0 over training. The query set takes no part; the loss on it is only reported.

        reptile = Reptile(model)                      # the released settings of Omniglot 5-way
        optimizer = reptile.outer_optimizer(1.0)

    inner: an optimizer of fm.inner, by default Adam(1e-3, betas=(0, 0.999)); or inner_lr for plain gradient descent.
    minibatch: examples in each inner step, drawn from the support set without replacement; each pass over it is
    shuffled, and a batch may straddle two passes. None: all of them at every step. Draws come from torch's generator.

    The moments and the step counter of the inner optimizer go on from task to task in training, as in the released
    code. serial=True does exactly that: one task after the other, each from theta, each with the moments that the task
    before it left. Otherwise all tasks of a batch start from the carried moments, and the mean of theirs is carried on.
    They are the buffers "moments" and "moment_steps".

    In eval mode adapt() takes eval_steps steps on mini-batches of eval_minibatch, from the carried moments, which it
    leaves as they are. transductive: the query examples are one batch for batch norm; otherwise each is forwarded
    beside the whole support set, one at a time. loss, backend, memory, batch_norm, label_smoothing, adapted: as
    Learner's.
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
            raise TypeError(f"{type(self).__name__} has no gradient for a learned inner rate; give it a number")
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
        of_task = task_losses.new_full((tasks,), 1.0 / tasks) if task_weights is None else task_weights.detach()
        grad = torch.tensordot(of_task, torch.cat(directions), 1)
        loss = weighted(task_losses, task_weights)
        return LearnerOutput(loss, task_losses, output, support_losses), {MODEL: grad}

    def direction(self, x: Any, y: Tensor) -> tuple[Tensor, Adaptation]:
        """(what stands for the gradient of each task [T, P], the inner loop it came from)."""
        theta = self.start(x, y)
        given = mini_batches(x, y, self.inner_steps, self.minibatch)
        loop = self.descend(theta, *given, self.inner_steps, self.minibatch, *self.carried(len(y)))
        return theta - loop.params, loop

    def carried(self, tasks: int) -> tuple[Tensor | None, int]:
        """(the inner optimizer's moments for each task, the steps they come from)."""
        return (self.moments.expand(tasks, -1), int(self.moment_steps)) if self._optimizer.vectors else (None, 0)

    def descend(
        self, params: Tensor, x: Any, y: Tensor, steps: int, minibatch: int | None, moments: Tensor | None, taken: int
    ) -> Adaptation:
        """Inner steps on rows that `mini_batches` has drawn."""
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
    """Predicts each query example beside the whole support set, which gives batch norm most of its statistics."""

    def predict(self, query_x: Tensor) -> Tensor:
        outputs = []
        for one in query_x.split(1, dim=1):
            together = torch.cat([self._support_x, one], dim=1)
            outputs.append(self.engine.forward(self.params, together)[:, -1:])
        return torch.cat(outputs, dim=1)

    def module(self, task: int) -> nn.Module:
        raise ValueError("a module does not see the support set that transductive=False needs; use predict(query_x)")


def mini_batches(x: Any, y: Tensor, steps: int, size: int | None) -> tuple[Any, Tensor]:
    """(x, y) [T, steps * size, ...]: each task's examples pass after pass, every pass in an order of its own.

    As they are where size is None.
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
