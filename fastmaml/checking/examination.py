"""Runs a candidate, compares its gradient with the oracle and with finite differences, and writes the report."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from fastmaml.checking import differences
from fastmaml.checking.candidate import Candidate, Outcome
from fastmaml.checking.compare import Named, agrees, agrees_in, cosine, finite, pick, relative, size, zero
from fastmaml.checking.diagnosis import diagnose
from fastmaml.checking.mistakes import of_parameters
from fastmaml.checking.oracle import Answer, Oracle, Slip, switch_dropout_off
from fastmaml.checking.report import Report, Row, listed, share

# In float64 rounding leaves about 1e-13 on usual networks. A missing or wrong term is as large as the inner rate.
# 1e-8 is far from both.
TOLERANCE = 1e-8

# At most so many parameters get their own finite differences. With more, neighbours share, to bound the time.
MOST_PARTS = 10


class Examination:
    """One candidate against one oracle; `report()` does everything.

    directions, seed: of the finite differences. refusal: why the candidate does not run in float64; "" if it does.
    """

    def __init__(
        self,
        candidate: Candidate,
        oracle: Oracle,
        title: str,
        directions: int,
        seed: int,
        tolerance: float = TOLERANCE,
        refusal: str = "",
    ):
        self.candidate = candidate
        self.oracle = oracle
        self.title = title
        self.directions = directions
        self.seed = seed
        self.tolerance = tolerance
        self.refusal = refusal
        self.sentences: list[str] = []
        self.verdicts: dict[str, str] = {}

    def report(self) -> Report:
        outcome, about_randomness = repeatable(self.candidate)
        if outcome is None:
            return Report(False, self.title, about_randomness)
        exact = self._exact()
        if not math.isfinite(exact.loss) or not finite(exact.total()):
            diverged = "The exact meta-gradient is not finite: the inner loop diverges. Lower inner_lr or inner_steps."
            return Report(False, self.title, [diverged])
        given = {name: grad.to(torch.float64) for name, grad in outcome.grads.items() if grad is not None}
        wanted = {name: grad for name, grad in exact.total().items() if name in outcome.grads}
        right = agrees(given, wanted, self.tolerance)
        self._compare(given, wanted, exact, outcome)
        self.sentences += about_randomness
        if self.refusal:
            self._say(
                f"The function does not run in float64 ({self.refusal}), so it was checked in float32. The tolerance is "
                f"{self.tolerance:.0e}, ten times plain torch's own float32 error on this problem."
            )
        if self.directions and finite(given):
            self._differences(given, wanted, right, outcome)
        self.sentences += surroundings(self.candidate)
        unused = [name for name in self.oracle.trained if exact.grads[name] is None]
        if unused:
            self._say(f"Unused: the loss does not depend on {listed(unused)}.")
        return Report(right, self.title, self.sentences, list(self._table(given, wanted)))

    def _say(self, sentence: str) -> None:
        self.sentences.append(sentence)

    def _exact(self) -> Answer:
        try:
            return self.oracle.answer()
        except Exception as error:
            sentence = str(error).strip().split("\n")[0]
            raise ValueError(f"plain torch cannot compute this meta-gradient: {sentence}") from error

    def _compare(self, given: Named, wanted: Named, exact: Answer, outcome: Outcome) -> None:
        params, whole = of_parameters(given, self.oracle), of_parameters(wanted, self.oracle)
        if not finite(given):
            bad = [name for name, grad in given.items() if not finite({name: grad})]
            self._say(f"Not finite: the gradient holds NaN or infinity in {listed(bad)}; the exact one is finite.")
        elif agrees(given, wanted, self.tolerance):
            order = "first-order " if self.oracle.expected.first_order else ""
            error = relative(given, wanted)
            self._say(
                f"Exact: the {order}meta-gradient agrees with unrolled float64 autograd to {error:.0e} of its size."
            )
            self._say_what_could_be_seen(whole)
            if outcome.loss is not None and abs(outcome.loss - exact.loss) > max(self.tolerance, 1e-6) * abs(
                exact.loss
            ):
                self._say(
                    f"The returned loss is {outcome.loss:.6g}, but the gradient belongs to a loss of {exact.loss:.6g}."
                )
        elif zero(given):
            self.verdicts = dict.fromkeys(wanted, "detached")
            self._say(
                "Detached: no gradient reaches any parameter of the model. Perhaps the graph is cut between the model's "
                "parameters and the query loss: by deepcopy, state_dict, p.data, detach() or no_grad() around the inner "
                "loop. Or backward() was called on a value that does not depend on the parameters."
            )
        elif agrees(params, whole, self.tolerance):
            rates = [name for name in wanted if name not in whole]
            error = relative(pick(given, rates), pick(wanted, rates))
            self._say(
                f"The gradient of the parameters is exact, but the gradient of the learning rates ({listed(rates)}) is "
                f"wrong by {share(error)}."
            )
        else:
            found = diagnose(params, whole, outcome.loss, exact, self.oracle, self.tolerance)
            self.sentences += found.sentences
            self.verdicts = found.verdicts

    def _say_what_could_be_seen(self, whole: Named) -> None:
        """The Hessian terms' share of an exact gradient. If it is tiny, a first-order gradient would look exact too."""
        expected = self.oracle.expected
        if expected.first_order or not expected.inner_steps or zero(whole):
            return
        first = self.oracle.answer(Slip(cut_gradient=frozenset(range(expected.inner_steps)))).total()
        hessian = relative(of_parameters(first, self.oracle), whole)
        if hessian > 100 * self.tolerance:
            self._say(
                f"The Hessian terms are {share(hessian)} of the gradient, so first order would have been noticed."
            )
        else:
            self._say(
                f"The Hessian terms are only {share(hessian)} of the gradient, so this check cannot tell exact from first "
                "order. Use a larger inner_lr or a less linear model."
            )

    def _differences(self, given: Named, wanted: Named, right: bool, outcome: Outcome) -> None:
        expected = self.oracle.expected
        if expected.first_order or expected.truncate is not None:
            kind = "first-order" if expected.first_order else "truncated"
            self._say(f"Finite differences were not taken: they give the whole gradient, not the {kind} one.")
            return
        along = differences.directions(wanted, self.directions, self.seed, MOST_PARTS)
        if outcome.loss is not None and not self.refusal:
            found = differences.slopes(self.candidate.loss, self.candidate.leaves, along)
            whose = "the returned loss"
        else:
            leaves = self.oracle.theta | self.oracle.extra_leaves
            found, whose = differences.slopes(self.oracle.loss, leaves, along), "the oracle's meta-loss"
        self.sentences += differences.judged(found, given, wanted, right, whose, self.candidate.model)

    def _table(self, given: Named, wanted: Named) -> Iterator[Row]:
        whole, nan = size(of_parameters(wanted, self.oracle)), math.nan
        for name, leaf in self.candidate.leaves.items():
            entries = leaf.numel()
            there = name in given or name in wanted
            right = not there or agrees_in(name, given, wanted, self.tolerance, whole)
            nothing = "" if right else ", but has a gradient"
            if not leaf.requires_grad:
                yield Row(name, entries, nan, nan, "frozen" + nothing)
            elif name not in wanted:
                yield Row(name, entries, nan, nan, "unused" + nothing)
            elif float(wanted[name].norm()) <= 1e-10 * whole:
                yield Row(name, entries, nan, nan, "zero" if right else "wrong: should be zero")
            elif name not in given or zero({name: given[name]}):
                yield Row(name, entries, 1.0, nan, "detached")
            else:
                mine, exact = pick(given, [name]), pick(wanted, [name])
                verdict = "exact" if right else self.verdicts.get(name, "wrong")
                yield Row(name, entries, relative(mine, exact), cosine(mine, exact), verdict)


def by_differences(candidate: Candidate, title: str, reason: str, directions: int, seed: int) -> Report:
    """A learner that the oracle cannot unroll, compared with finite differences of its own loss alone."""
    outcome, sentences = repeatable(candidate)
    if outcome is None:
        return Report(False, title, sentences)
    given = {name: grad for name, grad in outcome.grads.items() if grad is not None}
    silent = {n: x for n, x in candidate.leaves.items() if x.requires_grad and zero(pick(given, [n]))}
    along = differences.directions(given, max(directions, 1), seed, len(given), silent)
    found = differences.slopes(candidate.loss, candidate.leaves, along)
    sure = [slope for slope in found if not slope.at_kink(given)]
    misses = {tuple(s.direction): s.miss(given, given) for s in sure}
    wrong = [slope for slope in sure if not slope.fits(given, given)]
    right = bool(sure) and not wrong
    if right:
        verdict = (
            f"Exact as far as finite differences can tell: along {len(sure)} directions they differ from the "
            f"gradient by at most {max(misses.values()):.0e} of its size."
        )
    elif wrong:
        alone = [name for slope in wrong for name in slope.direction if len(slope.direction) == 1]
        worst = share(max(slope.miss(given, given) for slope in wrong))
        verdict = (
            f"Wrong: finite differences of its loss differ from the gradient along {len(wrong)} of {len(sure)} directions, "
            f"by up to {worst} of its size{f'; the error shows in {listed(alone)}' if alone else ''}."
        )
    else:
        verdict = "Nothing could be compared: no gradient reaches any parameter, or every direction crosses a kink."
    rows = []
    for name, leaf in candidate.leaves.items():
        state = "agrees" if not any(tuple(slope.direction) == (name,) for slope in wrong) else "wrong"
        if name in silent:
            state = "zero" if state == "agrees" else "detached"
        elif not leaf.requires_grad:
            state = "frozen"
        rows.append(Row(name, leaf.numel(), misses.get((name,), math.nan), math.nan, state))
    sentences = [verdict, *sentences, *differences.kinks(len(found) - len(sure), len(found), candidate.model)]
    sentences.append(f"The oracle cannot unroll this learner: {reason}.")
    return Report(right, title, sentences + surroundings(candidate), rows)


def repeatable(candidate: Candidate) -> tuple[Outcome | None, list[str]]:
    """The outcome of a call, and sentences about randomness.

    If two calls differ, dropout is switched off. If they still differ, the outcome is None.
    """
    first, second = candidate.run(), candidate.run()
    if _distance(first, second) <= _SAME:
        return first, []
    layers = switch_dropout_off(candidate.model)
    if layers:
        first, second = candidate.run(), candidate.run()
        if _distance(first, second) <= _SAME:
            which = f"dropout in {listed(layers)}"
            return first, [f"Random layers: two calls differ by the {which}, so the check switched dropout off."]
    return None, [
        f"Random: two calls with the same weights and batch differ by {share(_distance(first, second))}, and not by "
        "dropout layers of the model, so nothing can be compared. Remove the randomness from the function (data drawn "
        "inside it, F.dropout, noise), or seed it inside."
    ]


# In float32 a sum over threads may change its last bits between calls.
_SAME = 1e-5


def _distance(a: Outcome, b: Outcome) -> float:
    if any((a.grads[name] is None) != (b.grads[name] is None) for name in a.grads):
        return math.inf
    first, second = ({n: g for n, g in o.grads.items() if g is not None} for o in (a, b))
    if not (finite(first) and finite(second)):
        return 0.0  # NaN twice: the comparison with the oracle reports it
    losses = abs((a.loss or 0.0) - (b.loss or 0.0)) / max(abs(a.loss or 0.0), 1e-30)
    return max(losses, relative(first, second))


def surroundings(candidate: Candidate) -> list[str]:
    """Sentences about the model: changed weights, stateful layers, tied and frozen parameters."""
    model, sentences = candidate.model, []
    if candidate.changes_weights:
        sentences.append(
            "A call changes the model's own weights (p.data, copy_() or optimizer.step()), so the next task or call "
            "starts from the changed weights. The check restored them after each call."
        )
    owners: dict[str, list[str]] = {}
    for name in candidate.changed_buffers:
        owner, _, buffer = name.rpartition(".")
        owners.setdefault(owner, []).append(buffer)
    if owners:
        first = next(iter(owners))
        kind = type(candidate.owner.get_submodule(first)).__name__
        others = f" (and those of {len(owners) - 1} more layers)" if len(owners) > 1 else ""
        layer = f"layer '{first.removeprefix('model.')}'" if first else "learner"
        sentences.append(
            f"Stateful {layer} ({kind}): a call changes its {', '.join(owners[first])}{others}. Results in eval mode "
            "depend on earlier batches."
        )
    for names in _tied(model):
        sentences.append(f"Tied: {listed(names)} are one parameter; its gradient is the sum over its uses.")
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen:
        sentences.append(f"Frozen (requires_grad=False), neither adapted nor trained: {listed(frozen)}.")
    return sentences


def _tied(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [same for same in names.values() if len(same) > 1]
