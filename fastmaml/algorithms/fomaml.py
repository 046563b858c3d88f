"""First-order MAML: the query gradient at the adapted parameters (Finn et al. 2017, section 5.2)."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastmaml.algorithms.maml import MAML
from fastmaml.parameters import InnerLr


class FOMAML(MAML):
    """MAML without the Hessian terms: lambda[K] = grad L_query(phi[K]). Arguments as MAML's, except first_order."""

    def __init__(self, model: nn.Module, inner_lr: InnerLr | None = None, inner_steps: int = 1, **options: Any):
        super().__init__(model, inner_lr, inner_steps, first_order=True, **options)
