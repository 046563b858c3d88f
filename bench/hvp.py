"""W5: Hessian-vector products of an MLP or Conv4, every task with its own weights, against the peers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from bench.measure import RESULTS, open_results
from bench.peers import jax_hvp
from fastmaml.benchmark import hvp
from fastmaml.benchmark.cases import HVP, HvpCase
from fastmaml.benchmark.text import progress

PEERS = {**hvp.PEERS, **jax_hvp.PEERS}
REPEATED = {**hvp.REPEATED, **jax_hvp.REPEATED}
COMPILED = "func_jvp+compile"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print, write. Returns 2 for a file of another run."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    settings = {"rounds": args.rounds, "seed": args.seed, "backend": args.backend, "budget": args.budget}
    try:
        results = open_results(args.out, __doc__ or "", settings | {"peers": args.peers or "by default"}, args.again)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for name in args.cases or HVP:
        if results.done(name):
            print(f"{name}: done before, in {args.out}")
            continue
        case = HVP[name]
        how = hvp.How(args.rounds, args.backend, budget_s=args.budget, repeated=case.repeated)
        missing = {} if args.peers else {peer: why for peer in PEERS if (why := why_not(case, peer))}
        peers = {peer: PEERS[peer] for peer in args.peers or PEERS}
        say = progress(name)
        result = hvp.measure(hvp.problem(case, args.seed), peers, how, missing, say, REPEATED)
        say("")
        results.save(name, hvp.to_json(result))
        print("\n" + hvp.show(result), flush=True)
    if all(results.done(name) for name in HVP):
        results.finish()
    return 0


def why_not(case: HvpCase, peer: str) -> str:
    """Why a peer is not measured on a case by default; "" if it is."""
    if peer == COMPILED and not case.compiled:
        return f"half a minute to compile; --peers {COMPILED} measures it"
    if peer in jax_hvp.PEERS and not case.common:
        return "slow on convolutions, measured on the smaller cases"
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.hvp", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", choices=[*HVP, []], help=f"of {', '.join(HVP)}")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each implementation (default 15)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default 2)")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), metavar="PEER", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--budget", type=float, default=60.0, metavar="S", help="seconds to time one case (default 60)")
    parser.add_argument("--backend", default="cpu", help="fastmaml's backend (default cpu)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, examples and directions (default 0)")
    parser.add_argument("--again", action="store_true", help="forget the results of an earlier run")
    parser.add_argument("--out", default=str(RESULTS / "hvp.json"), help='JSON file; "" writes none')
    return parser


if __name__ == "__main__":
    sys.exit(main())
