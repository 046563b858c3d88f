"""The face that every learner shares: an nn.Module around the user's model whose loss has an exact meta-gradient.

One autograd node computes the meta-gradient during the forward pass and hands it out in backward, so optimizers,
clipping, schedulers and DistributedDataParallel work as with any module.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmaml.batch_norm import settle
from fastmaml.checks import whole_number
from fastmaml.engine import Engine
from fastmaml.losses import Loss
from fastmaml.parameters import InnerLr


class LearnerOutput(NamedTuple):
    """What a learner returns. Only `loss` is differentiable."""

    loss: Tensor  # scalar: the mean of the tasks' query losses, or their sum weighted by task_weights
    task_losses: Tensor  # [T] query losses after adaptation
    query_output: Tensor  # [T, N, ...]
    support_losses: Tensor  # [T, K] before each inner step


class Adapted:
    """Parameters adapted to a batch of tasks: params [T, P], and the support losses [T, K] before each step."""

    def __init__(self, engine: Engine, params: Tensor, losses: Tensor, support_x: Tensor):
        self.engine = engine
        self.params = params
        self.losses = losses
        self._support_x = support_x

    def predict(self, query_x: Tensor) -> Tensor:
        """The adapted networks' outputs [T, N, ...] for query_x [T, N, ...]."""
        return self.engine.forward(self.params, query_x, support_x=self._support_x)

    def module(self, task: int) -> nn.Module:
        """A plain copy of the model with the weights of one task, in eval mode; it predicts what `predict` does.

        Its batch norms use batch statistics ("transductive"), those of the task's support set ("support"), or the
        running ones ("frozen").
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


class Learner(nn.Module):
    """Base of the learners: parameters() are the model's and the learnable rates, state_dict() has the model's own keys.

    inner_lr: a number, a tensor, or a dict by parameter name (Engine.meta_gradient says which shapes). An
    nn.Parameter, alone or in the dict, is learnable: it gets its exact gradient, and the state_dict holds it as
    "inner_lr" or "inner_lr.NAME".
    """

    first_order = False

    def __init__(
        self,
        model: nn.Module,
        inner_lr: InnerLr,
        inner_steps: int = 1,
        loss: Loss = "cross_entropy",
        backend: str = "auto",
        memory: str = "auto",
        batch_norm: str = "transductive",
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        self.engine = Engine(model, loss, backend, memory, batch_norm, label_smoothing)
        self.inner_steps = whole_number("inner_steps", inner_steps, 0)
        self.model = model
        self._keep_rates(inner_lr)
        self.register_state_dict_post_hook(_strip_model_prefix)
        self.register_load_state_dict_pre_hook(_add_model_prefix)

    def _keep_rates(self, inner_lr: InnerLr) -> None:
        """Learnable rates become parameters, a plain tensor a buffer that moves along; the rest stays as it is."""
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
        """The inner learning rates in the form they were given in."""
        if isinstance(self._fixed, dict):
            return {n: self.learned_rates[_key(n)] if r is None else r for n, r in self._fixed.items()}
        if self._fixed is not None:
            return self._fixed
        rate = self.learned_rate if "learned_rate" in self._parameters else self.fixed_rate
        assert isinstance(rate, Tensor)
        return rate

    def learnable_rates(self) -> dict[str | None, nn.Parameter]:
        """The rates that are parameters, by the parameter they drive (None: one rate tensor for all)."""
        rates = self.inner_lr
        named = rates.items() if isinstance(rates, Mapping) else [(None, rates)]
        return {name: rate for name, rate in named if isinstance(rate, nn.Parameter)}

    def forward(
        self,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        task_weights: Tensor | None = None,
    ) -> LearnerOutput:
        """Adapts to each task's support set and judges on its query set.

        support_x [T, S, ...], query_x [T, Q, ...]; labels [T, S] or targets [T, S, *output]. task_weights [T]: loss
        is their weighted sum instead of the mean. Under no_grad or inference_mode no meta-gradient is computed.
        """
        batch = (support_x, support_y, query_x, query_y)
        leaves = [*self.model.parameters(), *self.learnable_rates().values()]
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
            return LearnerOutput(*_MetaGradientNode.apply(self, batch, task_weights, *leaves))
        adapted = self.adapt(support_x, support_y)
        output = adapted.predict(query_x)
        task_losses = self.engine.loss(output, query_y)
        loss = task_losses.mean() if task_weights is None else (task_losses * task_weights).sum()
        return LearnerOutput(loss, task_losses, output, adapted.losses)

    def adapt(self, support_x: Tensor, support_y: Tensor, inner_steps: int | None = None) -> Adapted:
        """Adapts to the support sets [T, S, ...], by default in the learner's own number of inner steps; no graph."""
        steps = self.inner_steps if inner_steps is None else inner_steps
        theta = self.engine.flatten(self.model)
        params, losses = self.engine.adapt_and_losses(theta, support_x, support_y, self.inner_lr, steps)
        return Adapted(self.engine, params, losses, support_x)

    def extra_repr(self) -> str:
        rate = f"inner_lr={self._fixed}, " if isinstance(self._fixed, (int, float)) else ""
        return f"{rate}inner_steps={self.inner_steps}, first_order={self.first_order}, backend={self.engine.backend!r}"


class _MetaGradientNode(torch.autograd.Function):
    """(loss, task_losses, query_output, support_losses) of a learner; backward hands out its meta-gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, learner: Learner, batch: tuple[Tensor, ...], task_weights: Tensor | None, *leaves: Tensor
    ) -> tuple[Tensor, ...]:
        engine, rates = learner.engine, learner.learnable_rates()
        result = engine.meta_gradient(
            engine.flatten(learner.model),
            batch,
            learner.inner_lr,
            learner.inner_steps,
            first_order=learner.first_order,
            task_weights=task_weights,
            inner_lr_grad=any(rate.requires_grad for rate in rates.values()),
        )
        rate_grads: list[Tensor] = []
        if result.inner_lr_grad is not None:
            of = result.inner_lr_grad
            rate_grads = [of if name is None else of[name] for name in rates]
        ctx.split = engine.layout.split
        ctx.rates = len(rates)
        ctx.save_for_backward(result.grad, *rate_grads)
        loss = result.loss.mean() if task_weights is None else result.loss @ task_weights.detach()
        ctx.mark_non_differentiable(result.loss, result.query_output, result.support_losses)
        return loss, result.loss, result.query_output, result.support_losses

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise ValueError(
                "the loss of a learner has no second derivative; call backward() without create_graph=True"
            )
        grad, *rate_grads = ctx.saved_tensors
        grads = [*ctx.split(grad * grad_output).values(), *(g * grad_output for g in rate_grads)]
        grads += [None] * (ctx.rates - len(rate_grads))
        needed = ctx.needs_input_grad[3:]
        return (None, None, None, *(g if need else None for g, need in zip(grads, needed)))


def _key(name: str) -> str:
    return name.replace(".", "/")  # a ParameterDict takes no dots


def _strip_model_prefix(learner: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """model.0.weight -> 0.weight; learned_rate -> inner_lr; learned_rates.0/weight -> inner_lr.0.weight"""
    for key in [k for k in state if k.startswith(prefix)]:
        name = key[len(prefix) :]
        if name.startswith("model."):
            name = name[len("model.") :]
        elif name == "learned_rate":
            name = "inner_lr"
        elif name.startswith("learned_rates."):
            name = "inner_lr." + name[len("learned_rates.") :].replace("/", ".")
        state[prefix + name] = state.pop(key)


def _add_model_prefix(learner: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """The way back of _strip_model_prefix."""
    for key in [k for k in state if k.startswith(prefix)]:
        name = key[len(prefix) :]
        if name == "inner_lr":
            name = "learned_rate"
        elif name.startswith("inner_lr."):
            name = "learned_rates." + _key(name[len("inner_lr.") :])
        else:
            name = "model." + name
        state[prefix + name] = state.pop(key)
