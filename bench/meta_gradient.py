"""Times one meta-gradient of every implementation on every case (W1 to W4), after checking it against the exact result."""

from __future__ import annotations

import argparse
import os
import resource
import sys
from collections.abc import Iterable, Sequence

import torch

from bench.cases import CASES, WORKLOADS
from bench.measure import RESULTS, facts, open_results
from bench.peers import (
    Missing,
    higher_loop,
    jax_fo_rev,
    jax_fo_rev_map,
    jax_grad,
    jax_map,
    learn2learn_maml,
    torchopt_metasgd,
)
from fastmaml.benchmark import meta
from fastmaml.benchmark.peak import Source
from fastmaml.benchmark.peers import Implementation
from fastmaml.benchmark.problem import Case, problem
from fastmaml.benchmark.text import progress

OURS = meta.OURS
_JAX = (jax_grad, jax_map, jax_fo_rev, jax_fo_rev_map)
PEERS: dict[str, Implementation] = {
    "torch_loop": meta.PEERS["torch_loop"],
    **{m.NAME: m for m in (learn2learn_maml, higher_loop, torchopt_metasgd)},
    **meta.PEERS,
    **{m.NAME: m for m in _JAX},
}

HELP = """
method
  Every implementation gets the same weights and tasks. First its result is compared with an unrolled float64 loop
  (fastmaml/checking/oracle.py). In float64 it must agree to 1e-8. In float32 it must agree to 1e-2, or to ten times plain
  torch's own error. An implementation that disagrees, is not available or cannot run a case is listed with the reason
  and not timed. The others are timed in turn in this process, round by round, so a busy machine hits all. A sample is
  repeated if other processes used more than a tenth of the machine, at most once per round on average.
  Each case is written when it is done. Repeat the command to continue with the next one.

columns
  ms        median time of one meta-gradient (all tasks), +- half the distance between the quartiles
  tasks/s   tasks of one meta-gradient over the median
  GFLOP/s   arithmetic of the matrix products over the median (gradient 3F - F1, exact inner step 9F - 5F1, without
            recomputation); next to it the share of a 1,024 cubed sgemm, timed in the same rounds
  MiB       rise of the peak memory during the call, each implementation in its own process
  error     of loss and meta-gradient against the exact ones, in float64 and in float32
  others    share of the machine that other processes used during the samples (median)
  ratio     how many times faster fastmaml is: the row's median over fastmaml's

peers
  torch_loop, torch_func and fo_rev_torch are plain torch. If learn2learn, higher and torchopt are not installed, pip
  downloads them into the cache folder ($FASTMAML_CACHE/peers). jax is measured if it is installed.
  By default all peers are measured, with two exceptions. torch_func+compile (a minute or two of compilation) runs on W1
  and W2 only. JAX (minutes of compilation, and calls of 10 to 30 s on convolutions) runs on three Conv4 cases.

other benchmarks: python -m bench.hvp, bench.arena, bench.learners, bench.policy, bench.scaling, bench.startup,
bench.sinusoid, bench.divergence, each with --help. python -m bench runs them all; python -m bench.tables makes the tables.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print, write. Returns 1 if fastmaml could not be measured on a case, 2 for a file of another run."""
    parser = _parser()
    args = parser.parse_args(argv)
    names = [name for given in args.cases or CASES for name in WORKLOADS.get(given, (given,))]
    for name in names:
        if name not in CASES:
            parser.error(f"there is no case {name!r}; there are W1 to W4 and {', '.join(CASES)}")
    torch.set_num_threads(args.threads)
    _keep_from_being_killed()
    settings = {key: getattr(args, key) for key in ("rounds", "seed", "backend", "memory", "budget")}
    settings |= {"peers": args.peers or "by default", "peak_memory": not args.no_peak, "quick": args.quick}
    try:
        results = open_results(args.out, __doc__ or "", settings, args.again)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    described = facts()
    print(", ".join(f"{key} {described[key]}" for key in ("machine", "threads", "instruction_set", "commit", "load")
                    if key in described))  # fmt: skip
    print(f"a case has {args.budget:.0f} s for its samples; slow implementations get fewer than {args.rounds} rounds")
    versions, missing = peer_versions(args.peers or PEERS)
    results.content["versions"] |= versions
    how = meta.How(args.rounds, args.backend, args.memory, budget_s=args.budget, peak=not args.no_peak)
    good = True
    for name in names:
        if results.done(name):
            print(f"{name}: done before, in {args.out}")
            continue
        result = _measure(CASES[name], args, how, missing)
        good &= bool(result.rows) and result.rows[0].name == OURS
        results.save(name, meta.to_json(result))
        print("\n" + meta.show(result), flush=True)
    if all(results.done(name) for name in CASES):
        results.finish()
    return 0 if good else 1


def _keep_from_being_killed() -> None:
    """Makes a peer that needs too much memory fail with an error, so the other rows survive."""
    of_machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    most = 9 * of_machine // 10
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _measure(case: Case, args: argparse.Namespace, how: meta.How, missing: dict[str, str]) -> meta.Result:
    chosen = {name: PEERS[name] for name in args.peers or PEERS}
    left_out = {} if args.peers else {name: reason for name in PEERS if (reason := why_not(case, name, args.quick))}
    source = Source("fastmaml.benchmark.peak:built_in", {"case": case.name, "seed": args.seed})
    say = progress(case.name)
    result = meta.measure(problem(case, args.seed), chosen, how, {**left_out, **missing}, say, source)
    say("")
    return result


def why_not(case: Case, peer: str, quick: bool = False) -> str:
    """Why a peer is not measured on a case by default; "" if it is."""
    if quick and peer in {m.NAME for m in _JAX} and case.workload not in ("W1", "W2"):
        return "left out by --quick: minutes of compilation and calls of 10 to 30 s"
    if peer == "torch_func+compile" and case.workload not in ("W1", "W2"):
        return "minutes to compile; --peers torch_func+compile --out FILE measures it"
    if peer in {m.NAME for m in _JAX} and not case.common:
        measured = [name for name, other in CASES.items() if other.common and other.workload == case.workload]
        return f"slow on convolutions, measured on {' and '.join(measured)}"
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.meta_gradient",
        description=__doc__,
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"W1 to W4, or some of {', '.join(CASES)} (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="samples of each implementation (default 15)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default 2)")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), metavar="PEER", help=f"of {', '.join(PEERS)}")
    parser.add_argument(
        "--budget", type=float, default=180.0, metavar="S", help="seconds to time one case (default 180)"
    )
    parser.add_argument("--backend", default="cpu", help="fastmaml's backend (default cpu)")
    parser.add_argument("--memory", default="auto", choices=("auto", "low", "stash"), help="fastmaml's memory mode")
    parser.add_argument("--quick", action="store_true", help="skip JAX on all convolutions")
    parser.add_argument("--no-peak", action="store_true", help="skip peak memory, which needs a process per row")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and tasks (default 0)")
    parser.add_argument("--again", action="store_true", help="forget the results of an earlier run")
    parser.add_argument("--out", default=str(RESULTS / "meta.json"), help='JSON file; "" writes none')
    return parser


def peer_versions(peers: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The versions of the available peers, and why others are missing."""
    versions, missing = {}, {}
    for name in peers:
        try:
            versions[name] = PEERS[name].version()
        except Missing as reason:
            missing[name] = str(reason)
    return versions, missing


if __name__ == "__main__":
    sys.exit(main())
