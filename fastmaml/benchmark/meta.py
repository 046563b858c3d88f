"""Times one meta-gradient of fastmaml and its peers on a problem, after each result has agreed with the exact answer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from fastmaml.benchmark import peak
from fastmaml.benchmark.exact import Call, disagreement, error, exact, in_a_line
from fastmaml.benchmark.peers import (
    Implementation,
    Missing,
    fastmaml_engine,
    fastmaml_maml,
    fo_rev_torch,
    fo_rev_torch_loop,
    torch_func,
    torch_func_compiled,
    torch_loop,
)
from fastmaml.benchmark.problem import Case, Problem, arithmetic
from fastmaml.benchmark.text import number, share, table
from fastmaml.benchmark.timing import Clock, Times, interleaved, sgemm
from fastmaml.compiled import introspection
from fastmaml.engine.engine import Engine

OURS = fastmaml_maml.NAME
_OURS: dict[str, Implementation] = {m.NAME: m for m in (fastmaml_maml, fastmaml_engine)}
PEERS: dict[str, Implementation] = {
    m.NAME: m for m in (torch_loop, torch_func, torch_func_compiled, fo_rev_torch, fo_rev_torch_loop)
}


class How(NamedTuple):
    """The settings that all implementations of a case share, and those of fastmaml."""

    rounds: int = 15
    backend: str = "cpu"
    memory: str = "auto"
    device: str = "cpu"
    budget_s: float = math.inf  # seconds to time one case
    clock: Clock | None = None
    peak: bool = False  # also measure peak memory, each implementation in its own process


class Row(NamedTuple):
    """One implementation that agreed on one case, with its measurements."""

    name: str
    error64: float
    error32: float
    first_call_s: float  # compilation and first allocations
    times: Times
    peak_bytes: int | None = None


class Result(NamedTuple):
    """One case: its rows, ours first, and the reasons of missing rows."""

    case: Case
    gflop: float
    sgemm_gflops: float
    plain_error32: float  # plain torch's float32 error, even if it has no row
    memory: str  # the mode of fastmaml's adjoint sweep: "stash" or "low"
    rows: list[Row]
    absent: dict[str, str]


def measure(
    problem: Problem,
    peers: Mapping[str, Implementation],
    how: How,
    missing: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda name: None,
    reload: peak.Source | None = None,
) -> Result:
    """Checks, then times, fastmaml and the peers on one problem.

    missing: unavailable peers, with the reason. reload: how another process builds the same problem, for how.peak.
    """
    say("float64 oracle")
    answer = exact(problem)
    single = problem.to(how.device)
    double = single.double()
    yardstick = error(torch_loop.prepare(single)(), answer)
    calls: dict[str, Call] = {}
    checked: dict[str, tuple[float, float, float]] = {}
    absent = dict(missing or {})
    implementations: dict[str, Implementation] = {**_OURS, **peers}
    for name, module in implementations.items():
        if name in absent:
            continue
        say(name)
        own = {"backend": how.backend, "memory": how.memory} if name in _OURS else {}
        try:
            found = error(module.prepare(double, **own)(), answer)
            call = module.prepare(single, **own)
            started = time.perf_counter()
            found32 = error(call(), answer)
            checked[name] = found, found32, time.perf_counter() - started
        except Missing as reason:
            absent[name] = str(reason)
            continue
        except Exception as failure:  # of another library; an error of ours ends the run
            if name in _OURS:
                raise
            absent[name] = in_a_line(failure)
            continue
        complaint = disagreement(found, found32, yardstick)
        if complaint:
            absent[name] = complaint
        else:
            calls[name] = call
    say("timing")
    product, operations = sgemm(how.device)
    times = interleaved({**calls, "sgemm": product}, how.rounds, clock=how.clock, budget_s=how.budget_s)
    peaks: dict[str, int | None] = {}
    if how.peak and reload is not None:
        for name in calls:
            say(f"peak memory of {name}")
            peaks[name] = _peak(name, implementations[name], reload, how, absent)
    rows = [Row(name, *checked[name], times[name], peaks.get(name)) for name in calls]
    gflops = operations / times["sgemm"].median / 1e9
    kept = memory_mode(single, how.backend, how.memory)
    return Result(problem.case, arithmetic(problem) / 1e9, gflops, yardstick, kept, rows, absent)


def _peak(name: str, module: Implementation, reload: peak.Source, how: How, absent: dict[str, str]) -> int | None:
    own = {"backend": how.backend, "memory": how.memory} if name in _OURS else {}
    try:
        return peak.in_a_process(module, reload, own).bytes
    except Missing as reason:
        absent[f"peak memory of {name}"] = str(reason)
        return None


def memory_mode(problem: Problem, backend: str, memory: str) -> str:
    """The mode of fastmaml's adjoint sweep on this problem: "stash" or "low" (recompute). "auto" becomes one of them."""
    engine = Engine(problem.model, problem.case.loss, backend)
    x = problem.batch.support_x
    program = engine.program(x) if isinstance(x, torch.Tensor) else None
    if program is None:
        return "low"  # autodiff always recomputes
    if memory != "auto":
        return memory

    def arena(mode: str) -> int:
        case = problem.case
        return introspection.arena_bytes(
            program.text, "meta_gradient", backend=engine.backend, real_bytes=x.element_size(), memory=mode,
            support_examples=case.support, query_examples=case.query, loop=f"steps={case.inner_steps}",
        )  # fmt: skip

    return "stash" if arena("auto") == arena("stash") else "low"


# ---------------------------------------------------------------- shown and kept


def show(result: Result) -> str:
    """The table of one case as aligned text."""
    case = result.case
    head = [case.name, "ms", "+-", "tasks/s", "GFLOP/s", "of sgemm", "MiB", "error 64", "error 32", "others", "ratio"]
    ours = next((row.times.median for row in result.rows if row.name == OURS), None)
    rows = []
    for row in result.rows:
        rate = result.gflop / row.times.median
        rows.append([
            row.name, number(1e3 * row.times.median), share(row.times.spread), number(case.tasks / row.times.median),
            f"{rate:.1f}", share(rate / result.sgemm_gflops), mib(row.peak_bytes), f"{row.error64:.0e}",
            f"{row.error32:.0e}", share(row.times.others), f"{row.times.median / ours:.2f}" if ours else "",
        ])  # fmt: skip
    title = (
        f"{case.network}, {case.sizes}, float32, {torch.get_num_threads()} threads, sgemm {result.sgemm_gflops:.0f} "
        f"GFLOP/s, fastmaml's memory {result.memory}, plain torch's float32 error {result.plain_error32:.0e}"
    )
    again = {row.name: row.times for row in result.rows if row.times.retaken or row.times.disturbed}
    notes = [f"{name}: {t.retaken} disturbed samples taken again, {t.disturbed} kept" for name, t in again.items()]
    few = [f"{row.name} ({row.times.rounds})" for row in result.rows if row.times.rounds < _most(result)]
    notes += [f"fewer rounds: {', '.join(few)} of {_most(result)}"] if few else []
    notes += [f"{name}: not measured, {reason}" for name, reason in result.absent.items()]
    return "\n".join([title, table(head, rows), *notes])


def _most(result: Result) -> int:
    return max((row.times.rounds for row in result.rows), default=0)


def mib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f}"


def to_json(result: Result) -> dict[str, Any]:
    """The content of one case for the result file."""
    case = result.case
    ours = next((row.times.median for row in result.rows if row.name == OURS), None)
    rows = []
    for row in result.rows:
        rate = result.gflop / row.times.median
        rows.append({
            "name": row.name, **row.times.to_json(), "first_call_s": row.first_call_s,
            "tasks_per_s": case.tasks / row.times.median, "gflop_per_s": rate,
            "share_of_sgemm": rate / result.sgemm_gflops, "peak_bytes": row.peak_bytes, "error_float64": row.error64,
            "error_float32": row.error32, "ratio_to_fastmaml": row.times.median / ours if ours else None,
        })  # fmt: skip
    facts = {"case": case.name, "workload": case.workload, "network": case.network, "tasks": case.tasks,
             "support": case.support, "query": case.query, "inner_steps": case.inner_steps,
             "inner_lr": case.inner_lr}  # fmt: skip
    return facts | {
        "gflop": result.gflop,
        "sgemm_gflop_per_s": result.sgemm_gflops,
        "plain_torch_error_float32": result.plain_error32,
        "memory": result.memory,
        "rows": rows,
        "absent": result.absent,
    }
