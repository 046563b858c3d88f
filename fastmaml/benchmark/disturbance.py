"""Measures other work on this machine during a sample: the processors' busy time minus this process' own."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import NamedTuple

STAT = Path("/proc/stat")  # Linux only; elsewhere nothing is measured, and results say so
LIMIT = 0.1  # share of the machine's processor time; a sample with more is repeated
_TICK = 1.0 / os.sysconf("SC_CLK_TCK")  # the kernel's unit of time: short samples are known only to a tick or two


class Disturbance(NamedTuple):
    """The disturbance of one sample."""

    others: float  # share of the machine's processor time used by other processes
    stolen: float  # share that the hypervisor gave to other machines
    switches: float  # involuntary context switches of this process per second
    known_to: float  # a clock tick as a share: the precision of the others

    @property
    def disturbed(self) -> bool:
        """Whether other work exceeds LIMIT by more than the clock's precision."""
        return max(self.others, self.stolen) > LIMIT + 2 * self.known_to


class Watch:
    """Measures from its creation to `stop`."""

    def __init__(self) -> None:
        self._before = _now()

    def stop(self) -> Disturbance | None:
        """The disturbance so far. None if the system does not report it."""
        after = _now()
        if self._before is None or after is None:
            return None
        wall, busy, stolen, own, switches = (b - a for a, b in zip(self._before, after))
        machine = max(wall, 1e-9) * (os.cpu_count() or 1)
        others = max(0.0, busy - own) / machine
        return Disturbance(others, stolen / machine, switches / max(wall, 1e-9), _TICK / machine)


def _now() -> tuple[float, float, float, float, float] | None:
    """(wall, busy of all processors, stolen, own processor time, involuntary switches) so far."""
    try:
        ticks = [int(word) for word in STAT.read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, _, _, irq, softirq, stolen = ticks
    used = resource.getrusage(resource.RUSAGE_SELF)
    busy = _TICK * (user + nice + system + irq + softirq)
    return time.perf_counter(), busy, _TICK * stolen, used.ru_utime + used.ru_stime, float(used.ru_nivcsw)
