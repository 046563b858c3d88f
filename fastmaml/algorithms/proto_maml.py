"""ProtoMAML: MAML whose head starts as the prototype classifier of each task (Triantafillou et al. 2020).

    c_n = mean embedding of the support examples of class n,    W_n = 2 c_n,    b_n = -|c_n|^2          (section 3)

The logits at step 0 are then -|embedding - c_n|^2, up to a constant per example. The meta-gradient goes through the
start too. With (vW, vb) the meta-gradient at the start, dL/dc_n = 2 vW_n - 2 c_n vb_n. The body's gradient follows from
dL/dc_n (ALGORITHMS 2.8).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmaml.algorithms.learner import Batch, Gradients, Learner, LearnerOutput, weights_of_tasks
from fastmaml.autodiff.replayed_dropout import replayed
from fastmaml.engine.engine import Engine
from fastmaml.inner import InnerLr
from fastmaml.problem import checks
from fastmaml.problem.losses import Loss


class Prototypes(NamedTuple):
    """The mean embedding of each class, and the values it was computed from."""

    c: Tensor  # [T, classes, D]
    embeddings: Tensor  # [T, S, D]
    shares: Tensor  # [T, S, classes]: c = shares^T embeddings
    draws: Tensor  # torch's generator state before the embeddings; replays dropout


class ProtoMAML(Learner):
    """MAML on body and head. The prototypes of each task's support set give the start of the head.

        learner = ProtoMAML(model, inner_lr=5.4e-3, inner_steps=6)

    head: the name of the model's last layer, an nn.Linear with a bias. Default: the last module with parameters.
    The head's stored values are not used, and their gradient is zero.
    first_order: drop the Hessian terms of the inner steps, and keep the derivative of the start.
    The other arguments are Learner's.

    Every task needs a support example of each class.
    Raises ValueError for any other kind of head, and if a class has no support example.
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: InnerLr | None = None,
        inner_steps: int = 1,
        loss: Loss = "cross_entropy",
        *,
        head: str | None = None,
        **options: Any,
    ):
        super().__init__(model, inner_lr, inner_steps, loss, **options)
        self.head = _head_of(model, head)
        layout = self.engine.layout
        own = [f"{self.head}.weight", f"{self.head}.bias"]
        rest = [name for name in layout.names if name not in own]
        if len(rest) + len(own) != len(layout.names):
            raise ValueError(
                f"head '{self.head}' shares a parameter with another layer, so it cannot have its own start"
            )
        if not rest:
            raise ValueError(f"the model ({type(model).__name__}) has no parameters but its head's; there is no body")
        # The body shares every parameter, buffer and layer with the model.
        body = _without(model, self.head)
        self._body = Engine(body, "mse", options.get("backend", "auto"), batch_norm=self.engine.batch_norm)
        self._places = layout.positions(own), layout.positions(rest)
        self._fits = False  # whether a first call showed that the head gives the model's output

    def start(self, support_x: Tensor, support_y: Tensor) -> Tensor:
        """theta [T, P] with each task's own head."""
        return self._start(support_x, self._prototypes(support_x, support_y))

    @torch.no_grad()
    def meta_step(self, batch: Batch, task_weights: Tensor | None) -> tuple[LearnerOutput, Gradients]:
        prototypes = self._prototypes(*batch[:2])
        result = self.engine.meta_gradient(
            self._start(batch[0], prototypes),
            batch,
            self.inner_lr,
            task_weights=task_weights,
            options=replace(self.options(), per_task=True),
        )
        v = self.engine.unflatten(result.grad)
        c = prototypes.c
        by_c = 2.0 * v[f"{self.head}.weight"] - 2.0 * c * v[f"{self.head}.bias"].unsqueeze(2)
        with replayed(prototypes.draws):
            _, by_body = self._body.vjp(self._body.flatten(), batch[0], prototypes.shares @ by_c)
        head, body = self._places[0].to(c.device), self._places[1].to(c.device)
        grad = result.grad.index_fill(1, head, 0.0).index_add(1, body, by_body)
        return self.as_output(result._replace(grad=weights_of_tasks(task_weights, grad) @ grad), task_weights)

    def _prototypes(self, x: Tensor, y: Tensor) -> Prototypes:
        layer = self.model.get_submodule(self.head)
        assert isinstance(layer, nn.Linear)
        if not all(p.requires_grad for p in layer.parameters()):
            raise ValueError(f"head '{self.head}' is frozen, but ProtoMAML starts it anew in every task")
        draws = torch.get_rng_state()
        embeddings = self._body.forward(self._body.flatten(), x)
        ways, width = layer.weight.shape
        if embeddings.dim() != 3 or embeddings.shape[2] != width:
            raise ValueError(
                f"the model without its head '{self.head}' returns {checks.shape(embeddings)}, not the "
                f"{width} features [tasks, examples, {width}] that the head takes"
            )
        checks.labels("support_y", y, "support_x", embeddings, ways)
        members = nn.functional.one_hot(y.long(), ways).to(embeddings)
        counts = members.sum(1, keepdim=True)
        if bool((counts == 0).any()):
            task, _, missing = (counts == 0).nonzero()[0].tolist()
            raise ValueError(
                f"task {task} has no support example of class {missing}, one of {ways}: no prototype for it"
            )
        shares = members / counts
        return Prototypes(shares.transpose(1, 2) @ embeddings, embeddings, shares, draws)

    def _start(self, x: Tensor, given: Prototypes) -> Tensor:
        W, b = 2.0 * given.c, -given.c.square().sum(2)
        head = torch.cat([W.flatten(1), b], dim=1)
        theta = self.engine.flatten().expand(len(head), -1).index_copy(1, self._places[0].to(head.device), head)
        if not self._fits:
            with replayed(given.draws):
                output = self.engine.forward(theta, x)
            scores = given.embeddings @ W.transpose(1, 2) + b.unsqueeze(1)
            if output.shape != scores.shape or bool((output - scores).abs().max() > 1e-3 * scores.abs().max()):
                raise ValueError(f"head '{self.head}' must be the model's last layer: its output is not the model's")
            self._fits = True
        return theta


def _head_of(model: nn.Module, head: str | None) -> str:
    """The name of the head. Default: the last module that owns parameters."""
    named = dict(model.named_modules())
    if head is None:
        own = [name for name, module in named.items() if any(True for _ in module.parameters(recurse=False))]
        head = own[-1] if own else ""
    name = head.removesuffix(".*")
    layer = named.get(name)
    if not isinstance(layer, nn.Linear) or layer.bias is None or not name:
        kind = "none" if layer is None else f"a {type(layer).__name__}"
        raise ValueError(f"ProtoMAML needs an nn.Linear with a bias behind a body; the layer named '{name}' is {kind}")
    return name


def _without(model: nn.Module, path: str) -> nn.Module:
    """The model with nn.Identity instead of one layer. Every other layer, parameter and buffer is the same object."""
    own = copy.copy(model)
    own._modules = dict(model._modules)
    first, _, rest = path.partition(".")
    inside = own._modules[first]
    assert inside is not None
    own._modules[first] = _without(inside, rest) if rest else nn.Identity()
    return own
