"""MAML: learn a start from which a few gradient steps solve a task (Finn, Abbeel, Levine 2017, algorithm 2)."""

from __future__ import annotations

from fastmaml.algorithms.learner import Learner


class MAML(Learner):
    """Adapts phi <- phi - inner_lr * grad L_support(phi), inner_steps times from theta. The loss is L_query(phi).

        maml = MAML(model, inner_lr=0.4, inner_steps=1)
        out = maml(*batch)
        out.loss.backward()
        optimizer.step()

    backward() gives the exact gradient, with all Hessian terms. first_order=True drops the Hessian terms (FOMAML).
    The arguments are Learner's.
    """
