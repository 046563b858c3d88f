"""Implementations of the same meta-gradient, one file each, including ours.

Each file has NAME, `version()` and `prepare(problem) -> call`. version() raises Missing if the library is unavailable.
The call computes one meta-gradient as users would and returns (mean query loss, gradient of each parameter).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from fastmaml.benchmark.exact import Call
from fastmaml.benchmark.problem import Problem


class Missing(Exception):
    """Why an implementation cannot run here or cannot run a case, in one sentence."""


class Implementation(Protocol):
    """The interface of such a module."""

    NAME: str
    __name__: str

    @property
    def version(self) -> Callable[[], str]: ...

    @property
    def prepare(self) -> Callable[[Problem], Call]: ...
