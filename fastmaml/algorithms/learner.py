"""The base of every learner: an nn.Module around the user's model whose loss has an exact meta-gradient.

One autograd node computes the meta-gradient during the forward pass and returns it in backward. Optimizers, clipping,
schedulers and DistributedDataParallel then work as with any module.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmaml.engine.engine import Engine
from fastmaml.engine.options import MetaGradientOptions
from fastmaml.inner import InnerLr, Optimizer, optimizer_of
from fastmaml.problem.batch_norm import settle
from fastmaml.problem.checks import whole_number
from fastmaml.problem.losses import Loss
from fastmaml.problem.named_parameters import NamedParameters
from fastmaml.problem.results import MetaGradient

_requires_grad = attrgetter("requires_grad")

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # support_x, support_y, query_x, query_y


class LearnerOutput(NamedTuple):
    """The result of a learner's forward. Only `loss` is differentiable."""

    loss: Tensor  # scalar: the mean of the tasks' query losses, or their sum weighted by task_weights
    task_losses: Tensor  # [T] query losses after adaptation
    query_output: Tensor  # [T, N, ...]
    support_losses: Tensor  # [T, K] before each inner step


class Adapted:
    """Parameters adapted to a batch of tasks.

    params [T, P]; losses [T, K], the support losses before each inner step.
    Call `predict` for outputs on query examples, or `module` for one task as a plain nn.Module.
    """

    def __init__(self, engine: Engine, params: Tensor, losses: Tensor, support_x: Tensor):
        self.engine = engine
        self.params = params
        self.losses = losses
        self._support_x = support_x

    def predict(self, query_x: Tensor) -> Tensor:
        """The adapted networks' outputs [T, N, ...] for query_x [T, N, ...]."""
        return self.engine.forward(self.params, query_x, support_x=self._support_x)

    def module(self, task: int) -> nn.Module:
        """A plain copy of the model with the weights of one task, in eval mode. Its outputs equal those of `predict`.

        Its batch norms follow the engine's batch_norm. "transductive" uses batch statistics, "support" the statistics
        of the task's support set, "frozen" the running statistics. Raises ValueError for a task out of range.
        """
        tasks = self.params.shape[0]
        if not -tasks <= task < tasks:
            raise ValueError(f"task {task} is not one of the {tasks} adapted tasks")
        own = copy.deepcopy(self.engine.model)
        weights = self.engine.unflatten(self.params[task])
        with torch.no_grad():
            for name, parameter in own.named_parameters():
                parameter.grad = None
                parameter.copy_(weights[name])
        settle(own, self.engine.batch_norm, self._support_x[task])
        return own


# The gradients of a loss by its leaves. MODEL holds the gradient by all parameters of the model, as one vector [P]. The
# other keys are leaf names; a missing key means a zero gradient.
Gradients = dict[str, Tensor]
MODEL = "model"


class Learner(nn.Module):
    """Base of the learners. parameters() holds the model's parameters and everything else that is learned.

        learner = fm.MAML(model, inner_lr=0.4, inner_steps=1)
        learner(*batch).loss.backward()      # fills .grad with the exact meta-gradient

    inner_lr: a number, a tensor, or a dict by parameter name; Engine.meta_gradient lists the shapes.
    inner: an optimizer of fm.inner, instead of inner_lr.
    inner_steps: K, the number of inner steps.
    first_order: drop the Hessian terms of every inner step.
    truncate=J: keep the Hessian terms of the last J steps only.
    adapted: name patterns of the parameters that the inner loop moves ("head.*"). The others are meta-trained too.
    loss, backend, memory, batch_norm, label_smoothing, precision: as in Engine.

    Learned rates: an nn.Parameter as a rate, alone or in the dict, gets its exact gradient. The state_dict holds this
    rate as "inner_lr" or "inner_lr.NAME".

    state_dict() keeps the model's own keys. Parameters and buffers that a learner adds keep their names there.
    A ParameterDict's keys cannot hold dots, so "/" stands for "." in them.

    To write a learner, override `options` and `call_tensors`. Override `meta_step` if the gradient is no plain sweep.
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: InnerLr | None = None,
        inner_steps: int = 1,
        loss: Loss = "cross_entropy",
        first_order: bool = False,
        backend: str = "auto",
        memory: str = "auto",
        batch_norm: str = "transductive",
        label_smoothing: float = 0.0,
        *,
        inner: Optimizer | None = None,
        truncate: int | None = None,
        adapted: str | Sequence[str] | None = None,
        precision: str = "float32",
    ):
        super().__init__()
        self._all_parameters = NamedParameters(self)
        self.engine = Engine(model, loss, backend, memory, batch_norm, label_smoothing, precision)
        self.inner_steps = whole_number("inner_steps", inner_steps, 0)
        self.model = model
        self._named_leaves: tuple[Any, tuple[str, ...]] = (None, ())
        self._options: tuple[Any, Any] = (None, None)
        optimizer = optimizer_of(inner_lr, inner)
        self._optimizer = self._with_number = replace(optimizer, lr=0.0)  # the module holds the rates
        self._keep_rates(optimizer.lr)
        self.first_order = bool(first_order)
        self.truncate = None if truncate is None else whole_number("truncate", truncate, 0)
        self.adapted = [adapted] if isinstance(adapted, str) else None if adapted is None else list(adapted)
        if self.adapted is not None:
            self.engine.layout.matching(self.adapted, torch.empty(0))  # refuses a pattern that fits nothing
        self.register_state_dict_post_hook(_strip_model_prefix)
        self.register_load_state_dict_pre_hook(_add_model_prefix)

    @property
    def device(self) -> torch.device:
        """The device of the parameters. Batches must be on this device too."""
        return next(self.parameters()).device

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The parameters, as in any nn.Module.

        The list is kept until a module changes, because zero_grad and clipping read it at every step.
        """
        if recurse and self._all_parameters.model is self:  # a shallow copy still holds the original's list
            return iter(self._all_parameters.named().values())
        return super().parameters(recurse)

    # ---------------------------------------------------------------- what a trainer calls

    def at_step(self, step: int) -> None:
        """Called before every outer step, counted from 0. Override it if the loss changes during training."""

    def outer_optimizer(self, lr: float) -> torch.optim.Optimizer:
        """The published outer optimizer over the trainable parameters. Default: Adam."""
        # foreach=True starts threads for every small tensor. On a busy machine they cost more than the meta-gradient.
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=lr, foreach=False)

    # ---------------------------------------------------------------- rates

    def _keep_rates(self, inner_lr: InnerLr) -> None:
        """Stores the rates: an nn.Parameter as a parameter, a plain tensor as a buffer that follows .to(), the rest as given."""
        self._fixed: Any = None
        if isinstance(inner_lr, Mapping):
            self._fixed = {n: None if isinstance(r, nn.Parameter) else r for n, r in inner_lr.items()}
            self.learned_rates = nn.ParameterDict({_key(n): inner_lr[n] for n, r in self._fixed.items() if r is None})
        elif isinstance(inner_lr, nn.Parameter):
            self.learned_rate = inner_lr
        elif isinstance(inner_lr, Tensor):
            self.register_buffer("fixed_rate", inner_lr.detach().clone(), persistent=False)
        else:
            self._fixed = inner_lr

    @property
    def inner_lr(self) -> InnerLr:
        """The inner learning rates, in the form you gave them."""
        if isinstance(self._fixed, dict):
            return {n: self.learned_rates[_key(n)] if r is None else r for n, r in self._fixed.items()}
        if self._fixed is not None:
            return self._fixed
        rate = self.learned_rate if "learned_rate" in self._parameters else self.fixed_rate
        assert isinstance(rate, Tensor)
        return rate

    @property
    def inner(self) -> Optimizer:
        """The inner optimizer with its rates."""
        rates = self.inner_lr
        if not isinstance(rates, (int, float)):
            return replace(self._optimizer, lr=rates)
        if self._with_number.lr is not rates:
            self._with_number = replace(self._optimizer, lr=rates)
        return self._with_number

    def learnable_rates(self) -> dict[str | None, nn.Parameter]:
        """The learnable rates, by the name of the parameter they scale. Key None: one rate tensor for all."""
        if isinstance(self._fixed, (int, float)):
            return {}
        rates = self.inner_lr
        named = rates.items() if isinstance(rates, Mapping) else [(None, rates)]
        return {name: rate for name, rate in named if isinstance(rate, nn.Parameter)}

    # ---------------------------------------------------------------- one outer step

    def forward(
        self,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        task_weights: Tensor | None = None,
    ) -> LearnerOutput:
        """Adapts to each task's support set and computes the loss on its query set.

        support_x [T, S, ...], query_x [T, Q, ...].
        support_y, query_y: labels [T, S] and [T, Q], or targets [T, S, *output] and [T, Q, *output].
        task_weights [T]: the loss is the weighted sum of the tasks' losses instead of their mean.
        Under no_grad or inference_mode no meta-gradient is computed.
        """
        batch = (support_x, support_y, query_x, query_y)
        if type(self).meta_step is not Learner.meta_step:  # so that errors name the parts of the batch
            self.engine.check_batch(batch)
        with self.engine.parameters:
            leaves = self.leaves()
            if torch.is_grad_enabled() and any(map(_requires_grad, leaves.values())):
                output, grads = self.meta_step(batch, task_weights)
                loss = _MetaGradientNode.apply(output.loss, grads, self.engine, tuple(leaves), *leaves.values())
                return LearnerOutput(loss, output.task_losses, output.query_output, output.support_losses)
        adapted = self.adapt(support_x, support_y)
        query_output = adapted.predict(query_x)
        task_losses = self.engine.loss(query_output, query_y)
        return LearnerOutput(weighted(task_losses, task_weights), task_losses, query_output, adapted.losses)

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that get a gradient: the model's parameters ("model.NAME"), then the learnable rates ("rate.NAME")."""
        named = self._model_parameters()
        leaves: dict[str, Tensor] = dict(zip(self._leaf_names(named), named.values()))
        for name, rate in self.learnable_rates().items():
            leaves[_rate_leaf(name)] = rate
        return leaves

    def _leaf_names(self, named: Mapping[str, nn.Parameter]) -> tuple[str, ...]:
        if self._named_leaves[0] is not named:
            self._named_leaves = named, tuple(f"{MODEL}.{name}" for name in named)
        return self._named_leaves[1]

    def start(self, support_x: Tensor, support_y: Tensor) -> Tensor:
        """The start of the inner loop: theta [P]. A start per task [T, P] needs an override of meta_step."""
        return self.engine.layout.flatten(self._model_parameters())

    def _model_parameters(self) -> Mapping[str, nn.Parameter]:
        model = self._modules["model"]
        if model is self.engine.model:
            return self.engine.parameters.named()
        assert model is not None
        return dict(model.named_parameters())  # somebody assigned another model of the same layout

    def options(self) -> MetaGradientOptions:
        """The settings of this algorithm's meta-gradient, for Engine.meta_gradient and adapt_with."""
        by_rates = any(map(_requires_grad, self.learnable_rates().values()))
        adapted = None if self.adapted is None else tuple(self.adapted)
        settings = self.inner_steps, self.first_order, self.truncate, self._optimizer, by_rates, None, adapted
        if self._options[0] != settings:
            self._options = settings, MetaGradientOptions(*settings)
        return self._options[1]

    def call_tensors(self) -> dict[str, Any]:
        """This algorithm's keywords for Engine.meta_gradient besides the settings: loss_weights, step_rows, rule."""
        return {}

    def meta_step(self, batch: Batch, task_weights: Tensor | None) -> tuple[LearnerOutput, Gradients]:
        """(the output for a batch, the gradients of the loss by the leaves)."""
        own_start = type(self).start is not Learner.start
        theta = self.start(*batch[:2]) if own_start else self._model_parameters()
        result = self.engine.meta_gradient(
            theta, batch, self.inner_lr, task_weights=task_weights, options=self.options(), **self.call_tensors()
        )
        return self.as_output(result, task_weights)

    def as_output(self, result: MetaGradient, task_weights: Tensor | None) -> tuple[LearnerOutput, Gradients]:
        """(the learner's output, the gradients by the leaves, learnable rates included) from the engine's result."""
        grads = {MODEL: result.grad}
        rate_grad = result.inner_lr_grad
        if rate_grad is not None:
            named = rate_grad if isinstance(rate_grad, Mapping) else {None: rate_grad}
            grads |= {_rate_leaf(name): named[name] for name in self.learnable_rates()}
        loss = weighted(result.loss, task_weights) if result.total_loss is None else result.total_loss
        return LearnerOutput(loss, result.loss, result.query_output, result.support_losses), grads

    def adapt(self, support_x: Tensor, support_y: Tensor, inner_steps: int | None = None) -> Adapted:
        """Adapts to the support sets [T, S, ...]. The result has no autograd graph.

        inner_steps: default is the learner's own number of inner steps.
        """
        steps = self.inner_steps if inner_steps is None else inner_steps
        theta = self.start(support_x, support_y)
        options = replace(self.options(), inner_steps=steps)
        rows = self.call_tensors().get("step_rows")
        result = self.engine.adapt_with(theta, support_x, support_y, self.inner_lr, options=options, step_rows=rows)
        return Adapted(self.engine, result.params, result.losses, support_x)

    def extra_repr(self) -> str:
        rate = f"inner_lr={self._fixed}, " if isinstance(self._fixed, (int, float)) else ""
        return f"{rate}inner_steps={self.inner_steps}, first_order={self.first_order}, backend={self.engine.backend!r}"


def weighted(task_losses: Tensor, task_weights: Tensor | None) -> Tensor:
    """The mean over tasks, or their weighted sum."""
    return task_losses.mean() if task_weights is None else (task_losses * task_weights.detach()).sum()


def weights_of_tasks(task_weights: Tensor | None, like: Tensor) -> Tensor:
    """task_weights [T] without a graph. Default: 1/T for each task of `like` [T, ...]."""
    return like.new_full((len(like),), 1.0 / len(like)) if task_weights is None else task_weights.detach()


class _MetaGradientNode(torch.autograd.Function):
    """The loss of an outer step. forward receives the gradient with the loss; backward returns this gradient."""

    @classmethod
    def apply(cls, *given: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError("torch.func cannot differentiate a learner; call backward() on its loss")
        # Function.apply searches every argument for torch.func wrappers, which takes as long as all other work here.
        return super(torch.autograd.Function, cls).apply(*given)  # type: ignore[misc]

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, loss: Tensor, grads: Gradients, engine: Engine, names: tuple[str, ...], *leaves: Tensor
    ) -> Tensor:
        more = []
        for name, leaf in zip(names[len(engine.layout.names) :], leaves[len(engine.layout.names) :]):
            more.append(grads[name] if name in grads else torch.zeros_like(leaf))
        ctx.save_for_backward(grads[MODEL], *more)
        ctx.engine = engine
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise ValueError(
                "the loss of a learner has no second derivative; call backward() without create_graph=True"
            )
        flat, *more = ctx.saved_tensors
        grads = [*ctx.engine.scaled_parts(flat, grad_output), *(grad * grad_output for grad in more)]
        needed = ctx.needs_input_grad[4:]
        if not all(needed):
            grads = [grad if need else None for grad, need in zip(grads, needed)]
        return (None, None, None, None, *grads)


def _rate_leaf(name: str | None) -> str:
    return "rate" if name is None else f"rate.{name}"


def _key(name: str) -> str:
    return name.replace(".", "/")  # a ParameterDict takes no dots


def _strip_model_prefix(learner: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """model.0.weight -> 0.weight; learned_rate -> inner_lr; learned_rates.0/weight -> inner_lr.0.weight"""
    for key in [k for k in state if k.startswith(prefix)]:
        head, _, rest = key[len(prefix) :].partition(".")
        if head == "model":
            name = rest
        else:
            head = "inner_lr" if head in ("learned_rate", "learned_rates") else head
            name = f"{head}.{rest.replace('/', '.')}" if rest else head
        state[prefix + name] = state.pop(key)


def _add_model_prefix(learner: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """The inverse of _strip_model_prefix. A key that is not the learner's own belongs to the model."""
    own = {*learner._parameters, *learner._buffers, *learner._modules} - {"model"} | {"learned_rate", "learned_rates"}
    for key in [k for k in state if k.startswith(prefix)]:
        name = key[len(prefix) :]
        head, _, inner = name.partition(".")
        if head == "inner_lr":
            head = "learned_rates" if inner else "learned_rate"
        if head not in own:
            name = f"model.{name}"
        elif inner and isinstance(getattr(learner, head, None), nn.ParameterDict):
            name = f"{head}.{_key(inner)}"
        else:
            name = f"{head}.{inner}" if inner else head
        state[prefix + name] = state.pop(key)
