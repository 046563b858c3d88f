"""A loss written in Python on the outputs of a fused network.

The network's Steps stay compiled; the schedule calls the loss between them, with each task's outputs. torch.func gives
the loss's gradient and Hessian-vector product by the outputs, over all tasks at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fastmaml.autodiff.task_derivatives import TaskDerivatives
from fastmaml.problem.examples import Examples
from fastmaml.problem.losses import LossFunction, weighted


class PythonLoss:
    """Computes the loss for the Steps of a schedule that need it. One call runs at a time."""

    def __init__(self, loss: LossFunction):
        self._loss = loss
        self._tasks = TaskDerivatives(lambda z, y, w: (weighted(self._loss, z, y, w), z))

    @property
    def note(self) -> str:
        return self._tasks.note

    @contextmanager
    def serving(
        self, install: Callable[[Any], None], support: Examples, query: Examples | None = None
    ) -> Iterator[None]:
        """Within the block, the installed callback computes the loss of these examples.

        If the loss raises, the block raises the same exception, not the operator's wrapper around it.
        """
        raised: list[BaseException] = []

        def answer(
            of_query: bool, first: int, z: Any, z_dot: Any, loss_out: Any, dz_out: Any, backend: str = ""
        ) -> None:
            try:
                given = query if of_query else support
                assert given is not None
                arrays = (tensor_of(array, backend, given.x.device) for array in (z, z_dot, loss_out, dz_out))
                with torch.no_grad():
                    self._answer(given, first, *arrays)
            except BaseException as error:
                raised.append(error)
                raise

        self._tasks.begin()
        install(answer)
        try:
            yield
        except Exception:
            if raised:
                raise raised[0] from None
            raise
        finally:
            install(None)

    def _answer(self, given: Examples, first: int, z: Any, z_dot: Any, loss_out: Any, dz_out: Any) -> None:
        rows = slice(first, first + z.shape[1])
        y = given.y[:, rows]
        y = y.to(z.dtype) if y.is_floating_point() else y
        w = z.new_full(z.shape[:2], 1.0 / z.shape[1]) if given.w is None else given.w[:, rows].to(z.dtype)
        if z_dot is None:
            loss, dz, _ = self._tasks.grad(first, z, y, w)
            loss_out.copy_(loss)
            dz_out.copy_(dz)
        else:
            dz_out.copy_(self._tasks.hvp(first, z, z_dot, y, w)[1])


class _Memory:
    """A view of a device's memory through its array interface. For `cuda_emulated` this is host memory."""

    def __init__(self, interface: dict[str, Any], backend: str):
        name = "__array_interface__" if backend == "cuda_emulated" else "__cuda_array_interface__"
        setattr(self, name, interface)


def tensor_of(array: Any, backend: str, device: torch.device) -> Any:
    """A tensor that shares the memory of an operator's argument: a numpy array, or a device's array interface."""
    if array is None:
        return None
    if not isinstance(array, dict):
        return torch.from_numpy(array)
    if backend == "cuda_emulated":
        return torch.from_numpy(np.asarray(_Memory(array, backend)))
    return torch.as_tensor(_Memory(array, backend), device=device)
