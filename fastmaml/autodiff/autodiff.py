"""The autodiff backend: the derivatives of any nn.Module by torch.func, for the adjoint sweep of adjoint_sweep.py.

A Hessian-vector product is the tangent of the gradient (forward-over-reverse), without a graph of a graph.
task_derivatives.py handles tasks and random layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmaml.autodiff.task_derivatives import DOUBLE_BACKWARD, TaskDerivatives
from fastmaml.problem import batch_norm
from fastmaml.problem.examples import Examples
from fastmaml.problem.losses import LossFunction, weighted
from fastmaml.problem.parameters import ParameterLayout
from fastmaml.problem.pytrees import Packing


class Autodiff:
    """adjoint_sweep.Derivatives of one module and loss, with forward and vjp. Parameters are vectors [T, P]."""

    hvp_gives_gradient = True

    def __init__(self, model: nn.Module, layout: ParameterLayout, loss: LossFunction, norm_mode: str):
        self.model = model
        self.layout = layout
        self.loss = loss
        self.norm_mode = norm_mode
        self.inputs: Packing | None = None  # how x packs the model's inputs; None: x is the input
        self.outputs: Packing | None = None  # how one tensor packs the outputs; set by each evaluation
        self._tasks = TaskDerivatives(self._loss)
        self._of_outputs = TaskDerivatives(self._loss_of_output)

    @property
    def note(self) -> str:
        """How the tasks run if vmap cannot, and why. "" with vmap."""
        return self._tasks.note

    def begin(self, seed: int | None = None) -> Autodiff:
        """Starts a call. Its evaluations share one seed for dropout. None: the first random evaluation draws it."""
        self._tasks.begin(seed)
        return self

    # ---- called by the Engine; every argument has the task dimension in front

    def forward(self, params: Tensor, x: Tensor, support_x: Tensor | None = None, step: int = 0) -> Tensor:
        given = (params, x) if support_x is None else (params, x, support_x)
        return self._tasks.over_tasks(lambda style: self._output, step, *given)

    def grad(self, params: Tensor, examples: Examples, step: int = 0) -> tuple[Tensor, Tensor]:
        """(loss [T], grad [T, P])."""
        return self.query(params, examples, step)[:2]

    def query(
        self, params: Tensor, examples: Examples, step: int = 0, support_x: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss [T], grad [T, P], output [T, N, ...])."""
        return self._tasks.grad(step, params, *(examples if support_x is None else (*examples, support_x)))

    def hvp(self, params: Tensor, examples: Examples, v: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
        """(grad [T, P], H v [T, P])."""
        x, y, w = examples.weighted()
        assert w is not None
        return self._tasks.hvp(step, params, v, x, y, w)

    def gauss_newton(self, params: Tensor, examples: Examples, v: Tensor) -> Tensor:
        """J^T L J v [T, P], with L the loss's Hessian by the outputs. All three passes see the same dropout masks."""
        z, z_dot = self._tasks.over_tasks(self._jvp_of_one, 0, params, examples.x, v)
        w = examples.weighted().w
        assert w is not None
        _, dz_dot = self._of_outputs.hvp(0, z, z_dot, examples.y, w)
        return self.vjp(params, examples.x, dz_dot)[1]

    def vjp(self, params: Tensor, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """(output y [T, N, ...], dy^T dy/dparams [T, P])."""
        return self._tasks.over_tasks(lambda style: self._vjp_of_one, 0, params, x, dy)

    # ---- one task

    def _output(self, phi: Tensor, x: Tensor, support_x: Tensor | None = None) -> Tensor:
        # Buffers are constants: a module that updates its buffers updates a copy.
        constants = {
            name: b.to(phi.dtype, copy=True) if b.is_floating_point() else b.clone()
            for name, b in self.model.named_buffers()
        }
        values = {**self.layout.split(phi), **constants}
        if support_x is None:
            with batch_norm.statistics(self.model, self.norm_mode):
                return self._call(values, x)
        rows = support_x.shape[0]
        with batch_norm.statistics(self.model, self.norm_mode, support_rows=rows):
            return self._call(values, torch.cat([support_x, x]))[rows:]

    def _call(self, values: dict[str, Tensor], x: Tensor) -> Tensor:
        inputs = x if self.inputs is None else self.inputs.unpack(x, 1)
        named = inputs if isinstance(inputs, dict) else {}
        listed = () if named else tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivatives
            output = functional_call(self.model, values, listed, named)
        if isinstance(output, Tensor):
            self.outputs = None
            return output
        self.outputs = Packing.of(output, 1)
        return self.outputs.pack(output, 1, x.dtype)

    def _loss(
        self, phi: Tensor, x: Tensor, y: Tensor, w: Tensor, support_x: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        output = self._output(phi, x, support_x)
        return self._loss_of_output(output, y, w)

    def _loss_of_output(self, output: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        seen = output if self.outputs is None else self.outputs.unpack(output, 1)
        return weighted(self.loss, seen, y, w), output

    def _jvp_of_one(self, style: int) -> Callable[..., tuple[Tensor, Tensor]]:
        derivative: Callable[..., Any] = torch.autograd.functional.jvp if style == DOUBLE_BACKWARD else jvp

        def of_one(phi: Tensor, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            with torch.set_grad_enabled(style == DOUBLE_BACKWARD):
                y, y_dot = derivative(lambda point: self._output(point, x), (phi,), (v,))
            return y, y_dot

        return of_one

    def _vjp_of_one(self, phi: Tensor, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        y, pull = vjp(lambda point: self._output(point, x), phi)  # type: ignore[misc]
        return y, pull(dy)[0]
