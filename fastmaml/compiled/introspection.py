"""What the compiled module knows about schedules and about the machine: for prediction, benchmarks and the doctor.

Its functions need the compiled module, which an Engine on a compiled backend has loaded.
"""

from __future__ import annotations

import sys
from typing import Any


def _compiled() -> Any:
    from fastmaml import _C  # type: ignore[attr-defined,unused-ignore]

    return _C


def module() -> Any | None:
    """The compiled module where it is loaded, else None."""
    return sys.modules.get("fastmaml._C")


def file() -> str:
    """Where the compiled module lies."""
    return str(_compiled().__file__)


def instruction_set() -> str:
    """The instruction set that the cpu backend runs on."""
    return str(_compiled().cpu_isa())


def memory_of_machine() -> int:
    """Bytes of memory that this process may have."""
    return int(_compiled().machine_memory())


def stash_budget(backend: str, python_loss: bool) -> int:
    """The largest arena, in bytes, with which memory="auto" keeps the activations of the inner steps."""
    return int(_compiled().stash_budget(backend, python_loss))


def arena_bytes(program: str, kind: str, **plan: Any) -> int:
    """The memory that one task in flight takes, in bytes; `plan` as in `costs`."""
    return int(_compiled().arena_bytes(program, kind, **plan))


def costs(program: str, kind: str, **plan: Any) -> dict[str, Any]:
    """What a Schedule costs a task on paper: memory mode, lanes, arena_bytes, and a dict for each Step.

    kind: "meta_gradient", "adapt", "hvp", ... plan: backend, real_bytes, support_examples, query_examples, loop, memory,
    solve_steps, uniform_rate.
    """
    return dict(_compiled().costs(program, kind, **plan))


def start_profile() -> None:
    """From now on every Step of every call on a backend of the host is timed."""
    _compiled().profile_start()


def stop_profile() -> list[dict[str, Any]]:
    """Ends the timing. For each plan that ran: what `costs` says, and the times of its walks and Steps."""
    return list(_compiled().profile_stop())
