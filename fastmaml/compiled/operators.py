"""The compiled kernels of one Program. Only this file calls torch.ops.fastmaml (csrc/bindings/module.cpp lists them).

Compiled implements adjoint_sweep.Derivatives, so custom update rules run on the compiled kernels too.
`adapt` and `meta_gradient` run a whole inner loop, or a whole sweep, as one fused Schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastmaml.compiled.python_loss import PythonLoss
from fastmaml.network.trace import Program
from fastmaml.problem.examples import Examples, LoopTensors, Rows
from fastmaml.problem.inner_loop import InnerLoop
from fastmaml.problem.parameters import ParameterLayout
from fastmaml.problem.results import MetaGradient, Solution

_NO_PYTHON_LOSS = nullcontext()


class Compiled:
    """One Program on one compiled backend. x [T, N, ...], parameters [P] or [T, P]."""

    hvp_gives_gradient = False

    def __init__(self, program: Program, model: nn.Module, backend: str, memory: str, python_loss: PythonLoss | None):
        self.program, self.model, self.backend, self.memory, self.python_loss = (
            program,
            model,
            backend,
            memory,
            python_loss,
        )

    def forward(self, params: Tensor, x: Tensor, support_x: Tensor | None = None) -> Tensor:
        return self._call("forward", params, x, support_x)[0]

    def grad(self, params: Tensor, examples: Examples, step: int = 0) -> tuple[Tensor, Tensor]:
        with self._loss_of(examples):
            loss, grad = self._call("grad", params, *_contiguous(examples))
        return loss, grad

    def query(
        self, params: Tensor, examples: Examples, step: int = 0, support_x: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss [T], grad [T, P], output [T, N, ...]), by a meta-gradient with zero inner steps."""
        shown = examples.x if support_x is None else support_x
        shown_y = examples.y if support_x is None else examples.y.new_zeros((*shown.shape[:2], *examples.y.shape[2:]))
        rates = params.new_zeros((1, params.shape[-1]))
        loop = "steps=0 per_task=1"
        with self._loss_of(examples, examples):
            given = (
                shown,
                shown_y,
                None,
                *_contiguous(examples),
                None,
                rates,
                loop,
                self.memory,
                None,
                None,
                None,
                None,
            )
            loss, grad, output, *_ = self._call("meta_gradient", params, *given)
        return loss, grad, output

    def hvp(self, params: Tensor, examples: Examples, v: Tensor, step: int = 0) -> tuple[None, Tensor]:
        with self._loss_of(examples):
            return None, self._call("hvp", params, *_contiguous(examples), v.contiguous())[0]

    def plain_hvp(self, params: Tensor, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """H v without weights, for a network without buffers. The caller has checked the tensors."""
        return torch.ops.fastmaml.hvp.default(  # type: ignore[no-any-return]
            self.program.text, self.backend, params, x, y, None, v, params.new_empty(0)
        )

    def linearise(self, params: Tensor, examples: Examples, gauss_newton: bool) -> tuple[Tensor, Tensor, Tensor]:
        """What `curvature` with the same arguments takes, in the backend's own types and layout."""
        with self._loss_of(examples):
            tape, index, tap = self._operator("linearise", gauss_newton, params.contiguous(), *_contiguous(examples))
        return tape, index, tap

    def curvature(
        self, params: Tensor, examples: Examples, gauss_newton: bool, tape: tuple[Tensor, Tensor, Tensor], v: Tensor
    ) -> Tensor:
        with self._loss_of(examples):
            mv: Tensor = self._operator(
                "curvature", gauss_newton, params.contiguous(), *_contiguous(examples), *tape, v.contiguous()
            )
        return mv.to(params.dtype)

    def vjp(self, params: Tensor, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        y, grad = self._call("vjp", params, x, dy)
        return y, grad

    def solve(
        self,
        params: Tensor,
        examples: Examples,
        v: Tensor,
        lam: float,
        steps: int,
        damping: float,
        stop: float,
        mask: Tensor | None,
    ) -> Solution:
        """Conjugate gradients from zero on ((1 + damping) I + H / lam) s = v; mask [P]: 1 where H has rows and columns."""
        with self._loss_of(examples):
            given = (*_contiguous(examples), v.contiguous(), mask, lam, steps, damping, stop)
            solution, history, state = self._call("solve", params, *given)
        iterations, negative = state[:, 3].to(torch.int64), state[:, 4] != 0
        return Solution(solution, history[:, -1], iterations, negative, history)

    def adapt(
        self,
        theta: Tensor,
        support: Examples,
        loop: InnerLoop,
        tensors: LoopTensors,
        state: Tensor | None = None,
        steps_taken: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(adapted parameters [T, P], support losses [T, K], the optimizer's state [T, S P])."""
        theta, rows = _with_first_row(theta, tensors.rows, loop.steps)
        count = theta.new_tensor([float(steps_taken)]) if state is not None else None
        with self._loss_of(support):
            params, losses, after = self._call(
                "adapt",
                theta,
                *support,
                tensors.rates,
                loop.text(),
                rows,
                _scalar(loop, tensors.lam, theta),
                tensors.mask,
                state,
                count,
            )
        return params, losses, after

    def meta_gradient(
        self,
        theta: Tensor,
        support: Examples,
        query: Examples,
        loop: InnerLoop,
        tensors: LoopTensors,
        loss_weights: Tensor | None,
        task_weights: Tensor | None,
    ) -> MetaGradient:
        theta, rows = _with_first_row(theta, tensors.rows, loop.steps)
        with self._loss_of(support, query):
            result = self._call(
                "meta_gradient",
                theta,
                *support,
                *query,
                task_weights,
                tensors.rates,
                loop.text(),
                self.memory,
                loss_weights,
                rows,
                _scalar(loop, tensors.lam, theta),
                tensors.mask,
            )
        loss, grad, output, losses, rate_grad, rows_grad, query_losses, total = result
        rates = rate_grad if loop.rate_grad else None
        of_rows = None if tensors.rows is None else _of_given_rows(grad, rows_grad, tensors.rows, loop)
        of_all = None if total.dim() else total
        return MetaGradient(loss, grad, output, rates, losses, of_rows, query_losses, of_all)

    def plain_meta_gradient(
        self, theta: Sequence[Tensor], batch: Sequence[Tensor], rate: float, loop: str
    ) -> Sequence[Tensor]:
        """The fields of meta_gradient's result for one rate and no options, on CPU tensors.

        theta: [P], or one part per parameter. The caller has checked the tensors.
        """
        return torch.ops.fastmaml.plain_meta_gradient.default(  # type: ignore[no-any-return]
            self.program.text, self.backend, theta, *batch, rate, loop, self.memory
        )

    def _loss_of(self, support: Examples, query: Examples | None = None) -> AbstractContextManager[None]:
        """Within the block, the operators can call the loss written in Python."""
        if self.python_loss is None:
            return _NO_PYTHON_LOSS
        from fastmaml import _C

        return self.python_loss.serving(_C.set_python_loss, support, query)  # type: ignore[attr-defined,unused-ignore]

    def _call(self, op: str, params: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """Calls an operator. The reference backend computes in float64; its results are cast back to params' type."""
        result = self._operator(op, params.contiguous(), *arguments)
        results = (result,) if isinstance(result, Tensor) else result
        return tuple(r.to(params.dtype) for r in results) if self.backend == "reference" else results

    def _operator(self, op: str, *arguments: Any) -> Any:
        """Calls an operator; its results keep the backend's type. The first tensor argument is the parameters."""
        params = next(a for a in arguments if isinstance(a, Tensor))
        given = (*arguments, self.program.gather_buffers(self.model, params))
        if self.backend == "reference":
            given = tuple(g.double() if isinstance(g, Tensor) and g.is_floating_point() else g for g in given)
        return getattr(torch.ops.fastmaml, op).default(self.program.text, self.backend, *given)


def scaled_parts(flat: Tensor, scale: Tensor, layout: ParameterLayout) -> Sequence[Tensor]:
    """flat [P] times scale [] on the CPU, as one new tensor per parameter."""
    return torch.ops.fastmaml.scaled_parts.default(flat, scale, layout.dims)  # type: ignore[no-any-return]


def _contiguous(examples: Examples) -> tuple[Tensor | None, ...]:
    return tuple(None if part is None else part.contiguous() for part in examples)


def _with_first_row(theta: Tensor, rows: Rows | None, steps: int) -> tuple[Tensor, Tensor | None]:
    """(theta with the first step's row written into it, one row per step). Missing rows repeat the last row."""
    if rows is None:
        return theta, None
    first = rows.values[0].expand(*theta.shape[:-1], -1)
    return theta.index_copy(-1, rows.places, first), rows.values[_row_of_step(rows, steps)].contiguous()


def _of_given_rows(grad: Tensor, rows_grad: Tensor, rows: Rows, loop: InnerLoop) -> Tensor:
    """Sums the gradients of the steps' rows into gradients of the given rows: [rows, R] or [T, rows, R]."""
    given = grad.new_zeros((*grad.shape[:-1], *rows.values.shape))
    if loop.steps == 0:  # the operator returns no row gradients
        return given
    return given.index_add(-2, _row_of_step(rows, loop.steps), rows_grad)


def _row_of_step(rows: Rows, steps: int) -> Tensor:
    return torch.arange(steps, device=rows.values.device).clamp(max=len(rows.values) - 1)


def _scalar(loop: InnerLoop, lam: float, like: Tensor) -> Tensor | None:
    return like.new_tensor([lam]) if loop.proximal else None
