"""W6: peak memory and time of four tasks' meta-gradient for several numbers of inner steps, each in its own process."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from bench import meta_gradient
from bench.cases import MEMORY, MEMORY_STEPS
from bench.measure import RESULTS, open_results
from fastmaml.benchmark import memory
from fastmaml.benchmark.peak import Peak, Source
from fastmaml.benchmark.peers import fastmaml_maml
from fastmaml.benchmark.text import progress

# A JAX call takes minutes here. With torch.compile the compiler's memory would count.
DEFAULT_PEERS = [name for name in meta_gradient.PEERS if "jax" not in name and "compile" not in name]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print, write. Returns 2 for a file of another run."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        results = open_results(args.out, __doc__ or "", {"seed": args.seed, "peers": args.peers}, args.again)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    versions, missing = meta_gradient.peer_versions(args.peers)
    results.content["versions"] |= versions
    peers = {name: meta_gradient.PEERS[name] for name in args.peers}
    for name in MEMORY:
        points: list[memory.Point] = []
        for steps in args.inner_steps:
            key = f"{name}-k{steps}"
            if results.done(key):
                points += [_point(value) for value in results.entries[key]["points"]]
                print(f"{key}: done before, in {args.out}")
                continue
            source = Source("fastmaml.benchmark.peak:built_in", {"case": name, "seed": args.seed, "inner_steps": steps})
            say = progress(key)
            found = memory.measure_steps(steps, points, source, peers, fastmaml_maml, "cpu", missing, say)
            say("")
            points += found
            results.save(key, {"points": [p.to_json() for p in found]})
            print(f"{key}: measured", flush=True)
        print(f"\n{MEMORY[name].network}, {MEMORY[name].tasks} tasks, {args.threads} threads\n{memory.show(points)}")
    if all(results.done(f"{name}-k{steps}") for name in MEMORY for steps in MEMORY_STEPS):
        results.finish()
    return 0


def _point(value: dict) -> memory.Point:
    peak = None if value["peak"] is None else Peak(**value["peak"])
    return memory.Point(value["name"], value["inner_steps"], peak, value["why"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.peak_memory", description=__doc__)
    steps = " ".join(map(str, MEMORY_STEPS))
    parser.add_argument(
        "--inner-steps", type=int, nargs="+", default=list(MEMORY_STEPS), metavar="K", help=f"default {steps}"
    )
    parser.add_argument("--peers", nargs="*", default=DEFAULT_PEERS, choices=list(meta_gradient.PEERS), metavar="PEER",
                        help=f"default: {', '.join(DEFAULT_PEERS)}")  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and tasks (default 0)")
    parser.add_argument("--again", action="store_true", help="forget the results of an earlier run")
    parser.add_argument("--out", default=str(RESULTS / "peak_memory.json"), help='JSON file; "" writes none')
    return parser


if __name__ == "__main__":
    sys.exit(main())
