"""MAML: learn a start from which a few gradient steps solve a task (Finn, Abbeel, Levine 2017, algorithm 2)."""

from __future__ import annotations

from torch import nn

from fastmaml.algorithms.learner import Learner
from fastmaml.losses import Loss
from fastmaml.parameters import InnerLr


class MAML(Learner):
    """phi = theta - inner_lr * grad L_support, inner_steps times; the loss is L_query(phi), its gradient exact.

        maml = MAML(model, inner_lr=0.4, inner_steps=1)
        out = maml(*batch)
        out.loss.backward()
        optimizer.step()

    first_order=True drops the Hessian terms (FOMAML). The other arguments are those of Engine.
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: InnerLr,
        inner_steps: int = 1,
        loss: Loss = "cross_entropy",
        first_order: bool = False,
        backend: str = "auto",
        memory: str = "auto",
        batch_norm: str = "transductive",
        label_smoothing: float = 0.0,
    ):
        super().__init__(model, inner_lr, inner_steps, loss, backend, memory, batch_norm, label_smoothing)
        self.first_order = bool(first_order)
