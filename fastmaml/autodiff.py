"""The autodiff backend: the derivatives of any nn.Module by torch.func, for the adjoint sweep of sweep.py.

A Hessian-vector product is the tangent of the gradient (forward-over-reverse): no graph of a graph. Tasks are vmapped;
a module that vmap refuses (dropout, data-dependent control flow) takes a loop over tasks, and one that forward mode
refuses takes double backward, task by task. What was decided is remembered and written to `note`.

Dropout: a loop over tasks seeds each evaluation by (call, step, task), so a step's Hessian sees the masks of its
gradient. Each call draws its own seed from torch's generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, jvp, vjp, vmap

from fastmaml import batch_norm
from fastmaml.losses import LossFunction
from fastmaml.parameters import ParameterLayout
from fastmaml.sweep import Examples

VMAP, LOOP, DOUBLE_BACKWARD = range(3)
_HOW = {LOOP: "a loop over tasks", DOUBLE_BACKWARD: "double backward in a loop over tasks"}


class Autodiff:
    """forward, grad, query, hvp and vjp of one module and loss; parameters are vectors [T, P] (sweep.Derivatives)."""

    hvp_gives_gradient = True

    def __init__(self, model: nn.Module, layout: ParameterLayout, loss: LossFunction, norm_mode: str):
        self.model = model
        self.layout = layout
        self.loss = loss
        self.norm_mode = norm_mode
        self.note = ""
        self._style = VMAP
        self._seed: int | None = None

    def begin(self, seed: int | None = None) -> Autodiff:
        """Starts a call: the evaluations that follow share one seed for dropout, drawn when it is first needed."""
        self._seed = seed
        return self

    # ---- what the Engine asks for; every argument has the task dimension in front

    def forward(self, params: Tensor, x: Tensor, support_x: Tensor | None = None, step: int = 0) -> Tensor:
        if support_x is None:
            return self._over_tasks(lambda style: self._output, step, params, x)
        return self._over_tasks(lambda style: self._output, step, params, x, support_x)

    def grad(self, params: Tensor, at: Examples, step: int = 0) -> tuple[Tensor, Tensor]:
        """(loss [T], grad [T, P])."""
        return self.query(params, at, step)[:2]

    def query(
        self, params: Tensor, at: Examples, step: int = 0, support_x: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss [T], grad [T, P], output [T, N, ...])."""
        given = (params, *at) if support_x is None else (params, *at, support_x)
        return self._over_tasks(self._grad_of_one, step, *given)

    def hvp(self, params: Tensor, at: Examples, v: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
        """(grad [T, P], H v [T, P]): the primal of forward-over-reverse is the gradient."""
        return self._over_tasks(self._hvp_of_one, step, params, v, *at)

    def vjp(self, params: Tensor, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """(output y [T, N, ...], dy^T dy/dparams [T, P])."""
        return self._over_tasks(lambda style: self._vjp_of_one, 0, params, x, dy)

    # ---- one task

    def _output(self, phi: Tensor, x: Tensor, support_x: Tensor | None = None) -> Tensor:
        # Buffers are constants: a module that updates its own does so on a copy.
        constants = {
            name: b.to(phi.dtype, copy=True) if b.is_floating_point() else b.clone()
            for name, b in self.model.named_buffers()
        }
        values = {**self.layout.split(phi), **constants}
        if support_x is None:
            with batch_norm.statistics(self.model, self.norm_mode):
                return functional_call(self.model, values, (x,))
        rows = support_x.shape[0]
        with batch_norm.statistics(self.model, self.norm_mode, support_rows=rows):
            return functional_call(self.model, values, (torch.cat([support_x, x]),))[rows:]

    def _loss(
        self, phi: Tensor, x: Tensor, y: Tensor, w: Tensor, support_x: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        output = self._output(phi, x, support_x)
        losses = self.loss(output, y)
        if losses.shape != w.shape:
            raise ValueError(
                f"the loss returned {list(losses.shape)} for {w.shape[0]} examples; it must return one loss for each"
            )
        return (losses * w).sum(), output

    def _vjp_of_one(self, phi: Tensor, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        y, pull = vjp(lambda point: self._output(point, x), phi)  # type: ignore[misc]
        return y, pull(dy)[0]

    def _grad_of_one(self, style: int) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        def by_functorch(phi: Tensor, *at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            grad, (loss, output) = grad_and_value(self._loss, has_aux=True)(phi, *at)
            return loss, grad, output.detach()

        def by_backward(phi: Tensor, *at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            with torch.enable_grad():
                phi = phi.detach().requires_grad_()
                loss, output = self._loss(phi, *at)
                (grad,) = torch.autograd.grad(loss, phi, allow_unused=True, materialize_grads=True)
            return loss.detach(), grad, output.detach()

        return by_backward if style == DOUBLE_BACKWARD else by_functorch

    def _hvp_of_one(self, style: int) -> Callable[..., tuple[Tensor, Tensor]]:
        def by_functorch(phi: Tensor, v: Tensor, *at: Tensor) -> tuple[Tensor, Tensor]:
            def grad_at(point: Tensor) -> Tensor:
                return grad_and_value(self._loss, has_aux=True)(point, *at)[0]

            grad, hv = jvp(grad_at, (phi,), (v,))  # type: ignore[misc]
            return grad, hv

        def by_backward(phi: Tensor, v: Tensor, *at: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                phi = phi.detach().requires_grad_()
                loss, _ = self._loss(phi, *at)
                (grad,) = torch.autograd.grad(loss, phi, create_graph=True, allow_unused=True, materialize_grads=True)
                if not grad.requires_grad:  # a loss linear in the parameters
                    return grad.detach(), torch.zeros_like(v)
                (hv,) = torch.autograd.grad(grad, phi, v, allow_unused=True, materialize_grads=True)
            return grad.detach(), hv

        return by_backward if style == DOUBLE_BACKWARD else by_functorch

    # ---- all tasks

    def _over_tasks(self, one: Callable[[int], Callable[..., Any]], step: int, *given: Tensor) -> Any:
        """Runs one(style) on every task, in the first style that the module allows from the one remembered on."""
        for style in range(self._style, DOUBLE_BACKWARD + 1):
            try:
                result = self._run(style, one(style), step, given)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                # Whether the style or the module is at fault shows in the next style; the last one has the final word.
                if style == DOUBLE_BACKWARD:
                    raise
                refusal = str(error).strip().split("\n")[0]
                continue
            if style != self._style:
                self._style = style
                self.note = f"runs as {_HOW[style]} ({refusal})"
            return result

    def _run(self, style: int, one: Callable[..., Any], step: int, given: tuple[Tensor, ...]) -> Any:
        if style == VMAP:
            return vmap(one)(*given)
        if self._seed is None:
            self._seed = int(torch.randint(2**31, (), dtype=torch.int64))
        devices = [given[0].device] if given[0].is_cuda else []
        results = []
        with torch.random.fork_rng(devices):
            for task, of_task in enumerate(zip(*given)):
                torch.manual_seed(hash((self._seed, step, task)))
                results.append(one(*of_task))
        if isinstance(results[0], Tensor):
            return torch.stack([r.detach() for r in results])
        return tuple(torch.stack([r.detach() for r in field]) for field in zip(*results))
