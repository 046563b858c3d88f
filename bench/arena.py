"""Memory of one task in flight in the meta-gradient of Conv4-64 (28x28, 5-way), for several numbers of inner steps K.

With memory="low" the adjoint sweep recomputes activations. So the arena may only grow by the K - 1 further parameter
vectors phi[k]: (K - 1) x P x 4 bytes. The arena is planned first, and a worker allocates exactly the planned size. The
figures come from the plan. For comparison, "stash" keeps the activations of every inner step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

import fastmaml as fm
from bench.measure import RESULTS, facts, write_json
from fastmaml.benchmark.text import table

CACHE_LINE = 64  # every slot of the arena is aligned to it, so a parameter vector may take up to 63 bytes more
MIB = 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, plan, print, write. Returns 1 if the arena of memory="low" grows by more than phi."""
    args = _parser().parse_args(argv)
    model = fm.models.conv4(ways=5, filters=args.filters)
    arena = {
        memory: [arena_bytes(model, 5 * args.shots, 5 * args.query_shots, steps, memory) for steps in args.inner_steps]
        for memory in ("low", "stash")
    }
    size = sum(p.numel() for p in model.parameters())
    rows, explained = [], True
    first = args.inner_steps[0]
    for i, steps in enumerate(args.inner_steps):
        grown, phi = arena["low"][i] - arena["low"][0], (steps - first) * size * 4
        explained &= 0 <= grown - phi < CACHE_LINE * max(1, steps - first)
        rows.append({"inner_steps": steps, "low_bytes": arena["low"][i], "low_growth_bytes": grown, "phi_bytes": phi,
                     "stash_bytes": arena["stash"][i]})  # fmt: skip
    head = ["K", "arena, low", f"growth over K={first}", f"(K - {first}) x P x 4", "arena, stash"]
    print(
        f"Conv4-{args.filters}, P = {size:,}, {5 * args.shots} support and {5 * args.query_shots} query images, one task, MiB"
    )
    print(table(head, [[str(row["inner_steps"]), *(f"{row[key] / MIB:.3f}" for key in list(row)[1:])] for row in rows]))
    print("only phi grows" if explained else "phi does NOT explain the growth")
    if args.out:
        shape = {"filters": args.filters, "parameters": size, "support": 5 * args.shots, "query": 5 * args.query_shots}
        what = (__doc__ or "").split("\n")[0]
        write_json(args.out, {"what": what, **facts(), **shape, "rows": rows, "explained_by_phi": explained})
    return 0 if explained else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.arena", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inner-steps", type=int, nargs="+", default=[1, 5, 20], metavar="K", help="default 1 5 20")
    parser.add_argument("--filters", type=int, default=64, help="filters of Conv4 (default 64)")
    parser.add_argument("--shots", type=int, default=1, help="support images per class (default 1)")
    parser.add_argument("--query-shots", type=int, default=15, help="query images per class (default 15)")
    parser.add_argument("--out", default=str(RESULTS / "memory.json"), help='JSON file; "" writes none')
    return parser


def arena_bytes(model: torch.nn.Module, support: int, query: int, inner_steps: int, memory: str) -> int:
    """The arena that one worker takes for one task of 28x28 images in float32."""
    engine = fm.Engine(model, backend="cpu")
    program = engine.program(torch.zeros(1, support, 1, 28, 28))
    assert program is not None, engine.why
    from fastmaml import _C

    return _C.arena_bytes(
        program.text, "meta_gradient", backend="cpu", real_bytes=4,
        support_examples=support, query_examples=query, loop=f"steps={inner_steps}", memory=memory,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
