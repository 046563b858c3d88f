"""The cost of the start: importing fastmaml on top of torch, and the first meta-gradient against later ones.

Medians over several fresh processes. The compiled module and Python's bytecode exist already, as after pip install.
(With PYTHONDONTWRITEBYTECODE every process would compile the Python sources again.)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import torch

from bench.cases import CASES
from bench.measure import RESULTS, facts, write_json
from fastmaml.benchmark.text import table

IMPORTED = """
import time
a = time.perf_counter()
import torch
b = time.perf_counter()
import fastmaml
c = time.perf_counter()
print([b - a, c - b])
"""
FIRST_CALL = """
import gc, sys, time
from fastmaml.benchmark.peers import fastmaml_maml
from fastmaml.benchmark.cases import META
from fastmaml.benchmark.problem import problem
import torch
torch.set_num_threads(int(sys.argv[2]))
given = problem(META[sys.argv[1]])
torch.mm(torch.ones(64, 64), torch.ones(64, 64))
times, collections = [], []
def collecting(phase, info):
    collections.append(time.perf_counter() * (1 if phase == "stop" else -1))
gc.callbacks.append(collecting)
start = time.perf_counter()
call = fastmaml_maml.prepare(given)
for _ in range(6):
    call()
    times.append(time.perf_counter() - start)
    if len(times) == 1:
        collected = sum(collections)
    start = time.perf_counter()
print([times[0], sorted(times[1:])[2], collected])
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print, write."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as bytecode:
        return _measure(args, bytecode)


def _measure(args: argparse.Namespace, bytecode: str) -> int:
    torch_s, ours_s = _medians(IMPORTED, [], args.processes, bytecode)
    print(f"import torch {torch_s:.2f} s, import fastmaml beyond it {ours_s:.3f} s ({args.processes} processes)")
    rows = []
    for name in args.cases:
        first, later, collected = _medians(FIRST_CALL, [name, str(args.threads)], args.processes, bytecode)
        rows.append({"case": name, "first_ms": 1e3 * first, "later_ms": 1e3 * later, "extra_ms": 1e3 * (first - later),
                     "collector_ms": 1e3 * collected})  # fmt: skip
    keys = ("first_ms", "later_ms", "extra_ms", "collector_ms")
    print(table(["first call", "ms", "later, ms", "more, ms", "of it collector, ms"],
                [[r["case"], *(f"{r[key]:.4g}" for key in keys)] for r in rows]))  # fmt: skip
    print(
        "The first call includes making the learner: tracing the module, planning, allocating. It may also include Python's"
    )
    print("garbage collector, which looks through all objects of torch's import, in this call or in another one.")
    if args.out:
        what = (__doc__ or "").split("\n")[0]
        imports = {"import_torch_s": torch_s, "import_fastmaml_s": ours_s, "processes": args.processes}
        write_json(args.out, {"what": what, **facts(), **imports, "rows": rows})
    return 0


def _medians(program: str, arguments: list[str], processes: int, bytecode: str) -> list[float]:
    """Medians of the numbers that a program prints, over `processes` runs. An extra first run writes the bytecode."""
    found = []
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = bytecode
    for _ in range(1 + processes):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True,
                              env=environment)  # fmt: skip
        found.append(json.loads(done.stdout.strip().split("\n")[-1]))
    return [statistics.median(column) for column in zip(*found[1:])]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.startup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=["sinusoid-k1", "mlp-k1", "omniglot-t8-k1"], choices=list(CASES),
                        metavar="CASE", help="cases of the first call (default sinusoid-k1 mlp-k1 omniglot-t8-k1)")  # fmt: skip
    parser.add_argument("--processes", type=int, default=7, help="fresh processes per measurement (default 7)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default 2)")
    parser.add_argument("--out", default=str(RESULTS / "startup.json"), help='JSON file; "" writes none')
    return parser


if __name__ == "__main__":
    sys.exit(main())
