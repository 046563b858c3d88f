"""The usual mistakes of meta-gradients: a sentence for each, and the Slip with which the oracle makes it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from fastmaml.checking.compare import Named
from fastmaml.checking.oracle import Oracle, Slip

FIRST_ORDER = (
    "First order only: the Hessian terms are missing. Either the inner gradient is taken without create_graph=True (or "
    "is detached), or this is the gradient of the adapted copy, not of the start."
)


class Idea(NamedTuple):
    """A mistake in words, and how the oracle makes it."""

    verdict: str  # for the table
    sentence: str
    slip: Slip


class Mistake(NamedTuple):
    """A mistake in words, with the gradient and loss of a program that makes it."""

    verdict: str
    sentence: str
    grad: Named  # of the model's parameters
    loss: float


def computed(idea: Idea, oracle: Oracle) -> Mistake | None:
    """The gradient and loss of a program with this mistake. None if no program can make it (a batch norm without a batch)."""
    try:
        answer = oracle.answer(idea.slip)
    except ValueError:
        return None
    return Mistake(idea.verdict, idea.sentence, of_parameters(answer.total(), oracle), answer.loss)


def loss_of(idea: Idea, oracle: Oracle) -> float:
    """The loss alone, which is cheaper. NaN if no program can make the mistake."""
    try:
        return oracle.loss(idea.slip)
    except ValueError:
        return math.nan


def with_first_order(idea: Idea, oracle: Oracle) -> Idea:
    """A mistake of the forward pass, in a program that also drops the Hessian terms."""
    every = frozenset(range(oracle.expected.inner_steps if idea.slip.steps is None else idea.slip.steps))
    return idea._replace(slip=replace(idea.slip, cut_gradient=every))


def of_parameters(grads: Named, oracle: Oracle) -> Named:
    """Without the gradients of the rates, which most mistakes leave undefined."""
    return {name: grad for name, grad in grads.items() if name in oracle.theta}


def ideas(oracle: Oracle) -> Iterator[Idea]:
    """The usual mistakes, the likeliest first."""
    expected = oracle.expected
    steps = expected.inner_steps
    if expected.first_order or expected.truncate is not None:
        what = "first_order=True" if expected.first_order else f"truncate={expected.truncate}"
        yield Idea(
            "second order",
            f"Second order: this is the exact meta-gradient, although {what} was asked for.",
            Slip(whole=True),
        )
    if steps and not expected.first_order:
        yield Idea("first order", FIRST_ORDER, Slip(cut_gradient=frozenset(range(steps))))
        yield Idea(
            "no query gradient",
            "The query gradient at the adapted parameters is missing; only the Hessian terms are left. Either the adjoint "
            "sweep forgets its first term, or the inner step starts from detached parameters (p.detach() - lr * g).",
            Slip(only_hessian=True),
        )
        yield from _cuts(steps)
    yield Idea(
        "not adapted",
        "The inner steps have no effect: this is the gradient of the query loss at the start. The query pass does not "
        "use the adapted parameters.",
        Slip(steps=0),
    )
    for other in sorted({*range(1, min(steps, 10)), steps + 1, 2 * steps} - {0, steps}):
        if expected.minibatch is None or other < steps:
            yield Idea(
                _count(other, "step"),
                f"This is the meta-gradient of {_count(other, 'inner step')}, not of {steps}.",
                Slip(steps=other),
            )
    if expected.plain and steps:
        yield from _rates(oracle)
    yield from _norms(oracle)
    if steps > 1:
        yield Idea(
            "steps at the start",
            "Every inner gradient is taken at the start. The inner forward pass does not use the adapted parameters of "
            "the step before.",
            Slip(at_start=True),
        )
    yield from _examples(oracle)
    yield from _left_out(oracle)


def _cuts(steps: int) -> Iterator[Idea]:
    """Graphs that are cut at some of the steps."""
    for j in range(1, min(steps, 10)):
        yield Idea(
            f"cut after step {j}",
            f"The Hessian {_terms(j)} of the first {j} of {steps} inner steps {_are(j)} missing. The graph is cut after "
            f"step {j}, by a detach() or a new leaf. This is the gradient with respect to the parameters after step {j}, "
            "not the start.",
            Slip(cut_gradient=frozenset(range(j))),
        )
    for k in range(min(steps, 10)):
        if steps > 1:
            yield Idea(
                f"step {k + 1} detached",
                f"The Hessian term of inner step {k + 1} of {steps} is missing: its gradient is detached or taken "
                "without create_graph=True.",
                Slip(cut_gradient=frozenset([k])),
            )
    for j in range(1, min(steps, 10)):
        yield Idea(
            f"last {j} first order",
            f"The Hessian {_terms(j)} of the last {j} of {steps} inner steps {_are(j)} missing: their gradients are "
            "detached or taken without create_graph=True.",
            Slip(cut_gradient=frozenset(range(steps - j, steps))),
        )
    places = [frozenset(range(steps))] + ([frozenset([k]) for k in range(min(steps, 10))] if steps > 1 else [])
    for place in places:
        where = "every inner step starts" if len(place) == steps else f"inner step {min(place) + 1} of {steps} starts"
        yield Idea(
            "parameters detached",
            f"The direct path to the start is cut: {where} from detached parameters (p.detach() - lr * g or p.data). "
            "Only the path through the inner gradient is left.",
            Slip(cut_params=place),
        )


def _rates(oracle: Oracle) -> Iterator[Idea]:
    if not oracle.rates.one_number:
        yield Idea(
            "rate order",
            "The learning rates multiply the Hessian-vector product, a*(H v), instead of the vector, H(a*v). The two "
            "are equal only if the rates are one number.",
            Slip(hessian_term="a*(H v)"),
        )
    yield Idea(
        "rate missing",
        "The Hessian term lacks the learning rate: it is H v instead of H(a*v).",
        Slip(hessian_term="H v"),
    )
    yield Idea(
        "sign",
        "The Hessian term has the wrong sign: it is added instead of subtracted.",
        Slip(hessian_term="-H(a*v)"),
    )
    support = oracle.sets["support"][1].shape[1]
    factors = {
        float(support): f"the inner loss is summed over its {support} examples instead of averaged",
        1.0 / support: f"the inner loss is divided by its {support} examples twice",
        -1.0: "the inner step goes uphill, theta + lr * g",
    }
    classes = _classes(oracle)
    if classes > 1:
        factors[float(classes)] = f"the inner loss is summed over the {classes} classes (or outputs)"
    for factor, reason in factors.items():
        if factor != 1.0:
            yield Idea(
                "inner rate",
                f"The inner learning rate is {factor:g} times the given one: {reason}.",
                Slip(rate_factor=factor),
            )


def _norms(oracle: Oracle) -> Iterator[Idea]:
    norms = oracle.norms.modules
    mode = oracle.expected.batch_norm
    if not norms or not oracle.expected.inner_steps:
        return
    layers = f"batch norm {', '.join(repr(name) for name in list(norms)[:3])}{' ...' if len(norms) > 3 else ''}"
    if mode == "frozen":
        for pair in (("batch", "batch"), ("batch", "running"), ("running", "batch")):
            where = {
                ("batch", "batch"): "everywhere",
                ("batch", "running"): "in the inner loop",
                ("running", "batch"): "in the query pass",
            }[pair]
            yield Idea(
                "batch norm in train mode",
                f"The {layers} uses batch statistics {where}, but batch_norm='frozen' means running statistics. The "
                "model is in train mode there.",
                Slip(inner_norm=pair[0], query_norm=pair[1]),
            )
        return
    if mode == "support":
        yield Idea(
            "query statistics",
            f"The {layers} normalises the query set with the query set's statistics, but batch_norm='support' means the "
            "support set's.",
            Slip(query_norm="batch"),
        )
    if any(norm.running_mean is None for norm in norms.values()):
        return
    own = None if mode == "transductive" else "support"
    places = (
        ("running", own, "in the inner loop"),
        ("carried", own, "in the inner loop (as updated by the query passes so far)"),
        ("running", "running", "in the inner loop and the query pass"),
        (None, "running", "in the query pass"),
        (None, "updated", "in the query pass (as updated by the inner passes)"),
        (None, "carried", "in the query pass (as updated by the inner passes of all tasks so far)"),
    )
    for inner_norm, query_norm, where in places:
        yield Idea(
            "batch norm in eval mode",
            f"The {layers} uses its running statistics {where}, because the model is in eval mode there. But "
            f"batch_norm='{mode}' means batch statistics. Call model.train(), or check with batch_norm='frozen' if eval "
            "mode is intended.",
            Slip(inner_norm=inner_norm, query_norm=query_norm),
        )


def _examples(oracle: Oracle) -> Iterator[Idea]:
    if oracle.expected.minibatch is not None or not oracle.expected.inner_steps:
        return
    places = (
        ("query", "query", "The inner loop adapts on the query set instead of the support set."),
        ("support", "support", "The meta-loss is taken on the support set instead of the query set."),
        ("query", "support", "Support and query set are exchanged."),
    )
    for inner_set, query_set, sentence in places:
        yield Idea("wrong examples", sentence, Slip(inner_set=inner_set, query_set=query_set))


def _left_out(oracle: Oracle) -> Iterator[Idea]:
    """Parameters that the inner loop does not move, although they are expected to move."""
    if not oracle.expected.inner_steps:
        return
    norms = [f"{n}.{p}" for n, m in oracle.model.named_modules() if _is_norm(m) for p, _ in m.named_parameters()]
    last = {oracle.moved[-1].rpartition(".")[0]} if oracle.moved else set()
    groups = {
        "the scales and shifts of the norm layers": frozenset(norms) & frozenset(oracle.moved),
        "the biases": frozenset(n for n in oracle.moved if n.rpartition(".")[2] == "bias"),
        "anything but the last layer": frozenset(n for n in oracle.moved if n.rpartition(".")[0] not in last),
        "the last layer": frozenset(n for n in oracle.moved if n.rpartition(".")[0] in last),
    }
    for words, names in groups.items():
        if names and len(names) < len(oracle.moved):
            yield Idea(
                "part not adapted",
                f"The inner loop does not adapt {words}. If this is intended, check with adapted=[...].",
                Slip(still=names),
            )


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (_BatchNorm, _NormBase, nn.LayerNorm, nn.GroupNorm))


def _classes(oracle: Oracle) -> int:
    """Number of outputs per example, from the labels or targets."""
    y = oracle.sets["support"][1]
    if y.is_floating_point():
        return int(y[0, 0].numel())
    return int(y.max()) + 1


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _terms(n: int) -> str:
    return "term" if n == 1 else "terms"


def _are(n: int) -> str:
    return "is" if n == 1 else "are"
