"""Peak memory of one implementation on one problem, in its own process: the rise of VmHWM during the call.

The process first runs the implementation on a tiny network, to load modules, thread pools and their buffers. So these
do not count, but the memory of a compiler for the problem itself does.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastmaml.benchmark.exact import in_a_line
from fastmaml.benchmark.peers import Implementation, Missing
from fastmaml.benchmark.problem import Case, problem

FEW_CALLS_S = 2.0  # seconds to repeat calls for timing
POLL_S = 0.02
ERROR_KEY = "error"


class Source(NamedTuple):
    """How another process builds the same problem: `module:function`, called with the keyword arguments."""

    function: str
    arguments: dict[str, Any]


class Peak(NamedTuple):
    """The measurements of one process."""

    bytes: int
    seconds: float  # median of a few calls, alone in that process
    first_call_s: float


def in_a_process(
    implementation: Implementation,
    source: Source,
    options: dict[str, Any] | None = None,
    device: str = "cpu",
    limit_bytes: int | None = None,
    limit_s: float = 600.0,
) -> Peak:
    """Measure in a new process. Raises Missing if it fails, exceeds limit_bytes of memory or takes longer than limit_s.

    limit_bytes: default three quarters of the machine's free memory. On a CUDA device the peak is that of torch's
    allocations on the device.
    """
    limit = limit_bytes or 3 * _meminfo("MemAvailable") // 4
    order = {
        "implementation": implementation.__name__,
        "source": list(source),
        "options": options or {},
        "device": device,
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", "fastmaml.benchmark.peak", json.dumps(order)]
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        try:
            while True:
                try:
                    out, err = child.communicate(timeout=POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    if _status("VmRSS", child.pid) > limit:
                        raise Missing(f"needs more than the {limit / 2**30:.1f} GiB it was given") from None
                    if time.monotonic() - started > limit_s:
                        raise Missing(f"took longer than the {limit_s:.0f} s it was given") from None
        except BaseException:
            child.kill()
            raise
    try:
        answer = json.loads(out.strip().split("\n")[-1])
    except ValueError:
        raise Missing(f"its process ended: {(err.strip() or 'without a word').splitlines()[-1]}") from None
    if ERROR_KEY in answer:
        raise Missing(answer[ERROR_KEY])
    return Peak(answer["bytes"], answer["seconds"], answer["first_call_s"])


def main(order: dict[str, Any]) -> dict[str, Any]:
    """The work of the new process."""
    torch.set_num_threads(order["threads"])
    module = importlib.import_module(order["implementation"])
    where, _, name = order["source"][0].partition(":")
    device = order["device"]
    given = getattr(importlib.import_module(where), name)(**order["source"][1]).to(device)
    try:
        module.version()
        module.prepare(problem(TINY).to(device), **order["options"])()
        held = restart_high_water(device)
        started = time.perf_counter()
        call = module.prepare(given, **order["options"])
        call()
        first = time.perf_counter() - started
        times: list[float] = []
        while not times or (sum(times) < FEW_CALLS_S and len(times) < 5):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return {"bytes": high_water(device) - held, "seconds": statistics.median(times), "first_call_s": first}
    except Missing as reason:
        return {ERROR_KEY: str(reason)}
    except Exception as failure:
        return {ERROR_KEY: in_a_line(failure)}


def built_in(case: str, seed: int = 0, **changes: Any) -> Any:
    """The problem of a built-in case. changes: other numbers of tasks or steps. A Source names this function."""
    from dataclasses import replace

    from fastmaml.benchmark.cases import BY_NAME

    return problem(replace(BY_NAME[case], **changes), seed)


def _tiny_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))


TINY = Case("tiny", "MLP 1-4-1", _tiny_model, "mse", (1,), None, 2, 3, 3, 0.01)


# ---------------------------------------------------------------- what Linux says of a process


def restart_high_water(device: str = "cpu") -> int:
    """Resets this process' high-water mark. Returns the bytes it holds now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def high_water(device: str = "cpu") -> int:
    """The peak in bytes since the reset: resident memory, or torch's allocations on a device."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(key: str, pid: int | str = "self") -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0  # the process has ended
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0)


def _meminfo(key: str) -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
