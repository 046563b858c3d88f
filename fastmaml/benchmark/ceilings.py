"""Measured ceilings of this machine: products of large matrices, and copies in cache and in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from fastmaml.benchmark.timing import threads as set_threads

SGEMM = 1024
LARGE_COPY = 128 * 2**20  # bytes of each array: more than a process' share of any last-level cache
DEFAULT_L2 = 2**20  # bytes, if the system does not report it
BEST_OF_S = 0.15  # seconds to repeat each measurement; the fastest repetition counts


class Ceilings(NamedTuple):
    """Rates of one thread and of all threads: operations per second, and bytes read and written per second."""

    threads: int
    l2_bytes: int
    sgemm: tuple[float, float]
    cache_copy: tuple[float, float]  # within L2
    memory_copy: tuple[float, float]

    def per_worker(self, workers: int) -> tuple[float, float, float]:
        """(operations, bytes in cache, bytes in memory) per second for each of `workers` at once."""
        at = 0 if workers <= 1 else 1
        share = 1 if workers <= 1 else self.threads
        return self.sgemm[at] / share, self.cache_copy[at] / share, self.memory_copy[at] / share

    def best(self, other: Ceilings) -> Ceilings:
        """The higher rates of two measurements, because other programs can only lower them."""
        sgemm, cache, memory = ((max(mine[0], its[0]), max(mine[1], its[1])) for mine, its in zip(self[2:], other[2:]))
        return Ceilings(self.threads, self.l2_bytes, sgemm, cache, memory)

    def __str__(self) -> str:
        names = ("sgemm 1,024 cubed", "copy in L2", "copy in memory")
        rates = zip(names, (self.sgemm, self.cache_copy, self.memory_copy), ("GFLOP/s", "GB/s", "GB/s"))
        texts = (f"{name} {one / 1e9:.0f} / {all_ / 1e9:.0f} {unit}" for name, (one, all_), unit in rates)
        return f"ceilings of 1 / {self.threads} threads: {', '.join(texts)}"


def measure() -> Ceilings:
    """Measures with torch's threads. Takes about a second."""
    threads, l2 = torch.get_num_threads(), l2_bytes()
    a = torch.rand(SGEMM, SGEMM)
    product, large = torch.empty_like(a), torch.empty(2, LARGE_COPY // 4).fill_(1.0)
    # The threads of a copy take equal parts, so each part stays in the L2 of its core.
    small = torch.ones(2, threads, l2 // 16)
    rates = []
    for used in (1, threads):
        with set_threads(used):
            to, from_ = small[0, :used], small[1, :used]
            rates.append((
                2.0 * SGEMM**3 / _fastest(partial(torch.mm, a, a, out=product)),
                2.0 * to.nbytes / _fastest(partial(to.copy_, from_)),
                2.0 * large[0].nbytes / _fastest(partial(large[0].copy_, large[1])),
            ))  # fmt: skip
    # All threads can do at least the work of one. A lower rate means that other programs used the cores.
    return Ceilings(threads, l2, *((one, max(one, all_)) for one, all_ in zip(*rates)))


def l2_bytes() -> int:
    """Bytes of a core's own second-level cache, as Linux reports for the first core."""
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, size = (index / "level").read_text().strip(), (index / "size").read_text().strip()
        except OSError:
            continue
        if level == "2" and size.endswith("K"):
            return 1024 * int(size[:-1])
    return DEFAULT_L2


def _fastest(call: Callable[[], object]) -> float:
    call()
    best, until = float("inf"), time.perf_counter() + BEST_OF_S
    while time.perf_counter() < until:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
