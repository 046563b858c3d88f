"""BOIL: the inner loop adapts only the body; the head stays fixed (Oh, Yoo, Kim, Yun 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastmaml.algorithms.anil import head_of
from fastmaml.algorithms.learner import Learner
from fastmaml.inner import InnerLr
from fastmaml.problem.losses import Loss


class BOIL(Learner):
    """MAML whose inner steps move only the body. All tasks share one meta-learned head, with inner rate 0.

    BOIL is the reverse of ANIL: the same sweep, with m = 0 on the head and 1 on the body.
    The authors' released runs take one step with rate 0.5.

    head: name patterns of the parameters that stay fixed. Default: the last layer with parameters.
    The other arguments are Learner's.
    Raises ValueError for a pattern that fits no parameter, or if nothing is left to adapt.
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
        still = head_of(model, head)
        body = [name for name, _ in model.named_parameters() if name not in still]
        if not body:
            raise ValueError(f"the head ({', '.join(still)}) is the whole model, so BOIL has no body to adapt")
        super().__init__(model, inner_lr, inner_steps, loss, adapted=body, **options)
