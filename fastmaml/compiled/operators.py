"""The compiled kernels of one Program: the only file that calls torch.ops.fastmaml (csrc/bindings/module.cpp lists them).

Its derivatives have autodiff's face (sweep.Derivatives), so an update rule that is not compiled runs on them too;
`adapt` and `meta_gradient` are whole inner loops, and whole sweeps, as one fused Schedule.
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

    def grad(self, params: Tensor, at: Examples, step: int = 0) -> tuple[Tensor, Tensor]:
        with self._loss_of(at):
            loss, grad = self._call("grad", params, *_contiguous(at))
        return loss, grad

    def query(
        self, params: Tensor, at: Examples, step: int = 0, support_x: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss [T], grad [T, P], output [T, N, ...]): the meta-gradient of no steps at all."""
        shown = at.x if support_x is None else support_x
        shown_y = at.y if support_x is None else at.y.new_zeros((*shown.shape[:2], *at.y.shape[2:]))
        rates = params.new_zeros((1, params.shape[-1]))
        loop = "steps=0 per_task=1"
        with self._loss_of(at, at):
            given = (shown, shown_y, None, *_contiguous(at), None, rates, loop, self.memory, None, None, None, None)
            loss, grad, output, *_ = self._call("meta_gradient", params, *given)
        return loss, grad, output

    def hvp(self, params: Tensor, at: Examples, v: Tensor, step: int = 0) -> tuple[None, Tensor]:
        with self._loss_of(at):
            return None, self._call("hvp", params, *_contiguous(at), v.contiguous())[0]

    def plain_hvp(self, params: Tensor, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """hvp's product without weights, of a network without buffers. The tensors must be as the operator takes them."""
        return torch.ops.fastmaml.hvp.default(  # type: ignore[no-any-return]
            self.program.text, self.backend, params, x, y, None, v, params.new_empty(0)
        )

    def linearise(self, params: Tensor, at: Examples, gauss_newton: bool) -> tuple[Tensor, Tensor, Tensor]:
        """What `curvature` with the same arguments takes, in the backend's own types and layout."""
        with self._loss_of(at):
            tape, index, tap = self._operator("linearise", gauss_newton, params.contiguous(), *_contiguous(at))
        return tape, index, tap

    def curvature(
        self, params: Tensor, at: Examples, gauss_newton: bool, tape: tuple[Tensor, Tensor, Tensor], v: Tensor
    ) -> Tensor:
        with self._loss_of(at):
            mv: Tensor = self._operator(
                "curvature", gauss_newton, params.contiguous(), *_contiguous(at), *tape, v.contiguous()
            )
        return mv.to(params.dtype)

    def vjp(self, params: Tensor, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        y, grad = self._call("vjp", params, x, dy)
        return y, grad

    def solve(
        self,
        params: Tensor,
        at: Examples,
        v: Tensor,
        lam: float,
        steps: int,
        damping: float,
        stop: float,
        mask: Tensor | None,
    ) -> Solution:
        """Conjugate gradients from zero on ((1 + damping) I + H / lam) s = v; mask [P]: 1 where H has rows and columns."""
        with self._loss_of(at):
            given = (*_contiguous(at), v.contiguous(), mask, lam, steps, damping, stop)
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
        """(adapted [T, P], support losses [T, K], the optimizer's state [T, S P])."""
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
        """The fields of meta_gradient's result for one rate and no options, in the host's memory.

        theta: [P], or a part for each parameter. The tensors must be as the operator takes them.
        """
        return torch.ops.fastmaml.plain_meta_gradient.default(  # type: ignore[no-any-return]
            self.program.text, self.backend, theta, *batch, rate, loop, self.memory
        )

    def _loss_of(self, support: Examples, query: Examples | None = None) -> AbstractContextManager[None]:
        """Within the block the operators reach a loss written in Python."""
        if self.python_loss is None:
            return _NO_PYTHON_LOSS
        from fastmaml import _C

        return self.python_loss.serving(_C.set_python_loss, support, query)  # type: ignore[attr-defined,unused-ignore]

    def _call(self, op: str, params: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """The reference backend computes in float64 and answers in the caller's type."""
        result = self._operator(op, params.contiguous(), *arguments)
        results = (result,) if isinstance(result, Tensor) else result
        return tuple(r.to(params.dtype) for r in results) if self.backend == "reference" else results

    def _operator(self, op: str, *arguments: Any) -> Any:
        """One of the arguments is the parameters; results are in the backend's type."""
        params = next(a for a in arguments if isinstance(a, Tensor))
        given = (*arguments, self.program.gather_buffers(self.model, params))
        if self.backend == "reference":
            given = tuple(g.double() if isinstance(g, Tensor) and g.is_floating_point() else g for g in given)
        return getattr(torch.ops.fastmaml, op).default(self.program.text, self.backend, *given)


def scaled_parts(flat: Tensor, scale: Tensor, layout: ParameterLayout) -> Sequence[Tensor]:
    """flat [P] times scale [] in the host's memory, as one new tensor for each parameter."""
    return torch.ops.fastmaml.scaled_parts.default(flat, scale, layout.dims)  # type: ignore[no-any-return]


def _contiguous(at: Examples) -> tuple[Tensor | None, ...]:
    return tuple(None if part is None else part.contiguous() for part in at)


def _with_first_row(theta: Tensor, rows: Rows | None, steps: int) -> tuple[Tensor, Tensor | None]:
    """theta with the first step's row in its places, and a row for each of the steps, the last one reused."""
    if rows is None:
        return theta, None
    first = rows.values[0].expand(*theta.shape[:-1], -1)
    return theta.index_copy(-1, rows.places, first), rows.values[_row_of_step(rows, steps)].contiguous()


def _of_given_rows(grad: Tensor, rows_grad: Tensor, rows: Rows, loop: InnerLoop) -> Tensor:
    """The gradient of each step's row as that of the rows that were given [rows, R] (or [T, rows, R])."""
    given = grad.new_zeros((*grad.shape[:-1], *rows.values.shape))
    if loop.steps == 0:  # the operator returns none
        return given
    return given.index_add(-2, _row_of_step(rows, loop.steps), rows_grad)


def _row_of_step(rows: Rows, steps: int) -> Tensor:
    return torch.arange(steps, device=rows.values.device).clamp(max=len(rows.values) - 1)


def _scalar(loop: InnerLoop, lam: float, like: Tensor) -> Tensor | None:
    return like.new_tensor([lam]) if loop.proximal else None
