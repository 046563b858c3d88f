"""Runs a subject, compares its gradient with the oracle and with finite differences, and says in sentences what it is."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from fastmaml.checking import differences
from fastmaml.checking.candidate import Outcome, Subject
from fastmaml.checking.compare import Named, agrees, agrees_in, cosine, finite, pick, relative, size, zero
from fastmaml.checking.diagnosis import diagnose
from fastmaml.checking.mistakes import of_parameters
from fastmaml.checking.oracle import Answer, Oracle, Slip, switch_dropout_off
from fastmaml.checking.report import Report, Row, listed, share

# Both sides in float64 leave 1e-16 times what the adjoint amplifies (1e-13 on usual networks); a term that is missing
# or wrong is of the size of the inner rate. 1e-8 is far from both.
TOLERANCE = 1e-8

# Of the parameters, each with its own finite differences; more of them share one, so that large models take no longer.
MOST_PARTS = 10


class Examination:
    """One subject against one oracle; `report()` does everything.

    directions, seed: of the finite differences. refusal: why the subject does not run in float64, if it does not.
    """

    def __init__(
        self,
        subject: Subject,
        oracle: Oracle,
        title: str,
        directions: int,
        seed: int,
        tolerance: float = TOLERANCE,
        refusal: str = "",
    ):
        self.subject = subject
        self.oracle = oracle
        self.title = title
        self.directions = directions
        self.seed = seed
        self.tolerance = tolerance
        self.refusal = refusal
        self.sentences: list[str] = []
        self.verdicts: dict[str, str] = {}

    def report(self) -> Report:
        outcome, about_randomness = repeatable(self.subject)
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
                f"It does not run in float64 ({self.refusal}), so it was judged in float32: equal means within "
                f"{self.tolerance:.0e}, ten times what plain torch loses in float32 on this problem."
            )
        if self.directions and finite(given):
            self._differences(given, wanted, right, outcome)
        self.sentences += surroundings(self.subject)
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
            order = "first-order " if self.oracle.intent.first_order else ""
            error = relative(given, wanted)
            self._say(
                f"Exact: the {order}meta-gradient agrees with unrolled float64 autograd to {error:.0e} of its size."
            )
            self._say_what_could_be_seen(whole)
            if outcome.loss is not None and abs(outcome.loss - exact.loss) > max(self.tolerance, 1e-6) * abs(
                exact.loss
            ):
                self._say(
                    f"The loss it returns is {outcome.loss:.6g}, that of the gradient is {exact.loss:.6g}: they are not of "
                    "the same quantity."
                )
        elif zero(given):
            self.verdicts = dict.fromkeys(wanted, "detached")
            self._say(
                "Detached: no gradient reaches any parameter of the model. The graph is cut between the model's parameters "
                "and the query loss (a copy by deepcopy, state_dict, p.data or detach(), or no_grad() around the inner loop)"
                ", or backward() was called on nothing that depends on them."
            )
        elif agrees(params, whole, self.tolerance):
            rates = [name for name in wanted if name not in whole]
            error = relative(pick(given, rates), pick(wanted, rates))
            self._say(
                f"The gradient of the parameters is exact, but that of the learning rates ({listed(rates)}) is wrong by "
                f"{share(error)}."
            )
        else:
            found = diagnose(params, whole, outcome.loss, exact, self.oracle, self.tolerance)
            self.sentences += found.sentences
            self.verdicts = found.verdicts

    def _say_what_could_be_seen(self, whole: Named) -> None:
        """How much of an exact gradient the Hessian terms are: none to speak of, and first order would look the same."""
        intent = self.oracle.intent
        if intent.first_order or not intent.inner_steps or zero(whole):
            return
        first = self.oracle.answer(Slip(cut_gradient=frozenset(range(intent.inner_steps)))).total()
        hessian = relative(of_parameters(first, self.oracle), whole)
        if hessian > 100 * self.tolerance:
            self._say(f"The Hessian terms are {share(hessian)} of it: a first-order gradient would have been noticed.")
        else:
            self._say(
                f"The Hessian terms are only {share(hessian)} of it, so this check cannot tell an exact gradient from a "
                "first-order one; use a larger inner_lr or a less linear model."
            )

    def _differences(self, given: Named, wanted: Named, right: bool, outcome: Outcome) -> None:
        intent = self.oracle.intent
        if intent.first_order or intent.truncate is not None:
            kind = "first-order" if intent.first_order else "truncated"
            self._say(f"Finite differences were not taken: they give the whole gradient, not the {kind} one.")
            return
        along = differences.directions(wanted, self.directions, self.seed, MOST_PARTS)
        if outcome.loss is not None and not self.refusal:
            found = differences.slopes(self.subject.loss, self.subject.leaves, along)
            whose = "the loss it returns"
        else:
            leaves = self.oracle.theta | self.oracle.extra_leaves
            found, whose = differences.slopes(self.oracle.loss, leaves, along), "the oracle's meta-loss"
        self.sentences += differences.judged(found, given, wanted, right, whose, self.subject.model)

    def _table(self, given: Named, wanted: Named) -> Iterator[Row]:
        whole, nan = size(of_parameters(wanted, self.oracle)), math.nan
        for name, leaf in self.subject.leaves.items():
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


def by_differences(subject: Subject, title: str, reason: str, directions: int, seed: int) -> Report:
    """A learner that the oracle cannot unroll, compared with finite differences of its own loss alone."""
    outcome, sentences = repeatable(subject)
    if outcome is None:
        return Report(False, title, sentences)
    given = {name: grad for name, grad in outcome.grads.items() if grad is not None}
    silent = {n: x for n, x in subject.leaves.items() if x.requires_grad and zero(pick(given, [n]))}
    along = differences.directions(given, max(directions, 1), seed, len(given), silent)
    found = differences.slopes(subject.loss, subject.leaves, along)
    sure = [slope for slope in found if not slope.at_kink(given)]
    misses = {tuple(s.direction): s.miss(given, given) for s in sure}
    wrong = [slope for slope in sure if not slope.fits(given, given)]
    right = bool(sure) and not wrong
    if right:
        verdict = (
            f"Exact as far as finite differences of its loss can tell: along {len(sure)} directions they differ from the "
            f"gradient by {max(misses.values()):.0e} of its size at most."
        )
    elif wrong:
        alone = [name for slope in wrong for name in slope.direction if len(slope.direction) == 1]
        worst = share(max(slope.miss(given, given) for slope in wrong))
        verdict = (
            f"Wrong: finite differences of its loss differ from the gradient along {len(wrong)} of {len(sure)} directions, "
            f"by up to {worst} of its size{f'; it shows in {listed(alone)}' if alone else ''}."
        )
    else:
        verdict = "Nothing could be compared: no gradient reaches any parameter, or every direction crosses a kink."
    rows = []
    for name, leaf in subject.leaves.items():
        state = "agrees" if not any(tuple(slope.direction) == (name,) for slope in wrong) else "wrong"
        if name in silent:
            state = "zero" if state == "agrees" else "detached"
        elif not leaf.requires_grad:
            state = "frozen"
        rows.append(Row(name, leaf.numel(), misses.get((name,), math.nan), math.nan, state))
    sentences = [verdict, *sentences, *differences.kinks(len(found) - len(sure), len(found), subject.model)]
    sentences.append(f"There is no unrolled oracle to compare with: {reason}.")
    return Report(right, title, sentences + surroundings(subject), rows)


def repeatable(subject: Subject) -> tuple[Outcome | None, list[str]]:
    """The outcome of a call, and what to say of randomness.

    Where two calls differ, dropout is switched off; None where they differ all the same.
    """
    first, second = subject.run(), subject.run()
    if _distance(first, second) <= _SAME:
        return first, []
    layers = switch_dropout_off(subject.model)
    if layers:
        first, second = subject.run(), subject.run()
        if _distance(first, second) <= _SAME:
            which = f"dropout in {listed(layers)}"
            return first, [f"Random layers: two calls differ by the {which}; all this is with dropout switched off."]
    return None, [
        f"Random: two calls with the same weights and batch differ by {share(_distance(first, second))}, and not by "
        "dropout layers of the model, so nothing can be compared. Take the randomness out of the function (data drawn "
        "inside it, F.dropout, noise), or seed it inside."
    ]


# In float32 a sum over threads may differ in its last bits from call to call.
_SAME = 1e-5


def _distance(a: Outcome, b: Outcome) -> float:
    if any((a.grads[name] is None) != (b.grads[name] is None) for name in a.grads):
        return math.inf
    first, second = ({n: g for n, g in o.grads.items() if g is not None} for o in (a, b))
    if not (finite(first) and finite(second)):
        return 0.0  # NaN twice: the comparison with the oracle says so
    losses = abs((a.loss or 0.0) - (b.loss or 0.0)) / max(abs(a.loss or 0.0), 1e-30)
    return max(losses, relative(first, second))


def surroundings(subject: Subject) -> list[str]:
    """What a user should know of the model beside the gradient: changed weights, stateful layers, tied and frozen ones."""
    model, sentences = subject.model, []
    if subject.changes_weights:
        sentences.append(
            "A call changes the model's own weights (p.data, copy_() or optimizer.step() inside it), so the next task or "
            "call starts from there; they were put back after each call."
        )
    owners: dict[str, list[str]] = {}
    for name in subject.changed_buffers:
        owner, _, buffer = name.rpartition(".")
        owners.setdefault(owner, []).append(buffer)
    if owners:
        first = next(iter(owners))
        kind = type(subject.owner.get_submodule(first)).__name__
        others = f" (and so do {len(owners) - 1} more layers)" if len(owners) > 1 else ""
        layer = f"layer '{first.removeprefix('model.')}'" if first else "learner"
        sentences.append(
            f"Stateful {layer} ({kind}): a call changes its {', '.join(owners[first])}{others}, so what eval mode "
            "computes depends on the batches that went through before."
        )
    for names in _tied(model):
        sentences.append(f"Tied: {listed(names)} are one parameter, whose gradient is the sum over its uses.")
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen:
        sentences.append(f"Frozen (requires_grad=False), neither adapted nor trained: {listed(frozen)}.")
    return sentences


def _tied(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [same for same in names.values() if len(same) > 1]
