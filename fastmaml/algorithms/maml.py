"""MAML: learn a start from which a few gradient steps solve a task (Finn, Abbeel, Levine 2017, algorithm 2)."""

from __future__ import annotations

from fastmaml.algorithms.learner import Learner


class MAML(Learner):
    """phi = theta - inner_lr * grad L_support, inner_steps times; the loss is L_query(phi), its gradient exact.

        maml = MAML(model, inner_lr=0.4, inner_steps=1)
        out = maml(*batch)
        out.loss.backward()
        optimizer.step()

    first_order=True drops the Hessian terms (FOMAML). All arguments are Learner's.
    """
