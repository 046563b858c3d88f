"""CAVIA: adapts only a few context parameters and learns the network around them (Zintgraf et al. 2019, eq. 2-3).

    context[0] = 0,    context[k+1] = context[k] - inner_lr * grad_context L_support(context[k], theta)
    the outer loop follows the gradient of L_query(context[K], theta) by theta

theta acts on the query loss and on every inner gradient. One adjoint sweep gives both parts; its tangents are nonzero
only on the context (ALGORITHMS 1.2 and 2.11).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastmaml.algorithms.learner import Gradients, Learner, LearnerOutput
from fastmaml.inner import InnerLr
from fastmaml.problem.losses import Loss
from fastmaml.problem.parameters import ParameterLayout
from fastmaml.problem.results import MetaGradient


class CAVIA(Learner):
    """Adapts the context parameters of `model`, from zero in every task, and learns the other parameters.

        learner = CAVIA(fm.models.context_mlp([1, 40, 40, 1], context=5), inner_lr=1.0, loss="mse")

    context: the name pattern of the context parameters. Their stored values are not used, and their gradient is zero.
    inner_lr: default 1.0. The other arguments are Learner's.

    fm.models.context_mlp and context_conv4 run on autodiff; `engine.why` names the place. The compiled kernels do not
    fuse a module whose forward reads a parameter directly.

    Raises ValueError for a pattern that fits no parameter, or fits a frozen one.
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: InnerLr | None = None,
        inner_steps: int = 1,
        loss: Loss = "cross_entropy",
        *,
        context: str = "*context*",
        **options: Any,
    ):
        names = ParameterLayout(model).fitting([context])
        for name in names:
            if not model.get_parameter(name).requires_grad:
                raise ValueError(f"the context parameter '{name}' is frozen, so nothing would adapt")
        if inner_lr is None and options.get("inner") is None:
            inner_lr = 1.0
        super().__init__(model, inner_lr, inner_steps, loss, adapted=names, **options)
        self.context_names = names

    def start(self, support_x: Tensor, support_y: Tensor) -> Tensor:
        """theta [P] with the context at zero."""
        return self._without_context(super().start(support_x, support_y))

    def as_output(self, result: MetaGradient, task_weights: Tensor | None) -> tuple[LearnerOutput, Gradients]:
        return super().as_output(result._replace(grad=self._without_context(result.grad)), task_weights)

    def _without_context(self, vector: Tensor) -> Tensor:
        return vector.index_fill(0, self.engine.layout.positions(self.context_names).to(vector.device), 0.0)
