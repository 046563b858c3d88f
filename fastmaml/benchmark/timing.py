"""Interleaved timing: every implementation in turn, round by round. Repeats disturbed samples, samples slow calls less."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fastmaml.benchmark.disturbance import Disturbance, Watch

SLOW_S, SLOW_ROUNDS = 5.0, 3  # calls above SLOW_S seconds get SLOW_ROUNDS samples
Clock = Callable[[Callable[[], Any], int], float]  # (call, repetitions) -> seconds per call


@dataclass(frozen=True)
class Times:
    """Seconds per call: the median, half the distance between the quartiles as a share of the median, and the fastest."""

    median: float
    spread: float
    fastest: float
    rounds: int
    calls: int  # per sample
    retaken: int = 0  # samples discarded because other work disturbed them
    disturbed: int = 0  # disturbed samples kept, because the limit of retakes was reached
    others: float | None = None  # median share of the machine used by other processes; None: unknown
    stolen: float | None = None
    switches: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "median_ms": 1e3 * self.median,
            "spread": self.spread,
            "fastest_ms": 1e3 * self.fastest,
            "rounds": self.rounds,
            "calls_per_round": self.calls,
            "retaken": self.retaken,
            "disturbed": self.disturbed,
            "others_share": self.others,
            "stolen_share": self.stolen,
            "involuntary_switches_per_s": self.switches,
        }


def summarise(
    samples: Sequence[float], calls: int = 1, seen: Sequence[Disturbance | None] = (), retaken: int = 0
) -> Times:
    """Summarises samples (seconds per call) and the other work during each."""
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    median = statistics.median(samples)
    known = [s for s in seen if s is not None]
    shares = [statistics.median(of) for of in zip(*known)][:3] if known else [None] * 3
    kept = sum(s.disturbed for s in known)
    return Times(median, (high - low) / 2 / median, min(samples), len(samples), calls, retaken, kept, *shares)


@dataclass
class _Taken:
    """The samples of one implementation so far."""

    repeats: int
    rounds: int
    allowance_s: float  # for all its samples, including retakes
    samples: list[float] = field(default_factory=list)
    seen: list[Disturbance | None] = field(default_factory=list)
    retaken: int = 0
    spent_s: float = 0.0


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    least_s: float = 0.1,
    clock: Clock | None = None,
    budget_s: float = math.inf,
) -> dict[str, Times]:
    """Times every call in turn, up to `rounds` times. Each round starts with another call, so a busy machine hits all.

    A sample repeats the call to fill `least_s`, judged by one call that does not count. Calls should have run before.
    A sample that other processes disturbed is repeated at once, at most once per round on average. budget_s is shared
    equally. A call that runs out of its share, or takes over SLOW_S, gets at least SLOW_ROUNDS samples, spread evenly.
    """
    clock = clock or seconds
    taken: dict[str, _Taken] = {}
    for name, call in calls.items():
        once = max(clock(call, 1), 1e-9)
        repeats = max(1, math.ceil(least_s / once))
        sample_s, share_s = once * repeats, budget_s / len(calls)
        own = min(rounds, SLOW_ROUNDS) if once >= SLOW_S else rounds
        if math.isfinite(share_s):
            own = min(own, max(min(rounds, SLOW_ROUNDS), int(share_s / sample_s)))
        taken[name] = _Taken(repeats, own, 2 * own * sample_s)
    names = list(calls)
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            of = taken[name]
            if (number + 1) * of.rounds // rounds > number * of.rounds // rounds:
                _take(calls[name], clock, of)
    return {name: summarise(of.samples, of.repeats, of.seen, of.retaken) for name, of in taken.items()}


def _take(call: Callable[[], Any], clock: Clock, of: _Taken) -> None:
    while True:
        started, watch = time.perf_counter(), Watch()
        value = clock(call, of.repeats)
        disturbance = watch.stop()
        of.spent_s += time.perf_counter() - started
        again = disturbance is not None and disturbance.disturbed
        if again and of.retaken < of.rounds and of.spent_s < of.allowance_s:
            of.retaken += 1
            continue
        of.samples.append(value)
        of.seen.append(disturbance)
        return


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """The wall time per call."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def device_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Seconds per call between two events on the current CUDA stream. Includes waits for the host."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def sgemm(device: str = "cpu", size: int = 1024) -> tuple[Callable[[], Any], float]:
    """(a float32 product of size cubed to be timed in turn, its floating-point operations). Starts the threads."""
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device)
    out = torch.empty_like(a)
    torch.mm(a, a, out=out)
    return lambda: torch.mm(a, a, out=out), 2.0 * size**3


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within the block torch uses `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
