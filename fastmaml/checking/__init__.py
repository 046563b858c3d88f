"""fm.check: is this meta-gradient right? For learners, other libraries and hand-written loops.

print(fm.check(maml, batch))
print(fm.check(my_meta_loss, batch, model=model, loss="mse", inner_lr=0.1, inner_steps=2))
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastmaml.algorithms.learner import Learner
from fastmaml.algorithms.maml import MAML
from fastmaml.checking.candidate import Batch, CandidateError, MetaLoss, candidate_of_function, rate_leaves
from fastmaml.checking.compare import relative
from fastmaml.checking.examination import Examination
from fastmaml.checking.expected import Expected
from fastmaml.checking.learners import check_learner
from fastmaml.checking.oracle import Oracle
from fastmaml.checking.report import Report, Row
from fastmaml.inner import InnerLr, Optimizer, optimizer_of
from fastmaml.problem.checks import shape
from fastmaml.problem.losses import Loss

__all__ = ["Report", "Row", "check"]


def check(
    subject: Learner | nn.Module | MetaLoss,
    batch: Sequence[Any] | None = None,
    *,
    model: nn.Module | None = None,
    loss: Loss | None = None,
    inner_lr: InnerLr | None = None,
    inner_steps: int | None = None,
    inner: Optimizer | None = None,
    first_order: bool | None = None,
    truncate: int | None = None,
    adapted: str | Sequence[str] | None = None,
    batch_norm: str | None = None,
    label_smoothing: float | None = None,
    reduction: str = "mean",
    backend: str | None = None,
    directions: int = 3,
    seed: int = 0,
) -> Report:
    """Compares a meta-gradient with unrolled autograd in float64 and with finite differences. Returns a Report.

    subject: one of three things.
        A learner of fastmaml.
        A model: checks fastmaml's own meta-gradient of this model.
        A function (model, batch) -> scalar loss; give its `model` too. backward() of the loss must fill the .grad of
        model.parameters(); the function may also call backward() itself. It is called several times on `model` in
        float64. Weights, gradients and buffers are restored afterwards.
    batch: (support_x, support_y, query_x, query_y), each [tasks, examples, ...]; x may be a tuple or dict of inputs.
    loss, ..., label_smoothing: the expected meta-gradient, for a model or a function; leave them out for a learner.
        loss: "cross_entropy" (default), "mse" or a function (output, target). inner_steps: default 1. inner_lr, inner,
        first_order, truncate, adapted, batch_norm and label_smoothing: as in fm.MAML. Rates that require a gradient are
        compared too.
    reduction: of the tasks' losses, "mean" or "sum".
    backend: the engine's backend, if subject is a model.
    directions: number of random directions for finite differences, besides one per parameter; 0: no finite differences.

    Raises ValueError or TypeError, in one sentence, if the input does not fit or the function raises.
    """
    data = _checked_batch(batch)
    meant = {
        "loss": loss,
        "inner_lr": inner_lr,
        "inner_steps": inner_steps,
        "inner": inner,
        "first_order": first_order,
        "truncate": truncate,
        "adapted": [adapted] if isinstance(adapted, str) else adapted,
        "batch_norm": batch_norm,
        "label_smoothing": label_smoothing,
    }
    given: dict[str, Any] = {name: value for name, value in meant.items() if value is not None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if model is not None:
            if not callable(subject):
                raise TypeError(f"with model= the first argument is a function, not {type(subject).__name__}")
            expected = _expected(given, reduction).checked(model)
            return _of_function(subject, model, data, expected, directions, seed)
        if not isinstance(subject, nn.Module):
            if callable(subject):
                raise TypeError("a function is called as function(model, batch); give the model with model=")
            raise TypeError(f"subject must be a learner, a module or a function, not {type(subject).__name__}")
        if reduction != "mean":
            raise ValueError("reduction='sum' belongs to a function; fastmaml's own loss is the mean over tasks")
        if not isinstance(subject, Learner):
            subject = MAML(copy.deepcopy(subject).double(), backend=backend or "auto", **given)
        elif given:
            raise TypeError(f"a learner knows what it computes; leave out {', '.join(given)}")
        return check_learner(subject, data, _sizes(data), directions, seed)


def _expected(given: dict[str, Any], reduction: str) -> Expected:
    given = dict(given)
    optimizer = optimizer_of(given.pop("inner_lr", None), given.pop("inner", None))
    loss, steps = given.pop("loss", "cross_entropy"), given.pop("inner_steps", 1)
    return Expected(loss, optimizer, steps, reduction=reduction, **given)


def _of_function(
    function: MetaLoss, model: nn.Module, batch: Batch, expected: Expected, directions: int, seed: int
) -> Report:
    oracle = Oracle(model, expected, batch)
    name = getattr(function, "__name__", type(function).__name__)
    title = f"{name}, compared with {expected.words()} ({_sizes(batch)})"
    rates = rate_leaves(expected.inner.lr)
    with candidate_of_function(function, model, batch, rates) as candidate:
        try:
            return Examination(candidate, oracle, title, directions, seed).report()
        except CandidateError as error:
            refusal = str(error)
    with candidate_of_function(function, model, batch, rates, double=False) as candidate:
        candidate.run()  # a function that fails in float32 too raises here
        tolerance = _float32_tolerance(oracle, Oracle(model, expected, batch, candidate.dtype))
        return Examination(candidate, oracle, title, directions, seed, tolerance, refusal).report()


def _float32_tolerance(double: Oracle, single: Oracle) -> float:
    """Ten times plain torch's own float32 error on this problem, plus 64 rounding errors."""
    exact, rounded = double.answer().total(), single.answer().total()
    lost = relative({name: grad.double() for name, grad in rounded.items()}, exact)
    return 10 * lost + 64 * torch.finfo(torch.float32).eps


def _checked_batch(batch: Any) -> Batch:
    names = ("support_x", "support_y", "query_x", "query_y")
    if batch is None or isinstance(batch, Tensor) or not isinstance(batch, Sequence) or len(batch) != 4:
        raise TypeError(f"batch must be ({', '.join(names)}), each a tensor [tasks, examples, ...]")
    for name, given in zip(names, batch):
        labels = batch[1] if name.startswith("support") else batch[3]
        for part in tree_leaves(given) if name.endswith("x") else [given]:
            if not isinstance(part, Tensor):
                raise TypeError(f"{name} must be a tensor [tasks, examples, ...], not {type(part).__name__}")
            if part.dim() < 2 or 0 in part.shape[:2]:
                raise ValueError(f"{name} {shape(part)} must be [tasks, examples, ...] with at least one of each")
            if isinstance(labels, Tensor) and part.shape[:2] != labels.shape[:2]:
                raise ValueError(
                    f"{name} {shape(part)} and {name[:-1]}y {shape(labels)} hold different numbers of tasks or examples"
                )
    if len(batch[1]) != len(batch[3]):
        raise ValueError(f"support_y {shape(batch[1])} and query_y {shape(batch[3])} hold different numbers of tasks")
    return batch  # type: ignore[return-value]


def _sizes(batch: Batch) -> str:
    tasks, support = batch[1].shape[:2]
    return f"{tasks} {'task' if tasks == 1 else 'tasks'}, {support} support and {batch[3].shape[1]} query examples each"
