"""ANIL: the inner loop adapts only the head; the body is meta-learned (Raghu, Raghu, Bengio, Vinyals 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastmaml.algorithms.learner import Adapted, Batch, Gradients, Learner, LearnerOutput
from fastmaml.algorithms.linear_head import LinearHead
from fastmaml.inner import InnerLr
from fastmaml.problem.losses import Loss
from fastmaml.problem.parameters import ParameterLayout


class ANIL(Learner):
    """MAML whose inner steps move only the head, in training and at test. The meta-gradient covers head and body.

        v[k] = v[k+1] - H_k (m * alpha * v[k+1]),   m = 1 on the head, 0 on the body    (ALGORITHMS 1.2)

    H_k also has the body's rows, so the body learns features for a head that adapts.
    An nn.Sequential that ends in a linear head runs faster, with the same results (linear_head.py).
    Its body is then run and differentiated once, for any number of inner steps.

    head: name patterns of the adapted parameters ("head.*"). Default: the last layer with parameters.
    The other arguments are Learner's. Raises ValueError for a pattern that fits no parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: InnerLr | None = None,
        inner_steps: int = 1,
        loss: Loss = "cross_entropy",
        *,
        head: str | Sequence[str] | None = None,
        **options: Any,
    ):
        own = head_of(model, head)
        super().__init__(model, inner_lr, inner_steps, loss, adapted=own, **options)
        splits = LinearHead.splits(self.engine, own)
        self.linear_head = LinearHead(self.engine, options.get("backend", "auto")) if splits else None

    def meta_step(self, batch: Batch, task_weights: Tensor | None) -> tuple[LearnerOutput, Gradients]:
        if self.linear_head is None or not LinearHead.takes(self.inner):
            return super().meta_step(batch, task_weights)
        result = self.linear_head.meta_gradient(batch, self.inner, self.options(), task_weights)
        return self.as_output(result, task_weights)

    def adapt(self, support_x: Tensor, support_y: Tensor, inner_steps: int | None = None) -> Adapted:
        if self.linear_head is None or not LinearHead.takes(self.inner):
            return super().adapt(support_x, support_y, inner_steps)
        steps = self.inner_steps if inner_steps is None else inner_steps
        done = self.linear_head.adapt(support_x, support_y, self.inner, steps)
        return Adapted(self.engine, done.params, done.losses, support_x)


def head_of(model: nn.Module, head: str | Sequence[str] | None = None) -> list[str]:
    """The names of the parameters that fit `head`. Default: the parameters of the last module that owns any."""
    if head is not None:
        return ParameterLayout(model).fitting([head] if isinstance(head, str) else head)
    last = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))][-1:]
    own = {id(parameter) for module in last for parameter in module.parameters(recurse=False)}
    return [name for name, parameter in model.named_parameters() if id(parameter) in own]
