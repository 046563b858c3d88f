"""What is special about checking the learners of fastmaml: which of them the oracle can unroll, and what is done otherwise."""

from __future__ import annotations

import copy
import math

import torch

from fastmaml.algorithms.imaml import IMAML
from fastmaml.algorithms.learner import Learner
from fastmaml.algorithms.reptile import Reptile
from fastmaml.checking import candidate as subjects
from fastmaml.checking.candidate import Batch, Outcome
from fastmaml.checking.compare import Named, relative
from fastmaml.checking.examination import Examination, by_differences
from fastmaml.checking.expected import of_learner
from fastmaml.checking.oracle import Oracle
from fastmaml.checking.report import Report, share

CONVERGED = 1e-9  # of |grad L_support(phi) + lam (phi - theta)|, beside gradients near 1


def check_learner(learner: Learner, batch: Batch, sizes: str, directions: int, seed: int) -> Report:
    """The report on a learner. Raises ValueError for those whose gradient is not that of a loss."""
    name = type(learner).__name__
    if isinstance(learner, Reptile):
        raise ValueError(f"{name} moves the start towards the adapted parameters, which is the gradient of no loss")
    where = f"backend {learner.engine.backend}, {sizes}"
    if isinstance(learner, IMAML):
        return _implicit(learner, batch, f"{name} ({where})", directions, seed)
    subject = subjects.of_learner(learner, batch)
    own = subject.owner
    assert isinstance(own, Learner)
    intent = of_learner(own)
    if isinstance(intent, str):
        if learner.first_order or learner.truncate is not None:
            raise ValueError(f"{name} without all Hessian terms has a gradient that only its own code defines")
        return by_differences(subject, f"{name} ({where})", intent, directions, seed)
    oracle = Oracle(own.model, intent.checked(own.model), batch)
    return Examination(subject, oracle, f"{name}, {intent.words()} ({where})", directions, seed).report()


def _implicit(learner: IMAML, batch: Batch, title: str, directions: int, seed: int) -> Report:
    """iMAML is exact at the inner minimum: a copy that goes all the way there is compared, then how far the learner is."""
    if learner.reference_quirks:
        raise ValueError("reference_quirks is the released code, whose gradient is not that of its loss")
    solved = copy.deepcopy(learner).double()
    solved.cg_steps, solved.cg_stop = min(solved.engine.layout.size, 500), 1e-26
    data = subjects.in_double(batch)
    far = math.inf
    for factor in (4, 16, 64, 256):
        solved.inner_steps = max(factor * learner.inner_steps, 20)
        with torch.enable_grad():
            solved(*data)
        far = math.inf if solved.last is None else float(solved.last.stationarity.max())
        if far <= CONVERGED or solved.solver == "newton_cg":
            break
    if not far <= 1e3 * CONVERGED:
        raise ValueError(
            f"the inner problem of {type(learner).__name__} does not converge ({far:.0e} is left of its gradient after "
            f"{solved.inner_steps} steps), so there is nothing exact to compare with; lower inner_lr or raise lam"
        )
    report = by_differences(
        subjects.of_learner(solved, batch), title, "the gradient is that of the inner minimum", directions, seed
    )
    off = relative(_grads(subjects.of_learner(learner, batch).run()), _grads(subjects.of_learner(solved, batch).run()))
    said = (
        f"That is at the inner minimum ({solved.inner_steps} inner steps, at most {solved.cg_steps} conjugate gradients). As "
        f"it is set, with {learner.inner_steps} and {learner.cg_steps}, its gradient is {share(off)} off that one."
    )
    return Report(report.ok, report.subject, [report.sentences[0], said, *report.sentences[1:]], report.table)


def _grads(outcome: Outcome) -> Named:
    return {name: grad for name, grad in outcome.grads.items() if grad is not None}
