"""Hessian-vector products, every task with its own weights: fastmaml against its peers, each first checked in float64.

Every product includes its primal pass. Products of several directions at fixed parameters get their own rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmaml import models
from fastmaml.benchmark.cases import HvpCase
from fastmaml.benchmark.exact import disagreement, distance, flat, in_a_line, mean_loss, network
from fastmaml.benchmark.meta import OURS
from fastmaml.benchmark.peers import Missing
from fastmaml.benchmark.peers.hvp import PEERS as PEERS
from fastmaml.benchmark.peers.hvp import REPEATED, Product
from fastmaml.benchmark.problem import HvpProblem, random_model
from fastmaml.benchmark.text import number, share, table
from fastmaml.benchmark.timing import Clock, Times, interleaved, sgemm
from fastmaml.engine.engine import Engine
from fastmaml.problem.losses import Loss

DIRECTIONS = 8  # of a repeated row


def problem(case: HvpCase, seed: int = 0) -> HvpProblem:
    """A built-in case in float32. The seed decides weights, examples and directions."""
    random = torch.Generator().manual_seed(seed)
    if case.width is None:
        model = random_model(partial(models.conv4, filters=64), seed)
        x = torch.rand(case.tasks, case.examples, 1, 28, 28, generator=random)
        y = torch.arange(case.examples).remainder(5).repeat(case.tasks, 1)
        return with_directions(str(case), model, "cross_entropy", x, y, random)
    model = random_model(partial(models.mlp, [case.width] * 4), seed)
    x, y = torch.randn(2, case.tasks, case.examples, case.width, generator=random)
    return with_directions(str(case), model, "mse", x, y, random)


def with_directions(
    name: str, model: nn.Module, loss: Loss, x: Tensor, y: Tensor, random: torch.Generator
) -> HvpProblem:
    """The problem with weights near the model's and a direction for each task."""
    theta = flat(model)
    noise = 0.01 * torch.randn(len(x), theta.numel(), generator=random).to(theta)
    return HvpProblem(name, model, loss, theta + noise, x, y, torch.randn(noise.shape, generator=random).to(theta))


def exact(p: HvpProblem) -> Tensor:
    """The exact products [T, P], in float64 on the CPU by double backward, one task at a time."""
    p = p.to(dtype=torch.float64)
    apply, loss = network(p.model), mean_loss(p.loss)
    found = []
    for params, x, y, v in zip(p.params, p.x, p.y, p.v):
        at = params.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(loss(apply(at, x), y), at, create_graph=True)
        found.append(torch.autograd.grad(g, at, v)[0])
    return torch.stack(found)


def by_fastmaml(p: HvpProblem, backend: str, precision: str = "float32") -> Product:
    engine = Engine(p.model, p.loss, backend, precision=precision)
    return lambda: engine.hvp(p.params, p.x, p.y, p.v)


# ---------------------------------------------------------------- measured


class How(NamedTuple):
    """The settings of a measurement."""

    rounds: int = 15
    backend: str = "cpu"
    device: str = "cpu"
    budget_s: float = math.inf
    clock: Clock | None = None
    precisions: tuple[str, ...] = ("float32",)
    repeated: bool = False  # also rows of DIRECTIONS products at fixed parameters


class Row(NamedTuple):
    """One implementation that agreed, with its measurements."""

    name: str
    products: int  # per task, in one timed call
    error64: float | None  # None if the implementation has no float64
    error32: float
    first_call_s: float
    times: Times

    def per_second(self, tasks: int) -> float:
        return self.products * tasks / self.times.median


class Result(NamedTuple):
    """One problem: its rows, ours first, and the reasons of missing rows."""

    name: str
    tasks: int
    examples: int
    parameters: int
    gflop: float
    sgemm_gflops: float
    rows: list[Row]
    absent: dict[str, str]


Make = Callable[[HvpProblem], Product]


def measure(
    p: HvpProblem,
    peers: Mapping[str, Make],
    how: How,
    missing: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda name: None,
    repeated: Mapping[str, Callable[[HvpProblem, Tensor], Product]] = REPEATED,
) -> Result:
    """Checks, then times, fastmaml and the peers. repeated: peers that keep a linearisation for several directions."""
    ours = {_name(q): partial(by_fastmaml, backend=how.backend, precision=q) for q in how.precisions}
    expected, single = exact(p), p.to(how.device)
    makes: dict[str, Make] = {**ours, **peers}
    counts = dict.fromkeys(makes, 1)
    if how.repeated:
        more = _directions(single)
        keeping: dict[str, Callable[[HvpProblem, Tensor], Product]] = {
            OURS: partial(_again_and_again, backend=how.backend),
            **repeated,
        }
        for name, keep in keeping.items():
            makes[f"{name}, {DIRECTIONS} v"] = partial(_first_of, keep, more)
            counts[f"{name}, {DIRECTIONS} v"] = DIRECTIONS
    calls: dict[str, Product] = {}
    checked: dict[str, tuple[float | None, float, float]] = {}
    absent = dict(missing or {})
    for name, make in makes.items():
        if name in absent:
            continue
        say(name)
        try:
            reduced = name in ours and name != OURS  # tensor core precisions have no float64
            found = None if reduced else distance(_one(make(single.to(how.device, torch.float64))()), expected)
            call = make(single)
            started = time.perf_counter()
            found32 = distance(_one(call()), expected)
            checked[name] = found, found32, time.perf_counter() - started
        except Missing as reason:
            absent[name] = str(reason)
            continue
        except Exception as failure:  # of another library; an error of ours ends the run
            if name in ours:
                raise
            absent[name] = in_a_line(failure)
            continue
        complaint = disagreement(found or 0.0, found32, 0.0)
        if complaint:
            absent[name] = complaint
        else:
            calls[name] = call
    say("timing")
    product, operations = sgemm(how.device)
    times = interleaved({**calls, "sgemm": product}, how.rounds, clock=how.clock, budget_s=how.budget_s)
    rows = [Row(name, counts[name], *checked[name], times[name]) for name in calls]
    gflops = operations / times["sgemm"].median / 1e9
    return Result(p.name, p.tasks, p.x.shape[1], p.params.shape[1], p.gflop, gflops, rows, absent)


def _name(precision: str) -> str:
    return OURS if precision == "float32" else f"{OURS} {precision}"


def _directions(p: HvpProblem) -> Tensor:
    """[DIRECTIONS, T, P]: the problem's own first."""
    others = torch.randn(DIRECTIONS - 1, *p.v.shape, generator=torch.Generator().manual_seed(1)).to(p.v)
    return torch.cat([p.v[None], others])


def _first_of(make: Callable[[HvpProblem, Tensor], Product], directions: Tensor, p: HvpProblem) -> Product:
    return make(p, directions.to(p.v))


def _again_and_again(p: HvpProblem, directions: Tensor, backend: str) -> Product:
    engine = Engine(p.model, p.loss, backend)

    def products() -> Tensor:
        hessian = engine.curvature(p.params, p.x, p.y)
        return torch.stack([hessian.product(v) for v in directions])

    return products


def _one(result: Tensor) -> Tensor:
    """The product with the problem's own direction."""
    return result[0] if result.dim() == 3 else result


# ---------------------------------------------------------------- shown and kept


def show(result: Result) -> str:
    """The table of one problem as aligned text."""
    head = [result.name, "ms", "+-", "HVP/s", "GFLOP/s", "of sgemm", "error 64", "error 32", "others", "ratio"]
    rows = []
    for row in result.rows:
        rate = result.gflop * row.products / row.times.median
        ratio = _ratio(row, result)
        rows.append([
            row.name, number(1e3 * row.times.median), share(row.times.spread), number(row.per_second(result.tasks)),
            f"{rate:.1f}", share(rate / result.sgemm_gflops), "" if row.error64 is None else f"{row.error64:.0e}",
            f"{row.error32:.0e}", share(row.times.others), "" if ratio is None else f"{ratio:.2f}",
        ])  # fmt: skip
    title = (
        f"{result.tasks} tasks with own weights, {result.examples} examples, {result.parameters:,} parameters, float32, "
        f"{torch.get_num_threads()} threads, sgemm {result.sgemm_gflops:.0f} GFLOP/s"
    )
    notes = [f"{name}: not measured, {reason}" for name, reason in result.absent.items()]
    if any(row.products > 1 for row in result.rows):
        notes.append(
            f"{DIRECTIONS} v: {DIRECTIONS} directions at fixed parameters, including their shared linearisation"
        )
    return "\n".join([title, table(head, rows), *notes])


def _ratio(row: Row, result: Result) -> float | None:
    """The time relative to our row with the same number of products."""
    ours = next((r for r in result.rows if r.name.split(",")[0] == OURS and r.products == row.products), None)
    return row.times.median / ours.times.median if ours else None


def to_json(result: Result) -> dict[str, Any]:
    """The content of one problem for the result file."""
    rows = [
        {"name": row.name, "products": row.products, **row.times.to_json(), "first_call_s": row.first_call_s,
         "products_per_s": row.per_second(result.tasks),
         "gflop_per_s": result.gflop * row.products / row.times.median,
         "share_of_sgemm": result.gflop * row.products / row.times.median / result.sgemm_gflops,
         "error_float64": row.error64, "error_float32": row.error32, "ratio_to_fastmaml": _ratio(row, result)}
        for row in result.rows
    ]  # fmt: skip
    return {"case": result.name, "tasks": result.tasks, "examples": result.examples, "parameters": result.parameters,
            "gflop": result.gflop, "sgemm_gflop_per_s": result.sgemm_gflops, "rows": rows,
            "absent": result.absent}  # fmt: skip
