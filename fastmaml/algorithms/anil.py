"""ANIL: the inner loop adapts the head alone, the body is meta-learned (Raghu, Raghu, Bengio, Vinyals 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastmaml.algorithms.learner import Learner
from fastmaml.losses import Loss
from fastmaml.parameters import InnerLr, ParameterLayout


class ANIL(Learner):
    """MAML with inner steps on the head alone, in training and at test: rate 0 for the body, whose gradient is full length.

        v[k] = v[k+1] - H_k (m * alpha * v[k+1]),   m = 1 on the head, 0 on the body    (ALGORITHMS 1.2)

    The product with the Hessian has the body's rows as well, so the body learns features for a head that adapts.
    head: name patterns of the adapted parameters ("head.*"), by default the last layer with parameters. The rest is
    Learner's. Raises ValueError for a pattern that fits no parameter.
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
        super().__init__(model, inner_lr, inner_steps, loss, adapted=head_of(model, head), **options)


def head_of(model: nn.Module, head: str | Sequence[str] | None = None) -> list[str]:
    """The names of the parameters that fit `head`, by default those of the last module that has any of its own."""
    if head is not None:
        return ParameterLayout(model).fitting([head] if isinstance(head, str) else head)
    last = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))][-1:]
    own = {id(parameter) for module in last for parameter in module.parameters(recurse=False)}
    return [name for name, parameter in model.named_parameters() if id(parameter) in own]
