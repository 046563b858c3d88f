"""Other implementations of the same meta-gradient, one file each, and ours in the same form.

Each file has NAME, `version()` (raises Missing where it cannot be had) and `prepare(problem) -> call`; the call computes
one meta-gradient the way its users do and returns (mean query loss, gradient of each parameter).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from fastmaml.benchmark.exact import Call
from fastmaml.benchmark.problem import Problem


class Missing(Exception):
    """Why an implementation cannot run here or cannot run a case, in one sentence."""


class Implementation(Protocol):
    """A module of this kind."""

    NAME: str
    __name__: str

    @property
    def version(self) -> Callable[[], str]: ...

    @property
    def prepare(self) -> Callable[[Problem], Call]: ...
