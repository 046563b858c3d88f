"""All checks on a GPU: the tests, compute-sanitizer, and timings against the peers (`make gpu`).

Results go to one file, part by part, so an interrupted run can continue. --again forgets them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import meta_gradient
from bench.cases import CASES
from bench.measure import RESULTS, ROOT, commit, facts
from bench.peers import jax_hvp, learn2learn_maml
from fastmaml.benchmark import hvp, meta
from fastmaml.benchmark.cases import HvpCase
from fastmaml.benchmark.problem import Case, problem
from fastmaml.benchmark.results import write
from fastmaml.benchmark.timing import Clock, device_seconds
from fastmaml.compiled import loading
from fastmaml.engine import backend as choosing

SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Each op once, and whole meta-gradients in both walks with all inner optimizers. Sanitizers are a hundred times slower.
SANITIZED = ("tests/numerics/test_ops.py", "tests/numerics/test_meta_gradient.py", "tests/numerics/test_inner_loops.py")
PEERS = [name for name in meta_gradient.PEERS if name != learn2learn_maml.NAME]
HVP_PEERS = {**hvp.PEERS, **jax_hvp.PEERS}
HVPS = tuple(HvpCase(width, tasks) for width in (32, 128, 512) for tasks in (1, 16, 64))
CASES_TIMED = tuple(
    CASES[name]
    for name in ("sinusoid-k1", "sinusoid-k5", "mlp-k1", "mlp-k5", "omniglot-t8-k1", "omniglot-t8-k5", "mini-s5-t2-k1")
)


@dataclass(frozen=True)
class Target:
    """The backend to test and time. `emulated` replaces a device, to test this file without a GPU."""

    backend: str = "cuda"
    device: str = "cuda"
    clock: Clock | None = device_seconds
    tests: tuple[str, ...] = ("tests",)
    sanitized: tuple[str, ...] = SANITIZED
    cases: tuple[Case, ...] = CASES_TIMED
    hvps: tuple[HvpCase, ...] = HVPS
    precisions: tuple[str, ...] = choosing.PRECISIONS
    peers: tuple[str, ...] = tuple(PEERS)
    hvp_peers: tuple[str, ...] = tuple(HVP_PEERS)

    @property
    def selected(self) -> str:
        """pytest's -k for the tests that run on the backend."""
        return "cuda_emulated" if self.backend == "cuda_emulated" else "cuda and not cuda_emulated"


def main(argv: Sequence[str] | None = None, target: Target | None = None) -> int:
    """Returns 0 if all parts passed, 1 if one failed, 3 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="parts to run (default: all)")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each timing (default 15)")
    parser.add_argument("--out", metavar="FILE", help="JSON (default: bench/results/gpu-DEVICE.json)")
    parser.add_argument("--again", action="store_true", help="forget finished parts of an earlier run of this commit")
    args = parser.parse_args(argv)
    if target is None:
        target = Target()
        if reason := why_no_gpu():
            print(f"no GPU was found: {reason}", file=sys.stderr)
            return 3
    described = device_facts(target)
    print(", ".join(f"{key} {value}" for key, value in described.items()), flush=True)
    out = Path(args.out or RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', described['device'].lower())}.json")
    results = {} if args.again else earlier(out)
    results = {**results, "what": __doc__, **facts(), "commit": commit(), "device": described}
    parts: dict[str, Any] = results.setdefault("parts", {})
    for name in args.parts:
        if parts.get(name, {}).get("good"):
            print(f"== {name}: done before, in {out}")
            continue
        print(f"== {name}", flush=True)
        started = time.monotonic()
        parts[name] = {**PARTS[name](target, args.rounds), "seconds": time.monotonic() - started}
        write(out, results)
        print(f"   {'good' if parts[name]['good'] else 'NOT GOOD'} after {parts[name]['seconds']:.0f} s", flush=True)
    print(f"wrote {out}")
    return 0 if all(parts[name]["good"] for name in args.parts) else 1


def why_no_gpu() -> str:
    """ "" if the CUDA backend runs here, else a sentence that says why not. Builds its library if missing."""
    reason = loading.load_cuda()
    if not reason and not torch.cuda.is_available():
        reason = f"torch {torch.__version__} sees no CUDA device; install a build of torch for CUDA"
    return reason


def earlier(out: Path) -> dict[str, Any]:
    """The results of an earlier run of the same commit. Empty for another commit or a changed tree."""
    if not out.is_file():
        return {}
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found if found.get("commit") == commit() and not commit().endswith("+changes") else {}


def device_facts(target: Target) -> dict[str, Any]:
    """The device's name, capability, driver and clocks."""
    if target.device != "cuda":
        return {"device": f"none, {target.backend} in its place"}
    properties = torch.cuda.get_device_properties(0)
    found = {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }
    asked = (
        "driver_version",
        "clocks.sm",
        "clocks.max.sm",
        "clocks.mem",
        "power.limit",
        "clocks_throttle_reasons.active",
    )
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        found |= dict(zip(asked, (word.strip() for word in answer.split(","))))
    return found


# ---------------------------------------------------------------- parts


def run_tests(target: Target, rounds: int) -> dict[str, Any]:
    """The test suite on the device."""
    return _pytest([sys.executable], target.tests, target.selected)


def run_sanitizers(target: Target, rounds: int) -> dict[str, Any]:
    """compute-sanitizer's four tools over a part of the tests."""
    folders = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders), "/usr/local/cuda/bin"])
    program = shutil.which("compute-sanitizer", path=places)
    if program is None:
        return {"good": False, "why": "compute-sanitizer is neither on the PATH nor in CUDA_HOME"}
    found: dict[str, Any] = {}
    for tool in SANITIZERS:
        command = [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", sys.executable]
        # Without torch's cache every tensor is a separate allocation, so memcheck knows its bounds.
        found[tool] = _pytest(command, target.sanitized, target.selected, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        print(f"   {tool}: {found[tool]['summary']}", flush=True)
    return {"good": all(tool["good"] for tool in found.values()), "tools": found}


def _pytest(
    command: list[str], tests: Sequence[str], selected: str, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    whole = [*command, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not race", "-k", selected, *tests]
    done = subprocess.run(
        whole, cwd=ROOT, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )
    lines = (done.stdout + done.stderr).strip().splitlines()
    summary = next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error)", line)), "no test ran")
    good = done.returncode == 0 and " passed" in summary
    return {"good": good, "summary": summary.strip("= "), **({} if good else {"end": lines[-60:]})}


def time_meta_gradients(target: Target, rounds: int) -> dict[str, Any]:
    """The cases of bench.meta_gradient. Each implementation is first compared with the exact result."""
    versions, missing = meta_gradient.peer_versions(target.peers)
    how = meta.How(rounds, target.backend, device=target.device, clock=target.clock)
    measured = []
    for case in target.cases:
        result = meta.measure(problem(case), {name: meta_gradient.PEERS[name] for name in target.peers}, how, missing)
        print("\n" + meta.show(result), flush=True)
        measured.append(meta.to_json(result))
    good = all(any(row["name"] == meta.OURS for row in case["rows"]) for case in measured)
    return {"good": good, "versions": versions, "cases": measured}


def time_hvps(target: Target, rounds: int) -> dict[str, Any]:
    """The products of fastmaml.benchmark.hvp."""
    how = hvp.How(rounds, target.backend, target.device, clock=target.clock, precisions=target.precisions)
    measured = []
    for case in target.hvps:
        result = hvp.measure(hvp.problem(case), {name: HVP_PEERS[name] for name in target.hvp_peers}, how)
        print("\n" + hvp.show(result), flush=True)
        measured.append(hvp.to_json(result))
    return {"good": all(any(row["name"] == meta.OURS for row in case["rows"]) for case in measured), "cases": measured}


PARTS = {
    "tests": run_tests,
    "sanitizers": run_sanitizers,
    "meta-gradients": time_meta_gradients,
    "hvps": time_hvps,
}


if __name__ == "__main__":
    sys.exit(main())
