"""How the benchmarks measure: the exact answer, interleaved timing, and what machine and code a number belongs to."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastmaml as fm
from bench.cases import Problem
from fastmaml.experiment import machine
from tests import oracle

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

Answer = tuple[Tensor, Sequence[Tensor]]  # mean query loss, the meta-gradient of each parameter
Call = Callable[[], Answer]


def gradients(model: nn.Module) -> list[Tensor]:
    """`.grad` of every parameter. Raises ValueError where one has none."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if len(grads) != len(list(model.parameters())):
        raise ValueError(f"{len(list(model.parameters())) - len(grads)} parameters got no gradient")
    return grads


def exact(problem: Problem) -> tuple[float, Tensor]:
    """(mean query loss, meta-gradient [P]) in float64 by unrolled double backward, a task at a time (tests/oracle.py)."""
    case, double = problem.case, problem.double()
    theta = torch.cat([p.detach().reshape(-1) for p in double.model.parameters()])
    result = oracle.meta_gradient(
        oracle.network(double.model),
        theta,
        double.batch,
        oracle.loss_function(case.loss),
        torch.full_like(theta, case.inner_lr),
        case.inner_steps,
    )
    return float(result.loss.mean()), result.grad


def error(result: Answer, answer: tuple[float, Tensor]) -> float:
    """The larger relative error of loss and meta-gradient (2-norm); infinite where the result is not finite."""
    loss, grad = result[0].item(), torch.cat([g.detach().reshape(-1) for g in result[1]]).cpu().double()
    worst = max(abs(loss - answer[0]) / abs(answer[0]), float((grad - answer[1]).norm() / answer[1].norm()))
    return worst if math.isfinite(worst) else math.inf


@dataclass(frozen=True)
class Times:
    """Seconds a call: the median of the rounds, half the distance between quartiles as a share of it, and the fastest."""

    median: float
    spread: float
    fastest: float
    rounds: int
    calls: int  # in one sample

    def to_json(self) -> dict[str, Any]:
        return {"median_ms": 1e3 * self.median, "spread": self.spread, "fastest_ms": 1e3 * self.fastest,
                "rounds": self.rounds, "calls_per_round": self.calls}  # fmt: skip


def summarise(samples: Sequence[float], calls: int = 1) -> Times:
    """Samples in seconds a call."""
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    median = statistics.median(samples)
    return Times(median, (high - low) / 2 / median, min(samples), len(samples), calls)


Clock = Callable[[Callable[[], Any], int], float]  # seconds a call, of a call and how often to repeat it


def interleaved(
    calls: Mapping[str, Callable[[], Any]], rounds: int, least_s: float = 0.05, clock: Clock | None = None
) -> dict[str, Times]:
    """Times every call in turn, `rounds` times, each round from another one onwards, so a busy machine hits all alike.

    A sample is as many calls as fill `least_s`, by one call that is not counted. Calls should have run before.
    """
    clock = clock or _seconds
    repeats = {name: max(1, math.ceil(least_s / max(clock(call, 1), 1e-9))) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            samples[name].append(clock(calls[name], repeats[name]))
    return {name: summarise(samples[name], repeats[name]) for name in names}


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def device_seconds(call: Callable[[], Any], repeats: int) -> float:
    """As _seconds, between two events on the current CUDA stream: what the device took, waits for the host included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


# ---------------------------------------------------------------- what a number belongs to


def facts() -> dict[str, Any]:
    """Machine, threads, versions, commit, instruction set and load: what is needed to measure the same again."""
    described: dict[str, Any] = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "versions": {"fastmaml": fm.__version__, "python": platform.python_version(), "torch": torch.__version__},
    }
    if fm.Engine(torch.nn.Linear(1, 1), loss="mse").fused:
        from fastmaml import _C

        described["instruction_set"] = _C.cpu_isa()
        described["compiler"] = _first_line([os.environ.get("CXX", "c++"), "--version"])
    return described


def commit() -> str:
    """The commit of this checkout, with "+changes" if compiled or Python sources differ from it; "" outside of git."""
    name = _first_line(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
    changed = _first_line(["git", "-C", str(ROOT), "status", "--porcelain", "--", "csrc", "fastmaml", "bench/*.py"])
    return name + ("+changes" if name and changed else "")


def _first_line(command: list[str]) -> str:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return answer.strip().split("\n")[0]


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Writes a result file and says so."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width: the first left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
