"""learn2learn's MAML and MetaSGD wrappers. Change one import, and existing loops run on with the same numbers.

from fastmaml.compat import learn2learn as l2l

maml = l2l.algorithms.MAML(model, lr=0.5)
learner = maml.clone()
learner.adapt(loss(learner(support_x), support_y))
loss(learner(query_x), query_y).backward()          # fills the .grad of maml.parameters()

This is plain autograd, one task at a time. `fastmaml.MAML(model, inner_lr=0.5)(*batch)` is faster; a log line says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

logger = logging.getLogger("fastmaml")

Module = TypeVar("Module", bound=nn.Module)


def clone_module(module: Module) -> Module:
    """A copy whose parameters are clones in the graph of the originals: its loss fills the originals' .grad.

    Buffers are shared, so every copy updates the running statistics; buffers with a graph are cloned. Tied parameters
    and shared modules stay tied and shared.
    """
    clones: dict[int, Tensor] = {}

    def of_parameter(p: Tensor) -> Tensor:
        if id(p) not in clones:
            clones[id(p)] = p.clone()
        return clones[id(p)]

    return _copied(module, of_parameter, {})


def _copied(module: Module, of_parameter: Callable[[Tensor], Tensor], seen: dict[int, nn.Module]) -> Module:
    if id(module) in seen:
        return seen[id(module)]  # type: ignore[return-value]
    new = object.__new__(type(module))
    seen[id(module)] = new
    new.__dict__.update(module.__dict__)
    parts: dict[str, dict[str, Any]] = {
        "_parameters": {n: None if p is None else of_parameter(p) for n, p in module._parameters.items()},
        "_buffers": {n: b.clone() if b is not None and b.requires_grad else b for n, b in module._buffers.items()},
        "_modules": {n: None if m is None else _copied(m, of_parameter, seen) for n, m in module._modules.items()},
    }
    new.__dict__.update(parts)
    _gather_weights(new)
    return new


def _moved(module: nn.Module, values: dict[int, Tensor]) -> None:
    """Replaces parameters by new tensors. values: by the id of the old parameter."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None and id(p) in values:
                part._parameters[name] = values[id(p)]  # type: ignore[assignment]
        _gather_weights(part)


def _gather_weights(module: nn.Module) -> None:
    """Updates the list of weights that recurrent layers keep besides their parameters."""
    if isinstance(module, nn.RNNBase):
        module.__dict__["_flat_weights"] = [module._parameters.get(name) for name in module._flat_weights_names]


class _Wrapper(nn.Module):
    """A module with an inner step. Unknown attributes come from the module."""

    module: nn.Module
    first_order: bool

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def _step(
        self, loss: Tensor, rates: Iterable[Any], first_order: bool, allow_unused: bool, allow_nograd: bool
    ) -> None:
        """p <- p - rate * dloss/dp for every parameter, in the graph."""
        params = dict(self.module.named_parameters())
        frozen = [name for name, p in params.items() if not p.requires_grad]
        if frozen and not allow_nograd:
            raise ValueError(f"parameter '{frozen[0]}' has requires_grad=False; leave it out with allow_nograd=True")
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise ValueError("the loss does not depend on the learner's parameters: it carries no graph")
        second_order = not first_order
        leaves = [p for p in params.values() if p.requires_grad]
        grads = torch.autograd.grad(
            loss, leaves, retain_graph=second_order, create_graph=second_order, allow_unused=True
        )
        by_id = {id(p): grad for p, grad in zip(leaves, grads)}
        unused = [name for name, p in params.items() if p.requires_grad and by_id[id(p)] is None]
        if unused and not allow_unused:
            raise ValueError(f"the loss does not depend on parameter '{unused[0]}'; allow that with allow_unused=True")
        moved = {}
        for p, rate in zip(params.values(), rates):
            grad = by_id.get(id(p))
            if grad is not None:
                moved[id(p)] = p - rate * grad
        _moved(self.module, moved)


class MAML(_Wrapper):
    """learn2learn.algorithms.MAML: clone() a learner for a task, adapt(loss) it, differentiate its query loss.

    lr: the inner learning rate. first_order: gradients without create_graph. allow_unused: keep parameters that the loss
    does not use (default: allow_nograd). allow_nograd: keep parameters with requires_grad=False.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
    ):
        super().__init__()
        self.module = model
        self.lr = lr
        self.first_order = first_order
        self.allow_nograd = allow_nograd
        self.allow_unused = allow_nograd if allow_unused is None else allow_unused
        _advise(f"MAML(model, inner_lr={_number(lr)}, inner_steps=...)")

    def clone(
        self, first_order: bool | None = None, allow_unused: bool | None = None, allow_nograd: bool | None = None
    ) -> MAML:
        """A learner for one task, whose loss fills the .grad of this learner's parameters. None: this learner's setting."""
        return MAML(
            clone_module(self.module),
            self.lr,
            self.first_order if first_order is None else first_order,
            self.allow_unused if allow_unused is None else allow_unused,
            self.allow_nograd if allow_nograd is None else allow_nograd,
        )

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> None:
        """One inner step: p <- p - lr * dloss/dp.

        Raises ValueError for a loss without a graph, and for unused or frozen parameters that are not allowed.
        """
        rates = [self.lr for _ in self.module.parameters()]
        self._step(
            loss,
            rates,
            self.first_order if first_order is None else first_order,
            self.allow_unused if allow_unused is None else allow_unused,
            self.allow_nograd if allow_nograd is None else allow_nograd,
        )


class MetaSGD(_Wrapper):
    """learn2learn.algorithms.MetaSGD: MAML with a learned rate for every entry. All rates start at lr.

    lrs: the initial rates instead, a tensor per parameter in the order of model.parameters().
    """

    def __init__(
        self, model: nn.Module, lr: float = 1.0, first_order: bool = False, lrs: Sequence[Tensor] | None = None
    ):
        super().__init__()
        self.module = model
        own = nn.ParameterList(
            [nn.Parameter(torch.full_like(p, lr)) for p in model.parameters()] if lrs is None else []
        )
        self.lrs: Iterable[Tensor] = own if lrs is None else lrs
        self.first_order = first_order
        _advise(f"MetaSGD(model, inner_lr={_number(lr)}, inner_steps=...)")

    def clone(self) -> MetaSGD:
        """A learner for one task, whose loss fills the .grad of this learner's parameters and rates."""
        return MetaSGD(clone_module(self.module), first_order=self.first_order, lrs=[rate.clone() for rate in self.lrs])

    def adapt(self, loss: Tensor, first_order: bool | None = None) -> None:
        """One inner step: p <- p - lrs * dloss/dp. Raises ValueError as MAML.adapt."""
        self._step(loss, self.lrs, self.first_order if first_order is None else first_order, False, False)


algorithms = SimpleNamespace(MAML=MAML, MetaSGD=MetaSGD)

_advised = False


def _advise(call: str) -> None:
    """Logs the faster call, once per process."""
    global _advised
    if not _advised:
        logger.warning(
            "fastmaml.compat.learn2learn runs the inner loop task by task in plain autograd. fastmaml.%s called with "
            "(support_x, support_y, query_x, query_y) of all tasks gives the same meta-gradient much faster.",
            call,
        )
    _advised = True


def _number(lr: Any) -> str:
    return f"{lr:g}" if isinstance(lr, (int, float)) else "..."
