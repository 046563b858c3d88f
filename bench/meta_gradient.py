"""Times one meta-gradient of every implementation on every case (W1 to W4), after each one's result has agreed with the exact one."""

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
what it does
  Every implementation gets the same weights and the same tasks. First its result is held to the exact one, an unrolled
  float64 loop (fastmaml/checking/oracle.py): run in float64 it must agree to 1e-8, in float32 to 1e-2 or ten times plain
  torch's own error. One that disagrees, cannot be had or cannot run a case is named with the reason and not timed. Then
  all are timed in turn in this process, round by round, so that a busy machine hits all alike. A sample during which
  other processes had more than a tenth of the machine is taken again, at most once a round on average.
  Each case is written as it is done; the same command goes on with the next one.

what the columns mean
  ms        median over the rounds of one meta-gradient (all tasks), +- half the distance between the quartiles
  tasks/s   tasks of one meta-gradient over the median
  GFLOP/s   arithmetic of the matrix products (gradient 3F - F1, exact inner step 9F - 5F1; recomputation does not count)
            over the median; beside it its share of a 1,024 cubed sgemm that takes its turn in the same rounds
  MiB       peak memory above what the process held before, each implementation in a process of its own
  error     of loss and meta-gradient against the exact ones, in float64 and in float32
  others    share of the machine that other processes had during the samples (median)
  ratio     how many times faster fastmaml is: the row's median over fastmaml's

peers
  torch_loop, torch_func and fo_rev_torch are plain torch; learn2learn, higher and torchopt are fetched by pip into the
  cache folder ($FASTMAML_CACHE/peers) where they are not installed; jax is measured where it is installed.
  Without --peers all are measured, but torch_func+compile (a minute or two of compilation) on W1 and W2 only, and the
  JAX ones (minutes of compilation and calls of 10 to 30 s on convolutions) on three of the Conv4 cases.

other benchmarks: python -m bench.hvp, bench.arena, bench.learners, bench.policy, bench.scaling, bench.startup,
bench.sinusoid, bench.divergence, each with --help; python -m bench runs them; python -m bench.tables makes the tables
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print, write. 1 if fastmaml itself could not be measured on some case, 2 for a file of another run."""
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
    print(
        f"a case has {args.budget:.0f} s for its samples; what does not get {args.rounds} rounds in its share has fewer"
    )
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
    """A peer that asks for more memory than the machine has fails, and is named with that, and the other rows stay."""
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
    """Why a peer is not measured on a case unless --peers names it; "" where it is."""
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
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"W1 to W4, or of {', '.join(CASES)}; default: all")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each implementation (default 15)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default 2)")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), metavar="PEER", help=f"of {', '.join(PEERS)}")
    parser.add_argument(
        "--budget", type=float, default=180.0, metavar="S", help="of the samples of one case (default 180)"
    )
    parser.add_argument("--backend", default="cpu", help="fastmaml's backend (default cpu)")
    parser.add_argument("--memory", default="auto", choices=("auto", "low", "stash"), help="fastmaml's memory mode")
    parser.add_argument("--quick", action="store_true", help="leave JAX out of all convolutions")
    parser.add_argument("--no-peak", action="store_true", help="leave out peak memory, a process for each row")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tasks")
    parser.add_argument("--again", action="store_true", help="forget what an earlier run has measured")
    parser.add_argument("--out", default=str(RESULTS / "meta.json"), help='JSON file; "" writes none')
    return parser


def peer_versions(peers: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The versions of the peers that can be had, and why others cannot."""
    versions, missing = {}, {}
    for name in peers:
        try:
            versions[name] = PEERS[name].version()
        except Missing as reason:
            missing[name] = str(reason)
    return versions, missing


if __name__ == "__main__":
    sys.exit(main())
