"""Asks the compiled module about schedules and about the machine, for prediction, benchmarks and the doctor.

Load the compiled module first; any Engine on a compiled backend does so.
"""

from __future__ import annotations

import sys
from typing import Any


def _compiled() -> Any:
    from fastmaml import _C  # type: ignore[attr-defined,unused-ignore]

    return _C


def module() -> Any | None:
    """The compiled module, or None if it is not loaded."""
    return sys.modules.get("fastmaml._C")


def file() -> str:
    """The path of the compiled module."""
    return str(_compiled().__file__)


def instruction_set() -> str:
    """The instruction set that the cpu backend uses."""
    return str(_compiled().cpu_isa())


def memory_of_machine() -> int:
    """The bytes of memory that this process may use."""
    return int(_compiled().machine_memory())


def stash_budget(backend: str, python_loss: bool) -> int:
    """The largest arena, in bytes, for which memory="auto" chooses "stash"."""
    return int(_compiled().stash_budget(backend, python_loss))


def arena_bytes(program: str, kind: str, **plan: Any) -> int:
    """The arena of one task in flight, in bytes. `plan` as in `costs`."""
    return int(_compiled().arena_bytes(program, kind, **plan))


def costs(program: str, kind: str, **plan: Any) -> dict[str, Any]:
    """The planned cost of a Schedule for one task: memory mode, lanes, arena_bytes, and a dict for each Step.

    kind: "meta_gradient", "adapt", "hvp", ...
    plan: backend, real_bytes, support_examples, query_examples, loop, memory, solve_steps, uniform_rate.
    """
    return dict(_compiled().costs(program, kind, **plan))


def start_profile() -> None:
    """Starts timing every Step of every call, on the backends that run on the host."""
    _compiled().profile_start()


def stop_profile() -> list[dict[str, Any]]:
    """Stops timing. Returns, for each plan that ran, the fields of `costs` and the times of its walks and Steps."""
    return list(_compiled().profile_stop())
