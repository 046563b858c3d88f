"""Inner loops that adapt only a linear head: the features are computed once, and the body is differentiated once.

    z = f W^T + b,   f = body(x)       phi = (W, b) moves;  theta of the body and f stay fixed
    df_query   = dL_query/df at phi[K]
    df_support = sum_k d/df <g_k, y_k>     y_k: the adjoint of the k-th gradient, from the head's own sweep

The body's gradient is then one vector-Jacobian product per set, support and query (ALGORITHMS 2.6).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastmaml.algorithms.learner import weights_of_tasks
from fastmaml.autodiff.update_rules import UpdateRule, rule_for
from fastmaml.engine.engine import Engine
from fastmaml.engine.inputs import Names
from fastmaml.engine.options import MetaGradientOptions
from fastmaml.inner import Optimizer
from fastmaml.problem.inner_rates import expand_rates
from fastmaml.problem.losses import per_example
from fastmaml.problem.results import Adaptation, MetaGradient


class LinearHead:
    """An Engine's network split into body and head. Each has its own Engine over the same modules."""

    def __init__(self, engine: Engine, backend: str):
        *body, head = engine.model.named_children()
        how = (backend, engine.memory, engine.batch_norm)
        self.whole = engine
        precision = engine.precision_in_use
        self.body = Engine(nn.Sequential(OrderedDict(body)), "mse", *how, precision=precision)  # the loss is not used
        self.head = Engine(
            nn.Sequential(OrderedDict([head])), engine.loss_name, *how, engine.label_smoothing, precision=precision
        )
        self.loss = per_example(engine.loss_name, engine.label_smoothing)
        self.body_places = engine.layout.positions(self.body.layout.names)
        self.head_places = engine.layout.positions(self.head.layout.names)

    @staticmethod
    def splits(engine: Engine, adapted: Sequence[str]) -> bool:
        """Whether the network is an nn.Sequential that ends in a linear layer, and `adapted` names exactly that layer.

        The network must be fused: its features are computed twice, so random layers would differ.
        batch_norm="support" does not split, because the query set uses the support set's statistics.
        """
        model = engine.model
        if type(model) is not nn.Sequential or not engine.fused or engine.batch_norm == "support":
            return False
        children = list(model.named_children())
        if len(children) != len(model) or type(children[-1][1]) is not nn.Linear:
            return False
        name, head = children[-1]
        own = {f"{name}.{n}" for n, _ in head.named_parameters()}
        return set(adapted) == own and len(own) < len(engine.layout.names)

    @staticmethod
    def takes(inner: Optimizer) -> bool:
        """Whether the rates split by parameter. One rate vector [P] over all parameters does not."""
        return not isinstance(inner.lr, Tensor) or inner.lr.numel() == 1 or inner.lr.shape[-1] == 1

    def adapt(self, x: Tensor, y: Tensor, inner: Optimizer, inner_steps: int) -> Adaptation:
        """Engine.adapt_with on the head. The result holds the parameters [T, P] of the whole network."""
        theta = self.whole.flatten()
        self._check("support", x, y, theta)
        features = self.body.forward(theta[self.body_places], x)
        done = self.head.adapt_with(
            theta[self.head_places], features, y, inner=self._of_head(inner), inner_steps=inner_steps
        )
        params = theta.repeat(len(features), 1).index_copy(1, self.head_places, done.params)
        return done._replace(params=params)

    def meta_gradient(
        self,
        batch: Sequence[Tensor],
        inner: Optimizer,
        options: MetaGradientOptions,
        task_weights: Tensor | None,
    ) -> MetaGradient:
        """Engine.meta_gradient of the whole network, with the head as the adapted parameters."""
        support_x, support_y, query_x, query_y = batch
        theta = self.whole.flatten()
        self._check("support", support_x, support_y, theta)
        self._check("query", query_x, query_y, theta, support_x)
        of_body, of_head = theta[self.body_places], theta[self.head_places]
        support, query = self.body.forward(of_body, support_x), self.body.forward(of_body, query_x)
        own = self._of_head(inner)
        mask = self.head.layout.trainable(self.head.parameters.named().values(), of_head)
        steps = _Recorded(
            rule_for(own, expand_rates(own.lr, self.head.layout, mask, of_head, options.inner_steps), mask)
        )
        result = self.head.meta_gradient(
            of_head,
            (support, support_y, query, query_y),
            own.lr,
            task_weights=task_weights,
            options=replace(options, inner=own.without_rates, adapted=None),
            rule=steps,
        )
        weights = weights_of_tasks(task_weights, support)
        last = of_head.expand(len(support), -1) if steps.last is None else steps.last
        by_query = self._by_features(query, query_y, last)
        grad = torch.zeros_like(theta)
        grad[self.head_places] = result.grad
        grad[self.body_places] = self._by_body(of_body, query_x, by_query, weights)
        if steps.adjoints and options.order != 0:
            points, adjoints = (torch.stack(of_steps) for of_steps in zip(*steps.adjoints))  # [K, T, P]
            by_support = self._by_features(support, support_y, points, adjoints)
            grad[self.body_places] += self._by_body(of_body, support_x, by_support, weights)
        rate_grad = result.inner_lr_grad
        if isinstance(inner.lr, Mapping) and rate_grad is not None:
            zeros = {n: torch.zeros_like(r) for n, r in inner.lr.items() if isinstance(r, Tensor)}
            rate_grad = zeros | rate_grad
        return result._replace(grad=grad, inner_lr_grad=rate_grad)

    def _of_head(self, inner: Optimizer) -> Optimizer:
        rates: Any = inner.lr
        if not isinstance(rates, Mapping):
            return inner
        return replace(inner, lr={name: rates[name] for name in self.head.layout.names if name in rates})

    def _check(self, which: str, x: Tensor, y: Tensor, theta: Tensor, support_x: Tensor | None = None) -> None:
        """Raises the whole network's errors. Their sentences show the shapes of the examples, not of the features."""
        names = Names(f"{which}_x", f"{which}_y")
        self.whole.inputs.examples(names, x, y, None, theta, support_x)

    def _by_features(self, features: Tensor, y: Tensor, phi: Tensor, direction: Tensor | None = None) -> Tensor:
        """The gradient of the mean loss at phi [T, P], by the features [T, N, D].

        With phi and direction [K, T, P]: the gradient of <the loss's gradient by phi, direction>, summed over K.
        """
        weight, bias = self._weight_and_bias(phi)
        z = (features @ weight.mT + bias).requires_grad_()  # [T, N, C] or [K, T, N, C]
        targets = y.expand(*z.shape[:-3], *y.shape)
        with torch.enable_grad():
            loss = self.loss(z.flatten(0, -2), targets.flatten(0, z.dim() - 2)).sum() / features.shape[1]
            (dz,) = torch.autograd.grad(loss, z, create_graph=direction is not None)
        if direction is None:
            return dz @ weight
        weight_dot, bias_dot = self._weight_and_bias(direction)
        (dz_dot,) = torch.autograd.grad(dz, z, features @ weight_dot.mT + bias_dot)
        return (dz_dot @ weight + dz.detach() @ weight_dot).flatten(0, -4).sum(0)

    def _weight_and_bias(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        weight, *bias = self.head.layout.split(phi).values()  # [.., C, D], [.., C]
        return weight, bias[0][..., None, :] if bias else weight.new_zeros(1)

    def _by_body(self, of_body: Tensor, x: Tensor, by_features: Tensor, weights: Tensor) -> Tensor:
        return self.body.vjp(of_body, x, weights[:, None, None] * by_features)[1].sum(0)


class _Recorded:
    """An update rule that records phi[K], and (phi[k], the adjoint of the gradient) for every step of the sweep."""

    def __init__(self, rule: UpdateRule):
        self.rule = rule
        self.needs_gradient = rule.needs_gradient
        self.last: Tensor | None = None
        self.adjoints: list[tuple[Tensor, Tensor]] = []

    def update(self, k: int, phi: Tensor, g: Tensor) -> Tensor:
        self.last = self.rule.update(k, phi, g)
        return self.last

    def adjoint(self, k: int, v: Tensor, phi: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
        v, y = self.rule.adjoint(k, v, phi, g)
        self.adjoints.append((phi, y))
        return v, y

    def rate_grad(self, k: int, v: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        return self.rule.rate_grad(k, v, phi, g)
