"""Finds the error of a gradient: a usual mistake, a factor, weights of the tasks, or single wrong parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastmaml.checking import mistakes
from fastmaml.checking.compare import Named, agrees, agrees_in, cosine, inner, pick, relative, size, zero
from fastmaml.checking.mistakes import Mistake
from fastmaml.checking.oracle import Answer, Oracle, Slip
from fastmaml.checking.report import listed, share


class Diagnosis(NamedTuple):
    sentences: list[str]
    verdicts: dict[str, str]  # for the table: wrong parameter -> verdict


def diagnose(
    given: Named, wanted: Named, loss: float | None, exact: Answer, oracle: Oracle, tolerance: float
) -> Diagnosis:
    """given, wanted: the gradients of the model's parameters, which differ. loss: the returned loss, if any."""
    off = f"The gradient is {share(relative(given, wanted))} off the exact meta-gradient (cosine {cosine(given, wanted):.4f})."
    factors = _known_factors(oracle)

    def all_are(verdict: str) -> dict[str, str]:
        return dict.fromkeys(_wrong(given, wanted, tolerance), verdict)

    factor = _factor(given, wanted, tolerance)
    if factor is not None and _is_known(factor, factors, tolerance):
        sentence = f"The direction is exact, but the gradient is {_reason(factor, factors)}."
        return Diagnosis([sentence], all_are(f"{factor:.4g} times"))
    tried: list[Mistake] = []
    candidates = _candidates(loss, exact, oracle, factors, tolerance)
    for mistake, besides in candidates:
        for known in (1.0, *factors):
            if agrees(given, {name: known * grad for name, grad in mistake.grad.items()}, tolerance):
                beyond = "" if known == 1.0 else f"In addition, the gradient is {_reason(known, factors)}."
                said = [sentence for sentence in (mistake.sentence, besides, beyond, off) if sentence]
                return Diagnosis(said, all_are(mistake.verdict))
        tried.append(mistake)
    if factor is not None:
        return Diagnosis(
            [f"The direction is exact, but the gradient is {factor:.6g} times as large."], all_are("scaled")
        )
    weights = _task_weights(given, exact, oracle, tolerance)
    if weights is not None:
        return Diagnosis([_of_tasks(weights), off], all_are("wrong"))
    rate = _other_rate(given, loss, oracle, tolerance)
    if rate is not None:
        return Diagnosis([rate, off], all_are("inner rate"))
    sentences, verdicts = _part_by_part(given, wanted, tried, tolerance)
    return Diagnosis([*sentences, off, *_about_loss(loss, exact, tried, oracle, tolerance)], verdicts)


def _candidates(
    loss: float | None, exact: Answer, oracle: Oracle, factors: dict[float, str], tolerance: float
) -> Iterator[tuple[Mistake, str]]:
    """The mistakes that fit the returned loss, computed. Mistakes of the forward pass also come with first order.

    If no loss was returned, or the loss fits no mistake, all mistakes are tried. The text names a second mistake.
    """

    def fits(other: float) -> bool:
        near = max(tolerance, 1e-9)
        return loss is not None and any(abs(loss - f * other) <= near * abs(f * other) for f in (1.0, *factors))

    ideas = list(mistakes.ideas(oracle))
    if loss is not None:
        backward = fits(exact.loss)
        chosen = [i for i in ideas if (backward if i.slip.backward_only else fits(mistakes.loss_of(i, oracle)))]
        ideas = chosen or ideas
    for idea in ideas:
        mistake = mistakes.computed(idea, oracle)
        if mistake is not None:
            yield mistake, ""
    for idea in ideas:
        if not idea.slip.backward_only and not oracle.expected.first_order:
            mistake = mistakes.computed(mistakes.with_first_order(idea, oracle), oracle)
            if mistake is not None:
                yield mistake, f"In addition: {mistakes.FIRST_ORDER}"


def _wrong(given: Named, wanted: Named, tolerance: float) -> list[str]:
    whole = size(wanted)
    names = [*wanted, *(name for name in given if name not in wanted)]
    return [name for name in names if not agrees_in(name, given, wanted, tolerance, whole)]


# ---------------------------------------------------------------- factors


def _factor(given: Named, wanted: Named, tolerance: float) -> float | None:
    """c with given = c * wanted; None if there is none."""
    length = inner(wanted, wanted)
    factor = inner(given, wanted) / length if length else 0.0
    if not factor or not math.isfinite(factor):
        return None
    return factor if agrees(given, {n: factor * e for n, e in wanted.items()}, tolerance) else None


def _known_factors(oracle: Oracle) -> dict[float, str]:
    """Factors from sums instead of means, with a reason for each."""
    tasks, queries = oracle.tasks, oracle.sets["query"][1].shape[1]
    said = {
        1 / queries: f"the query loss is divided by its {queries} examples twice",
        1 / tasks: f"divided by the {tasks} tasks twice",
        tasks * queries: f"summed over the {tasks} tasks and their {queries} query examples instead of averaged",
        queries: f"the query loss is summed over its {queries} examples instead of averaged",
        tasks: f"the sum over the {tasks} tasks instead of their mean (if intended, check with reduction='sum')",
        -1.0: "its sign is flipped",
    }
    if oracle.expected.reduction == "sum":
        said |= {
            1 / tasks: f"the mean over the {tasks} tasks instead of their sum",
            tasks: f"times the {tasks} tasks twice",
        }
    return {float(factor): reason for factor, reason in said.items() if factor != 1}


def _is_known(factor: float, factors: dict[float, str], tolerance: float) -> bool:
    return any(abs(factor - known) <= max(10 * tolerance, 1e-7) * abs(known) for known in factors)


def _reason(factor: float, factors: dict[float, str]) -> str:
    near = min(factors, key=lambda known: abs(factor - known))
    return f"{factor:.6g} times as large: {factors[near]}"


# ---------------------------------------------------------------- tasks and rates


def _task_weights(given: Named, exact: Answer, oracle: Oracle, tolerance: float) -> list[float] | None:
    """The weights of the tasks' gradients in the given gradient; 1 is right. None if no weights fit."""
    by_task = {name: rows for name, rows in exact.grads.items() if rows is not None and name in oracle.theta}
    rows = torch.cat([of_tasks.flatten(1) for of_tasks in by_task.values()], dim=1)
    if rows.shape[0] < 2 or rows.shape[0] >= rows.shape[1]:
        return None
    flat = torch.cat([given.get(name, torch.zeros_like(of_tasks[0])).flatten() for name, of_tasks in by_task.items()])
    weights = torch.linalg.lstsq(rows.T, flat.unsqueeze(1)).solution.squeeze(1)
    if not float((rows.T @ weights - flat).norm()) <= 10 * tolerance * float(flat.norm()):
        return None
    return [float(w) for w in weights]


def _of_tasks(weights: list[float]) -> str:
    shown = ", ".join(f"{w:.3g}" if abs(w) > 1e-6 else "0" for w in weights[:8]) + (", ..." if len(weights) > 8 else "")
    counted = [task for task, w in enumerate(weights) if abs(w) > 1e-6]
    only = ""
    if len(counted) == 1:
        only = f". Only task {counted[0] + 1} of {len(weights)} counts (zero_grad() or '=' instead of '+=' in the loop)"
    return f"The tasks' gradients have unequal weights: {shown} instead of 1 each{only}."


def _other_rate(given: Named, loss: float | None, oracle: Oracle, tolerance: float) -> str | None:
    """A sentence if the gradient is exact for another inner learning rate, which the returned loss reveals."""
    rate = oracle.expected.inner.lr
    if loss is None or not oracle.expected.inner_steps or not isinstance(rate, (int, float)):
        return None
    for start in (1.0, 0.5, 2.0):
        last, factor = start, 0.95 * start
        last_miss = oracle.loss(Slip(rate_factor=last)) - loss
        for _ in range(10):  # the secant method
            miss = oracle.loss(Slip(rate_factor=factor)) - loss
            if abs(miss) <= 1e-13 * abs(loss) or miss == last_miss or not math.isfinite(miss):
                break
            last, last_miss, factor = factor, miss, factor - miss * (factor - last) / (miss - last_miss)
        if not math.isfinite(factor) or abs(factor) > 1e3:
            continue
        grads = mistakes.of_parameters(oracle.answer(Slip(rate_factor=factor)).total(), oracle)
        if agrees(given, grads, max(100 * tolerance, 1e-6)):  # the root is known to about 1e-10
            return f"The inner learning rate is {factor * rate:.6g}, not {rate:g}. For that rate the gradient is exact."
    return None


# ---------------------------------------------------------------- part by part


def _part_by_part(given: Named, wanted: Named, tried: list[Mistake], tolerance: float) -> Diagnosis:
    """The verdict of each wrong parameter by itself: detached, a usual mistake, or just wrong."""
    whole, wrong = size(wanted), _wrong(given, wanted, tolerance)
    verdicts, kinds = dict[str, str](), dict[str, list[str]]()
    for name in wrong:
        kind = "wrong"
        if name not in given or zero({name: given[name]}):
            kind = "detached"
        elif given[name].numel() > 1:  # a single number could fit by chance
            fitting = (m for m in tried if agrees_in(name, given, m.grad, tolerance, whole))
            kind = next((m.verdict for m in fitting), "wrong")
        verdicts[name] = kind
        kinds.setdefault(kind, []).append(name)
    sentences = []
    if "detached" in kinds:
        sentences.append(f"Detached: no gradient reaches {listed(kinds.pop('detached'))}, but it should.")
    unknown = kinds.pop("wrong", [])
    for kind, names in kinds.items():
        mistake = next(m for m in tried if m.verdict == kind)
        sentences.append(f"The gradient of {listed(names)} shows this mistake: {mistake.sentence}")
    if unknown:
        by_error = sorted(unknown, key=lambda name: -relative(pick(given, [name]), pick(wanted, [name])))
        worst = share(relative(pick(given, by_error[:1]), pick(wanted, by_error[:1])))
        sentences.append(
            f"Wrong in {listed(by_error)}; the worst is '{by_error[0]}', wrong by {worst}. No usual mistake explains this."
        )
    right = [name for name in wanted if name not in wrong]
    if right:
        sentences.append(f"Right in {listed(right)}.")
    return Diagnosis(sentences, verdicts)


def _about_loss(loss: float | None, exact: Answer, tried: list[Mistake], oracle: Oracle, tolerance: float) -> list[str]:
    def is_that(other: float) -> bool:
        return loss is not None and abs(loss - other) <= max(tolerance, 1e-9) * abs(other)

    if loss is None:
        return []
    if is_that(exact.loss):
        return ["The loss is right, so the mistake is in the backward pass."]
    mistake = next((m for m in tried if is_that(m.loss)), None)
    if mistake is not None:
        return [f"The loss fits this mistake, but the gradient does not: {mistake.sentence}"]
    return [
        f"The loss is {loss:.6g}, but the oracle's is {exact.loss:.6g}: the function computes another meta-loss than "
        f"expected ({oracle.expected.words()})."
    ]
