"""Gradient and Hessian-vector product of one task's function, for all tasks at once.

Tasks run under vmap. If vmap rejects a function (dropout, data-dependent control flow), a loop over tasks follows.
If forward mode rejects the function too, double backward runs task by task. The choice is kept for later calls and written to `note`.

Random functions: a loop over tasks seeds each evaluation by (call, step, task). A step's Hessian then sees the masks of
this step's gradient. Each call draws its own seed from torch's generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, jvp, vmap

VMAP, LOOP, DOUBLE_BACKWARD = range(3)
_HOW = {LOOP: "a loop over tasks", DOUBLE_BACKWARD: "double backward in a loop over tasks"}


class TaskDerivatives:
    """Derivatives of value(point, *examples) -> (scalar, tensor), a function of one task.

    The methods take the same arguments for all tasks, [T, ...].
    """

    def __init__(self, value: Callable[..., tuple[Tensor, Tensor]]):
        self.value = value
        self.note = ""
        self._style = VMAP
        self._seed: int | None = None

    def begin(self, seed: int | None = None) -> None:
        """Starts a call. Its evaluations share one seed. None: the first random evaluation draws it."""
        self._seed = seed

    def grad(self, step: int, point: Tensor, *examples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(value [T], gradient shaped as point, the function's second result)."""
        return self.over_tasks(self._grad_of_one, step, point, *examples)

    def hvp(self, step: int, point: Tensor, v: Tensor, *examples: Tensor) -> tuple[Tensor, Tensor]:
        """(gradient, H v), both shaped as point. Forward-over-reverse gives the gradient as its primal."""
        return self.over_tasks(self._hvp_of_one, step, point, v, *examples)

    def _grad_of_one(self, style: int) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        def by_functorch(point: Tensor, *examples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            grad, (value, beside) = grad_and_value(self.value, has_aux=True)(point, *examples)
            return value, grad, beside.detach()

        def by_backward(point: Tensor, *examples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            with torch.enable_grad():
                point = point.detach().requires_grad_()
                value, beside = self.value(point, *examples)
                (grad,) = torch.autograd.grad(value, point, allow_unused=True, materialize_grads=True)
            return value.detach(), grad, beside.detach()

        return by_backward if style == DOUBLE_BACKWARD else by_functorch

    def _hvp_of_one(self, style: int) -> Callable[..., tuple[Tensor, Tensor]]:
        def by_functorch(point: Tensor, v: Tensor, *examples: Tensor) -> tuple[Tensor, Tensor]:
            def grad_at(where: Tensor) -> Tensor:
                return grad_and_value(self.value, has_aux=True)(where, *examples)[0]

            grad, hv = jvp(grad_at, (point,), (v,))  # type: ignore[misc]
            return grad, hv

        def by_backward(point: Tensor, v: Tensor, *examples: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                point = point.detach().requires_grad_()
                value, _ = self.value(point, *examples)
                (grad,) = torch.autograd.grad(
                    value, point, create_graph=True, allow_unused=True, materialize_grads=True
                )
                if not grad.requires_grad:  # the value is linear in the point
                    return grad.detach(), torch.zeros_like(v)
                (hv,) = torch.autograd.grad(grad, point, v, allow_unused=True, materialize_grads=True)
            return grad.detach(), hv

        return by_backward if style == DOUBLE_BACKWARD else by_functorch

    def over_tasks(self, one: Callable[[int], Callable[..., Any]], step: int, *given: Tensor) -> Any:
        """Runs one(style) on every task, in the first style that works. Starts from the remembered style."""
        for style in range(self._style, DOUBLE_BACKWARD + 1):
            try:
                result = self._run(style, one(style), step, given)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                # The next style shows whether the style or the function is at fault. The last style's error is raised.
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
