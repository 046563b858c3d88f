"""Profiles a call: seconds, rates and bounds of every op, layer and phase of the engine's walks.

    found = profile.measure(call)              call: one outer step, a Hessian product, or any call of the engine
    print(profile.show(found, ceilings.measure()))

Every worker's walk is timed Step by Step. Shares are of the workers' seconds: workers x wall time of the call. Time outside
Steps is shown too. Workers wait for the last task, for a thread to wake up, or for a core that another program uses. The
rest is outside the walks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastmaml.algorithms.maml import MAML
from fastmaml.benchmark.ceilings import Ceilings
from fastmaml.benchmark.problem import HvpProblem, Problem
from fastmaml.benchmark.text import share, table
from fastmaml.compiled import introspection
from fastmaml.engine.engine import Engine

OUTER_LR = 1e-6  # too small to change the network noticeably
LEAST_S, MOST_CALLS = 0.5, 50  # repeat the call under the profile for LEAST_S, at most MOST_CALLS times
WAITING = "sums over tasks, and waiting for the last task, a thread or a core"
OUTSIDE = "outside the walks: Python, conversion, optimizer"


class Row(NamedTuple):
    """All Steps of one op, layer and phase, per call."""

    phase: str
    op: str
    layer: str
    examples: int
    calls: float
    seconds: float  # summed over the workers
    undisturbed: float  # seconds if every call of a Step were as fast as its fastest
    products: float  # floating-point operations of matrix products and convolutions, counted as direct ones
    other: float  # floating-point operations of all other arithmetic
    bytes: float  # every operand counted once

    @property
    def name(self) -> str:
        return f"{self.phase}: {self.op}, {self.layer}"


@dataclass(frozen=True)
class Profile:
    """The average call: its wall time, the wall time of its walks, and their Steps, slowest first."""

    wall_s: float
    walks_s: float
    workers: int
    calls: int  # that were profiled
    rows: tuple[Row, ...]

    @property
    def worker_s(self) -> float:
        """The seconds of all workers: the whole of the shares."""
        return self.workers * self.wall_s

    @property
    def busy_s(self) -> float:
        return sum(row.seconds for row in self.rows)

    @property
    def waiting_s(self) -> float:
        return max(0.0, self.workers * self.walks_s - self.busy_s)

    @property
    def outside_s(self) -> float:
        return max(0.0, self.workers * (self.wall_s - self.walks_s))


class Bound(NamedTuple):
    """The limit of a row, "compute" or "memory", and the share of this ceiling that the row reaches."""

    by: str
    share: float
    ceiling_s: float  # seconds at the ceiling


def measure(call: Callable[[], Any], least_s: float = LEAST_S) -> Profile:
    """Profiles the call, after one warm-up. Raises ValueError if it does not run on a compiled host backend."""
    call()
    calls, wall = 0, 0.0
    introspection.start_profile()
    try:
        while calls == 0 or (wall < least_s and calls < MOST_CALLS):
            start = time.perf_counter()
            call()
            wall += time.perf_counter() - start
            calls += 1
    finally:
        plans = introspection.stop_profile()
    if not plans:
        raise ValueError("no Step ran on the cpu or reference backend; only these two can be profiled")
    walks = sum(plan["wall_seconds"] for plan in plans)
    return Profile(wall / calls, walks / calls, max(plan["workers"] for plan in plans), calls, _rows(plans, calls))


def outer_step(problem: Problem, backend: str = "cpu", memory: str = "auto") -> Callable[[], Any]:
    """A call for measure(): the meta-gradient of a benchmark's problem and the outer optimizer's step."""
    own, case = problem.own(), problem.case
    learner = MAML(own.model, case.inner_lr, case.inner_steps, case.loss, backend=backend, memory=memory)
    optimizer = learner.outer_optimizer(OUTER_LR)

    def step() -> None:
        learner.zero_grad(set_to_none=True)
        learner(*own.batch).loss.backward()
        optimizer.step()

    return step


def hessian_products(problem: HvpProblem, backend: str = "cpu") -> Callable[[], Any]:
    """A call for measure(): the Hessian-vector products of a benchmark's problem."""
    engine = Engine(problem.model, problem.loss, backend)
    return lambda: engine.hvp(problem.params, problem.x, problem.y, problem.v)


def _rows(plans: list[dict[str, Any]], calls: int) -> tuple[Row, ...]:
    """The Steps of all plans, merged by phase, op and layer."""
    sums: dict[tuple[str, str, str, int], list[float]] = {}
    for plan in plans:
        for step in plan["steps"]:
            into = sums.setdefault((step["phase"], step["op"], step["layer"], step["examples"]), [0.0] * 6)
            work = (plan["tasks"] * step[of] for of in ("products", "other", "bytes"))
            counted = [step["calls"], step["seconds"], step["calls"] * step["least_seconds"], *work]
            into[:] = [a + b / calls for a, b in zip(into, counted)]
    return tuple(sorted((Row(*key, *values) for key, values in sums.items()), key=lambda row: -row.seconds))


def bound(row: Row, ceilings: Ceilings, workers: int) -> Bound:
    """The roofline: the slower of the products at sgemm's rate and the bytes at a copy's rate (in L2 if they fit)."""
    operations, in_cache, in_memory = ceilings.per_worker(workers)
    fits = row.bytes / max(row.calls, 1) <= ceilings.l2_bytes
    compute, memory = row.products / operations, row.bytes / (in_cache if fits else in_memory)
    by = "compute" if compute >= memory else "memory" if not fits else "cache"
    ceiling_s = max(compute, memory)
    return Bound(by, ceiling_s / row.seconds if row.seconds else 0.0, ceiling_s)


def bottleneck(profile: Profile, ceilings: Ceilings) -> str:
    """The part that wastes most time, in one line."""
    wasted = {OUTSIDE: profile.outside_s, WAITING: profile.waiting_s}
    limits = {row.name: bound(row, ceilings, profile.workers) for row in profile.rows}
    wasted |= {row.name: max(0.0, row.seconds - limits[row.name].ceiling_s) for row in profile.rows}
    name = max(wasted, key=lambda key: wasted[key])
    gain = f"at its ceiling the call would take {share(wasted[name] / profile.worker_s)} less"
    if name not in limits:
        return f"next bottleneck: {name}, {share(wasted[name] / profile.worker_s)} of the workers' time"
    reached = f"{share(limits[name].share)} of its {limits[name].by} ceiling"
    return f"next bottleneck: {name}, which reaches {reached}; {gain}"


HEAD = ["op", "layer", "phase", "N", "calls", "ms", "share", "GFLOP/s", "GB/s", "of ceiling", "bound"]


def show(profile: Profile, ceilings: Ceilings, most: int | None = None) -> str:
    """The table. most: the maximum number of rows; all others are summed into one row."""
    shown = profile.rows[:most]
    rows = [_cells(row, ceilings, profile) for row in shown]
    rest = profile.rows[len(shown) :]
    if rest:
        rows.append(_plain(f"{len(rest)} more", sum(row.seconds for row in rest), profile))
    rows.append(_plain(WAITING, profile.waiting_s, profile))
    rows.append(_plain(OUTSIDE, profile.outside_s, profile))
    rows.append(_plain("all", profile.worker_s, profile))
    products, undisturbed = (sum(getattr(row, of) for row in profile.rows) for of in ("products", "undisturbed"))
    title = (
        f"{1e3 * profile.wall_s:.4g} ms per call, {1e3 * profile.walks_s:.4g} ms of them in walks of {profile.workers} workers. "
        f"The ms below add up all workers: {profile.workers} x {1e3 * profile.wall_s:.4g} = {1e3 * profile.worker_s:.4g}. "
        f"If every Step were as fast as its fastest call, the walks would take {1e3 * undisturbed / profile.workers:.4g} ms. "
        f"{products / 1e9:.4g} GFLOP in products: {products / profile.wall_s / 1e9:.1f} GFLOP/s"
    )
    return "\n".join([title, str(ceilings), table(HEAD, rows), bottleneck(profile, ceilings)])


def _cells(row: Row, ceilings: Ceilings, profile: Profile) -> list[str]:
    limit = bound(row, ceilings, profile.workers)
    rates = ((row.products + row.other) / row.seconds, row.bytes / row.seconds) if row.seconds else (0.0, 0.0)
    return [
        row.op, row.layer, row.phase, str(row.examples), f"{row.calls:.0f}", f"{1e3 * row.seconds:.3f}",
        f"{100 * row.seconds / profile.worker_s:.1f} %", f"{rates[0] / 1e9:.1f}", f"{rates[1] / 1e9:.1f}",
        share(limit.share), limit.by,
    ]  # fmt: skip


def _plain(name: str, seconds: float, profile: Profile) -> list[str]:
    return [name, "", "", "", "", f"{1e3 * seconds:.3f}", f"{100 * seconds / profile.worker_s:.1f} %", "", "", "", ""]


def to_json(profile: Profile, ceilings: Ceilings) -> dict[str, Any]:
    """The profile as plain data, for a result file."""
    rows = []
    for row in profile.rows:
        limit = bound(row, ceilings, profile.workers)
        rows.append(row._asdict() | {"bound": limit.by, "share_of_ceiling": limit.share})
    return {
        "wall_s": profile.wall_s,
        "walks_s": profile.walks_s,
        "workers": profile.workers,
        "calls": profile.calls,
        "waiting_s": profile.waiting_s,
        "outside_s": profile.outside_s,
        "ceilings": ceilings._asdict(),
        "bottleneck": bottleneck(profile, ceilings),
        "rows": rows,
    }
