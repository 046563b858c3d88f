"""The candidate: the meta-loss under check, which fills `.grad`. It runs in float64 if possible."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastmaml.algorithms.learner import Learner
from fastmaml.checking.oracle import dropouts

MetaLoss = Callable[[nn.Module, Any], Any]
Batch = tuple[Any, Tensor, Any, Tensor]  # support_x, support_y, query_x, query_y; x may be a tuple or dict of inputs


class CandidateError(ValueError):
    """An error that the meta-loss itself raised, in one sentence."""


class Outcome(NamedTuple):
    """The result of one call. loss: None if the call returned none. grads: `.grad` of every leaf, None if it got none."""

    loss: float | None
    grads: dict[str, Tensor | None]


class Candidate:
    """A model, its meta-loss as a function without arguments, and the leaves to differentiate by.

    leaves: by their names in the report. Parameters have the model's names, rates are called "inner_lr...".
    Every call starts from the same weights, buffers and training modes. Changes are noted and undone.
    """

    def __init__(
        self, model: nn.Module, leaves: dict[str, Tensor], call: Callable[[], Any], owner: nn.Module | None = None
    ):
        self.model = model
        self.owner = model if owner is None else owner  # the module with all the buffers
        self.leaves = leaves
        self.call = call
        self.changes_weights = False
        self.changed_buffers: dict[str, None] = {}  # their names, in order

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.leaves.values())).dtype

    def run(self) -> Outcome:
        """Calls the meta-loss, and backward() unless the meta-loss did. Leaves no gradients behind.

        Raises CandidateError with the first line of any error in the meta-loss.
        """
        self._forget()
        with self._kept(), torch.enable_grad():
            loss = _scalar(self._called())
            if isinstance(loss, Tensor) and loss.requires_grad and not self._reached():
                try:
                    loss.backward()
                except RuntimeError as error:
                    raise CandidateError(f"backward() of the meta-loss raised: {_first_line(error)}") from error
        grads = {n: None if x.grad is None else x.grad.detach().clone() for n, x in self.leaves.items()}
        self._forget()
        return Outcome(_number(loss), grads)

    def loss(self) -> float | None:
        """The loss alone, at the current leaves."""
        with self._kept(), torch.enable_grad():
            loss = _scalar(self._called())
        self._forget()
        return _number(loss)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        weights = {name: leaf.detach().clone() for name, leaf in self.leaves.items()}
        buffers = {name: b.detach().clone() for name, b in self.owner.named_buffers()}
        modes = [(module, module.training) for module in self.owner.modules()]
        try:
            yield
        finally:
            for name, leaf in self.leaves.items():
                if not torch.equal(leaf.detach(), weights[name]):
                    self.changes_weights = True
                    leaf.data.copy_(weights[name])
            for name, buffer in self.owner.named_buffers():
                if name in buffers and not torch.equal(buffer, buffers[name]):
                    self.changed_buffers[name] = None
                    buffer.data.copy_(buffers[name])
            for module, training in modes:
                module.training = training

    def _called(self) -> Any:
        try:
            return self.call()
        except Exception as error:
            if isinstance(self.owner, Learner) and isinstance(error, (ValueError, TypeError)):
                raise  # the error is fastmaml's own
            raise CandidateError(f"the meta-loss raised {type(error).__name__}: {_first_line(error)}") from error

    def _reached(self) -> bool:
        return any(leaf.grad is not None for leaf in self.leaves.values())

    def _forget(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None


def candidate_of_learner(learner: Learner, batch: Batch) -> Candidate:
    """A learner's copy in float64."""
    own = copy.deepcopy(learner).double()
    batch = in_double(batch)
    leaves: dict[str, Tensor] = {_plain_name(name): p for name, p in own.named_parameters()}
    return Candidate(own.model, leaves, lambda: own(*batch), own)


@contextmanager
def candidate_of_function(
    function: MetaLoss, model: nn.Module, batch: Batch, rates: Mapping[str, Tensor], double: bool = True
) -> Iterator[Candidate]:
    """A hand-written meta-loss. It runs on the model itself, not a copy: the function may refer to its model.

    double: model, rates and batch are float64 within the block. Afterwards weights, gradients, buffers, training modes
    and dropout are restored.
    """
    leaves: dict[str, Tensor] = {**dict(model.named_parameters()), **rates}
    saved = [(leaf, leaf.data, leaf.grad) for leaf in leaves.values()]
    modules = [(module, dict(module._buffers), module.training) for module in model.modules()]
    rates_of_dropout = [(module, key, getattr(module, key)) for _, module, key in dropouts(model)]
    try:
        for leaf, data, _ in saved:
            leaf.grad = None
            leaf.data = data.to(torch.float64 if double else data.dtype, copy=True)
        for module, buffers, _ in modules:
            module._buffers.update({n: None if b is None else _double(b, double).clone() for n, b in buffers.items()})
        given = in_double(batch) if double else batch
        yield Candidate(model, leaves, lambda: function(model, given))
    finally:
        for leaf, data, grad in saved:
            leaf.grad = None
            leaf.data = data
            leaf.grad = grad
        for module, buffers, training in modules:
            module.training = training
            module._buffers.update(buffers)
        for module, key, p in rates_of_dropout:
            setattr(module, key, p)


def rate_leaves(inner_lr: Any) -> dict[str, Tensor]:
    """The rates whose gradient a hand-written loop fills: leaves with requires_grad."""
    named = inner_lr.items() if isinstance(inner_lr, Mapping) else [(None, inner_lr)]
    return {
        "inner_lr" if name is None else f"inner_lr.{name}": rate
        for name, rate in named
        if isinstance(rate, Tensor) and rate.requires_grad and rate.is_leaf
    }


def in_double(batch: Batch) -> Batch:
    """The same batch, of the same type, with its floating point tensors in float64."""
    tensors = [tree_map(_double, part) for part in batch]
    made: Any = getattr(batch, "_make", tuple)  # a named tuple stays one
    return made(tensors)


def _double(x: Tensor, really: bool = True) -> Tensor:
    return x.double() if really and x.is_floating_point() else x


def _plain_name(name: str) -> str:
    """A learner's parameter name as its state_dict has it: model.0.weight -> 0.weight, learned_rate -> inner_lr."""
    head, _, rest = name.partition(".")
    if head == "model":
        return rest
    head = "inner_lr" if head in ("learned_rate", "learned_rates") else head
    return f"{head}.{rest.replace('/', '.')}" if rest else head


def _number(loss: Tensor | float | None) -> float | None:
    return float(loss.detach()) if isinstance(loss, Tensor) else loss


def _scalar(returned: Any) -> Tensor | float | None:
    """The loss that a meta-loss returned: a scalar tensor, a number, something with `.loss`, or None."""
    value = getattr(returned, "loss", returned)
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    if not isinstance(value, Tensor):
        raise ValueError(f"the meta-loss returned {type(value).__name__}; it must return a scalar loss")
    if value.numel() != 1:
        raise ValueError(f"the meta-loss returned a tensor {list(value.shape)}; it must return one scalar loss")
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
