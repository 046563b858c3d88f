"""Checks of fastmaml's learners: which the oracle can unroll, and how the others are checked."""

from __future__ import annotations

import copy
import math

import torch

from fastmaml.algorithms.imaml import IMAML
from fastmaml.algorithms.learner import Learner
from fastmaml.algorithms.reptile import Reptile
from fastmaml.checking.candidate import Batch, Outcome, candidate_of_learner, in_double
from fastmaml.checking.compare import Named, relative
from fastmaml.checking.examination import Examination, by_differences
from fastmaml.checking.expected import expected_of_learner
from fastmaml.checking.oracle import Oracle
from fastmaml.checking.report import Report, share

CONVERGED = 1e-9  # limit of |grad L_support(phi) + lam (phi - theta)|, for gradients near 1


def check_learner(learner: Learner, batch: Batch, sizes: str, directions: int, seed: int) -> Report:
    """The report on a learner. Raises ValueError if its gradient is not the gradient of a loss."""
    name = type(learner).__name__
    if isinstance(learner, Reptile):
        raise ValueError(f"{name} moves the start towards the adapted parameters; this is not the gradient of a loss")
    where = f"backend {learner.engine.backend}, {sizes}"
    if isinstance(learner, IMAML):
        return _implicit(learner, batch, f"{name} ({where})", directions, seed)
    candidate = candidate_of_learner(learner, batch)
    own = candidate.owner
    assert isinstance(own, Learner)
    expected = expected_of_learner(own)
    if isinstance(expected, str):
        if learner.first_order or learner.truncate is not None:
            raise ValueError(
                f"{name} without all Hessian terms cannot be checked: only its own code defines its gradient"
            )
        return by_differences(candidate, f"{name} ({where})", expected, directions, seed)
    oracle = Oracle(own.model, expected.checked(own.model), batch)
    return Examination(candidate, oracle, f"{name}, {expected.words()} ({where})", directions, seed).report()


def _implicit(learner: IMAML, batch: Batch, title: str, directions: int, seed: int) -> Report:
    """iMAML is exact at the inner minimum. Checks a copy that goes there, then measures the learner's distance from it."""
    if learner.reference_quirks:
        raise ValueError("reference_quirks=True is the released code, whose gradient is not the gradient of its loss")
    solved = copy.deepcopy(learner).double()
    solved.cg_steps, solved.cg_stop = min(solved.engine.layout.size, 500), 1e-26
    data = in_double(batch)
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
            f"the inner problem of {type(learner).__name__} does not converge (its gradient is still {far:.0e} after "
            f"{solved.inner_steps} steps); lower inner_lr or raise lam"
        )
    report = by_differences(
        candidate_of_learner(solved, batch), title, "this gradient belongs to the inner minimum", directions, seed
    )
    off = relative(
        _grads(candidate_of_learner(learner, batch).run()), _grads(candidate_of_learner(solved, batch).run())
    )
    said = (
        f"This holds at the inner minimum ({solved.inner_steps} inner steps, at most {solved.cg_steps} conjugate gradient "
        f"steps). With the learner's own {learner.inner_steps} and {learner.cg_steps} its gradient is {share(off)} off."
    )
    return Report(report.ok, report.subject, [report.sentences[0], said, *report.sentences[1:]], report.table)


def _grads(outcome: Outcome) -> Named:
    return {name: grad for name, grad in outcome.grads.items() if grad is not None}
