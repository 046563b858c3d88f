"""How much other work ran on this machine while a sample was taken: the processors' busy time less this process' own."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import NamedTuple

STAT = Path("/proc/stat")  # Linux only: elsewhere nothing is measured, and the result says so
LIMIT = 0.1  # of the machine's processor time; a sample with more is taken again
_TICK = 1.0 / os.sysconf("SC_CLK_TCK")  # the kernel counts in these, so short samples are known to a tick or two


class Disturbance(NamedTuple):
    """Of one sample."""

    others: float  # share of the machine's processor time that other processes had
    stolen: float  # share that the hypervisor gave to other machines
    switches: float  # times a second that a thread of this process was put aside for another one
    known_to: float  # share that a clock tick is

    @property
    def disturbed(self) -> bool:
        """More than LIMIT of other work, beyond what the clock's coarseness may feign."""
        return max(self.others, self.stolen) > LIMIT + 2 * self.known_to


class Watch:
    """Measures from its making to `stop`."""

    def __init__(self) -> None:
        self._before = _now()

    def stop(self) -> Disturbance | None:
        """None where the system does not say."""
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
