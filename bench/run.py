"""Times one meta-gradient of every implementation on every case, after each one's result has agreed with the exact answer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from bench.baselines import (
    Missing,
    fastmaml_maml,
    higher_loop,
    jax_grad,
    learn2learn_maml,
    torch_func,
    torch_func_compiled,
    torch_loop,
)
from bench.cases import CASES, Case, Problem, arithmetic, problem
from bench.measure import RESULTS, Call, Clock, Times, error, exact, facts, interleaved, table, write_json

PEERS = {m.NAME: m for m in (torch_loop, learn2learn_maml, higher_loop, torch_func, jax_grad, torch_func_compiled)}
DEFAULT_PEERS = [name for name in PEERS if name != torch_func_compiled.NAME]
OURS = fastmaml_maml.NAME
IMPLEMENTATIONS = {OURS: fastmaml_maml, **PEERS}

# In float64 a right method agrees to rounding, which batch norm and the inner steps amplify. In float32 ReLU masks and
# pooling choices that fall the other way move a meta-gradient by up to about 1e-2, whatever computes it; where they move
# plain torch further, it is the yardstick.
FLOAT64_LIMIT = 1e-8
FLOAT32_LIMIT = 1e-2
FLOAT32_OF_PLAIN = 10.0

HELP = """
what it does
  Every implementation gets the same weights and the same tasks. First its result is held to the exact one, an unrolled
  float64 loop (tests/oracle.py): run in float64 it must agree to 1e-8, in float32 to 1e-2 or ten times plain torch's own
  error. One that disagrees, cannot be fetched or cannot run a case is named with the reason and not timed. Then all are
  timed in turn in this process, round by round, so that a busy machine hits all alike.

what the columns mean
  ms        median over the rounds of one meta-gradient (all tasks), +- half the distance between the quartiles
  tasks/s   tasks of one meta-gradient over the median
  GFLOP/s   arithmetic of the matrix products (gradient 3F - F1, exact inner step 9F - 5F1; recomputation does not count)
            over the median; in brackets its share of a 1,024 cubed sgemm that takes its turn in the same rounds
  error     of loss and meta-gradient against the exact ones, in float64 and in float32
  ratio     how many times faster fastmaml is: the row's median over fastmaml's

peers
  torch_loop is always there. learn2learn and higher are fetched by pip into the cache folder ($FASTMAML_CACHE/peers) on
  first use, never into the environment; jax is measured where it is installed, on the linear networks;
  torch_func+compile (40 s of compilation a case) where --peers names it.

other benchmarks: python -m bench.sinusoid, bench.divergence, bench.memory, each with --help
"""


class Row(NamedTuple):
    """One implementation on one case: measured and agreed."""

    name: str
    error64: float
    error32: float
    times: Times


class Result(NamedTuple):
    """One case: its rows, ours first, and why others have none."""

    case: Case
    gflop: float
    sgemm_gflops: float
    rows: list[Row]
    absent: dict[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print, write. 1 if fastmaml itself could not be measured on some case."""
    parser = _parser()
    args = parser.parse_args(argv)
    for name in args.cases:
        if name not in CASES:
            parser.error(f"there is no case {name!r}; there are {', '.join(CASES)}")
    torch.set_num_threads(args.threads)
    described = facts()
    print(", ".join(f"{key} {described[key]}" for key in ("machine", "threads", "instruction_set", "commit", "load")
                    if key in described))  # fmt: skip
    versions, missing = _versions(args.peers)
    results = []
    for name in args.cases or CASES:
        results.append(measure(CASES[name], args.peers, args.rounds, args.seed, args.backend, args.memory, missing))
        print("\n" + show(results[-1]), flush=True)
    described["versions"] |= versions
    settings = {"rounds": args.rounds, "seed": args.seed, "backend": args.backend, "memory": args.memory}
    if args.out != "":
        print()
        write_json(args.out, {"what": __doc__, **described, **settings, "cases": [to_json(r) for r in results]})
    return 0 if all(result.rows and result.rows[0].name == OURS for result in results) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.run",
        description=__doc__,
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each implementation (default 15)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default 2)")
    parser.add_argument("--peers", nargs="*", default=DEFAULT_PEERS, choices=list(PEERS), metavar="PEER",
                        help=f"of {', '.join(PEERS)}; default: all but the last")  # fmt: skip
    parser.add_argument("--backend", default="cpu", help="fastmaml's backend (default cpu)")
    parser.add_argument("--memory", default="auto", choices=("auto", "low", "stash"), help="fastmaml's memory mode")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tasks")
    parser.add_argument("--out", default=str(RESULTS / "meta.json"), help='JSON file; "" writes none')
    return parser


def _versions(peers: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The versions of the peers that can be had, and why others cannot."""
    versions, missing = {}, {}
    for name in peers:
        try:
            versions[name] = PEERS[name].version()
        except Missing as reason:
            missing[name] = str(reason)
    return versions, missing


def measure(
    case: Case,
    peers: Sequence[str],
    rounds: int,
    seed: int = 0,
    backend: str = "cpu",
    memory: str = "auto",
    missing: dict[str, str] | None = None,
    device: str = "cpu",
    clock: Clock | None = None,
) -> Result:
    """Check, then time, fastmaml and the peers on one case. `missing`: peers that cannot be had, with the reason."""
    single = problem(case, seed)
    answer = exact(single)
    single = single.to(device)
    double = single.double()
    yardstick = error(torch_loop.prepare(single)(), answer)
    calls: dict[str, Call] = {}
    errors: dict[str, tuple[float, float]] = {}
    absent = dict(missing or {})
    for name in [OURS, *(peer for peer in peers if peer not in absent)]:
        try:
            found = error(_prepare(name, double, backend, memory)(), answer)
            call = _prepare(name, single, backend, memory)
            errors[name] = found, error(call(), answer)
        except Missing as reason:
            absent[name] = str(reason)
            continue
        except Exception as failure:  # another library's; ours ends the run
            if name == OURS:
                raise
            absent[name] = f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure) else ''}"
            continue
        complaint = disagreement(*errors[name], yardstick)
        if complaint:
            absent[name] = complaint
        else:
            calls[name] = call
    a = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(seed)).to(device)
    out = torch.empty_like(a)
    torch.mm(a, a, out=out)  # starts the threads
    times = interleaved({**calls, "sgemm": lambda: torch.mm(a, a, out=out)}, rounds, clock=clock)
    rows = [Row(name, *errors[name], times[name]) for name in calls]
    return Result(case, arithmetic(single) / 1e9, 2 * 1.024**3 / times["sgemm"].median, rows, absent)


def _prepare(name: str, problem: Problem, backend: str, memory: str) -> Call:
    if name == OURS:
        return fastmaml_maml.prepare(problem, backend, memory)
    return PEERS[name].prepare(problem)


def disagreement(error64: float, error32: float, yardstick: float) -> str:
    """Why a result is not accepted; "" if it is. `yardstick`: plain torch's own error in float32."""
    if error64 > FLOAT64_LIMIT:
        return f"disagrees with the exact result in float64, relative error {error64:.1e}"
    limit = max(FLOAT32_LIMIT, FLOAT32_OF_PLAIN * yardstick)
    if error32 > limit:
        return f"disagrees with the exact result in float32, relative error {error32:.1e} (limit {limit:.1e})"
    return ""


def show(result: Result) -> str:
    """The table of one case."""
    case = result.case
    head = [case.name, "ms", "+-", "tasks/s", "GFLOP/s", "error 64", "error 32", "ratio"]
    ours = next((row.times.median for row in result.rows if row.name == OURS), None)
    rows = []
    for row in result.rows:
        rate = result.gflop / row.times.median
        rows.append([
            row.name, f"{1e3 * row.times.median:.4g}", f"{100 * row.times.spread:.0f} %", f"{case.tasks / row.times.median:.4g}",
            f"{rate:.1f} ({100 * rate / result.sgemm_gflops:.0f} %)", f"{row.error64:.0e}", f"{row.error32:.0e}",
            f"{row.times.median / ours:.2f}" if ours else "",
        ])  # fmt: skip
    title = (
        f"{case.network}, {case.tasks} tasks, {case.support} support, {case.query} query, K = {case.inner_steps}, float32, "
        f"{torch.get_num_threads()} threads, sgemm {result.sgemm_gflops:.0f} GFLOP/s"
    )
    notes = [f"{name}: not measured, {reason}" for name, reason in result.absent.items()]
    return "\n".join([title, table(head, rows), *notes])


def to_json(result: Result) -> dict[str, Any]:
    """The content of one case for the result file."""
    case = result.case
    ours = next((row.times.median for row in result.rows if row.name == OURS), None)
    rows = []
    for row in result.rows:
        rate = result.gflop / row.times.median
        rows.append({
            "name": row.name, **row.times.to_json(), "tasks_per_s": case.tasks / row.times.median, "gflop_per_s": rate,
            "share_of_sgemm": rate / result.sgemm_gflops, "error_float64": row.error64, "error_float32": row.error32,
            "ratio_to_fastmaml": row.times.median / ours if ours else None,
        })  # fmt: skip
    facts = {"case": case.name, "network": case.network, "tasks": case.tasks, "support": case.support,
             "query": case.query, "inner_steps": case.inner_steps, "inner_lr": case.inner_lr}  # fmt: skip
    return facts | {
        "gflop": result.gflop,
        "sgemm_gflop_per_s": result.sgemm_gflops,
        "rows": rows,
        "absent": result.absent,
    }


if __name__ == "__main__":
    sys.exit(main())
