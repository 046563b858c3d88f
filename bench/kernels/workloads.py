"""Counts whole meta-gradients on the emulator: launches, global memory bytes, arithmetic, and an H100's minimum time."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastmaml as fm
from bench.cases import CASES
from bench.kernels.cubins import BUILD, Missing
from bench.measure import ROOT
from fastmaml.benchmark.problem import Case
from tests import kernel_launches
from tests.kernel_launches import Launched

# H100 SXM, from its data sheet.
BYTES_PER_S = 3.35e12
FLOPS = {
    "float32": 67e12,
    "tf32": 495e12,
    "tf32x3": 495e12 / 3,
    "bf16x3": 990e12 / 3,
}  # dense; x3 splits each product into three
MULTIPROCESSORS, LANES = 132, 128  # LANES: simultaneous multiply-adds of a multiprocessor
LAUNCH_S = 2.5e-6  # assumed seconds of one launch outside of a CUDA graph

SIZES = {
    "sinusoid": "sinusoid-k1",
    "mlp": "mlp-k1",
    "omniglot": "omniglot-t8-k1",
    "mini": "mini-s5-t2-k1",
}  # their cases


class Launch(NamedTuple):
    kernel: str  # its symbol
    blocks: int
    threads: int
    shared: int  # dynamic


@dataclass(frozen=True)
class Asked:
    """Equal Steps: their sizes summed over all tasks and all such Steps."""

    name: str
    op: str
    launches: int
    asked_launches: tuple[Launch, ...]  # of one such Step
    flops: float
    compulsory: float  # bytes: every operand once
    requested: Mapping[str, float]  # bytes by kernel

    @property
    def bytes(self) -> float:
        return sum(self.requested.values())

    def seconds(self, flops_per_s: float, requested: bool = False) -> float:
        """The roofline: the longer of memory and arithmetic."""
        return max((self.bytes if requested else self.compulsory) / BYTES_PER_S, self.flops / flops_per_s)


@dataclass(frozen=True)
class Resident:
    """The resources of a task's block that walks a whole Schedule."""

    threads: int
    shared: int  # bytes, dynamic
    arena: int  # bytes of device memory, for values that do not fit into shared memory
    arena_sm_80: int
    steps: int
    stages: int  # groups of independent Steps; each ends with a barrier
    code: int  # bytes of encoded Steps, which every block reads

    def share(self, tasks: int) -> float:
        """The blocks' share of an H100's arithmetic: one multiprocessor each, with one lane per thread."""
        return min(tasks, MULTIPROCESSORS) / MULTIPROCESSORS * min(self.threads, LANES) / LANES


@dataclass(frozen=True)
class Workload:
    case: Case
    inner_steps: int
    precision: str
    walk: str  # "layered": one launch or more per Step; "resident": one launch for all
    parameters: int
    asked: tuple[Asked, ...]
    memory: str = "low"  # or "stash"
    auto: bool = False  # whether memory="auto" chooses this mode
    around: tuple[Asked, ...] = ()  # launches of the engine before and after: gathers of parameters, copies of results
    resident: Resident | None = None  # of the resident walk
    declines: str = ""  # why there is no resident walk

    @property
    def launches(self) -> int:
        return sum(a.launches for a in self.asked)

    @property
    def flops(self) -> float:
        return sum(a.flops for a in self.asked)

    @property
    def requested(self) -> float:
        return sum(a.bytes for a in self.asked)

    @property
    def compulsory(self) -> float:
        return sum(a.compulsory for a in self.asked)

    def seconds(self, requested: bool = False) -> float:
        """Roofline time, launch after launch. Everything but products runs on float32 units."""
        share = self.resident.share(self.case.tasks) if self.resident else 1.0
        return sum(a.seconds(share * FLOPS[self.precision], requested) for a in self.asked)

    @property
    def launching(self) -> float:
        """Seconds of the launches, without a CUDA graph."""
        return self.launches * LAUNCH_S


def build_counter() -> Path:
    """Builds build/core/count. Raises Missing if the build fails."""
    try:
        kernel_launches.make("count")
    except AssertionError as error:
        raise Missing(f"the counting program does not build: {str(error)[-500:]}") from error
    return ROOT / "build" / "core" / "count"


def program_text(case: Case) -> str:
    engine = fm.Engine(case.model(), loss=case.loss, backend="cpu")
    program = engine.program(torch.zeros(1, case.support, *case.input_shape))
    if program is None:
        raise Missing(f"{case} is not fused: {engine.why}")
    return program.text


def count(size: str, inner_steps: tuple[int, ...], precision: str = "float32") -> list[Workload]:
    """The meta-gradients of one case of bench.cases, for several numbers of inner steps.

    With memory "low", and with "stash" if "auto" chooses it. Layered, and resident if possible.
    """
    case = CASES[SIZES[size]]
    file = BUILD / f"{size}.program"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(program_text(case))
    sizes = {
        "support": case.support,
        "query": case.query,
        "tasks": case.tasks,
        "steps": ",".join(map(str, inner_steps)),
        "precision": precision,
    }
    command = [str(build_counter()), str(file), *(f"{k}={v}" for k, v in sizes.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    result = []
    for counted in json.loads(done.stdout):
        layered = parse(case, precision, counted)
        result.append(layered)
        if not layered.declines:
            result.append(parse_resident(layered, counted["resident"]))
    return result


def parse(case: Case, precision: str, counted: Mapping[str, Any]) -> Workload:
    """One layered element of count's list. Its bytes and arithmetic are per task, except for the sum over tasks."""
    return Workload(
        case,
        counted["steps"],
        precision,
        "layered",
        counted["parameters"],
        tuple(_asked(step, 1 if step["op"] == "tree_reduce" else case.tasks) for step in counted["asked"]),
        memory=counted["memory"],
        auto=counted["auto"],
        around=tuple(_asked(step, 1) for step in counted["around"]),
        declines=counted["resident"]["declines"],
    )


def _asked(step: Mapping[str, Any], tasks: int) -> Asked:
    times = step["times"] * tasks
    return Asked(
        name=step["name"].strip(),
        op=step["op"],
        launches=step["times"] * len(step["launches"]),
        asked_launches=tuple(Launch(**launch) for launch in step["launches"]),
        flops=float(times * step["flops"]),
        compulsory=float(times * step["compulsory"]),
        requested={kernel: float(times * (read + written)) for kernel, (read, written) in step["bytes"].items()},
    )


def parse_resident(layered: Workload, counted: Mapping[str, Any]) -> Workload:
    """The same Schedule in one launch. Compulsory: every argument and result of a task once, and the encoded Steps."""
    launch = Launch(counted["kernel"], counted["blocks"], counted["threads"], counted["shared"])
    tasks = layered.case.tasks
    whole = Asked(
        name=f"all {counted['steps']} Steps",
        op="resident",
        launches=1,
        asked_launches=(launch,),
        flops=layered.flops,
        compulsory=float(tasks * (counted["compulsory"] + counted["code"])),
        requested={launch.kernel: float(tasks * sum(counted["bytes"]))},
    )
    resident = Resident(**{field: counted[field] for field in Resident.__annotations__})
    sums = tuple(a for a in layered.asked if a.op == "tree_reduce")
    return replace(layered, walk="resident", asked=(whole, *sums), resident=resident)


def largest_launches(sizes: Mapping[str, Launched], all_of_them: Sequence[Workload]) -> dict[str, Launched]:
    """`sizes`, with the blocks of these workloads if they are larger."""
    result = dict(sizes)
    for launch in (launch for w in all_of_them for asked in (*w.asked, *w.around) for launch in asked.asked_launches):
        one = result.get(launch.kernel, Launched(0, 0, 0))
        result[launch.kernel] = one._replace(
            threads=max(one.threads, launch.threads), shared_bytes=max(one.shared_bytes, launch.shared)
        )
    return result
