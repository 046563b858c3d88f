"""Wall time of the MAML paper's sinusoid training loop, fastmaml against learn2learn.

The whole loop counts: sampling, meta-gradient, Adam. 25 tasks, 10 support and 10 query points, one inner step of 0.01,
Adam at 1e-3, network 1-40-40-1 (Finn et al. 2017, section 5.1). Both draw the same tasks and start from the same weights.
First, in float64, their losses must agree to 1e-8 in each of 20 iterations. Then they are timed in turn, in blocks.
With --paper only fastmaml runs, for all 70,000 iterations, by the wall clock.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

import fastmaml as fm
from bench.measure import RESULTS, facts, write_json
from bench.peers import Missing, learn2learn_maml
from fastmaml.benchmark.text import table
from fastmaml.benchmark.timing import summarise

TASKS, SHOTS, INNER_LR, OUTER_LR = 25, 10, 0.01, 1e-3
PAPER_ITERATIONS = 70_000
AGREE_ITERATIONS, AGREE_LIMIT = 20, 1e-8
PAPER_BLOCKS, SLOWDOWN = 70, 1.1  # later blocks may be slower by this factor, because no machine is quite quiet

Loop = Callable[[int], list[float]]  # continues for so many iterations and returns their losses


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, time, print, write. Returns 1 if the two loops disagree."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.paper:
        return paper_run(args.paper_iterations, args.seed, args.paper_out)
    described = facts()
    loops: dict[str, Callable[[torch.dtype, int], Loop]] = {"fastmaml": fastmaml_loop}
    absent = {}
    try:
        described["versions"]["learn2learn"] = learn2learn_maml.version()
        loops["learn2learn"] = learn2learn_loop
    except Missing as reason:
        absent["learn2learn"] = str(reason)
    apart = 0.0
    if not absent:
        losses = [make(torch.float64, args.seed)(AGREE_ITERATIONS) for make in loops.values()]
        apart = max(abs(a - b) / abs(b) for a, b in zip(*losses))
        print(f"float64: losses of {AGREE_ITERATIONS} iterations agree to {apart:.1e} (limit {AGREE_LIMIT:.0e})")
        if not apart <= AGREE_LIMIT:
            print("the loops disagree, so they are not timed", file=sys.stderr)
            return 1
    running = {name: make(torch.float32, args.seed) for name, make in loops.items()}
    samples: dict[str, list[float]] = {name: [] for name in running}
    block = max(1, args.iterations // args.blocks)
    for loop in running.values():
        loop(max(1, block // 5))  # plans, allocations and caches
    for _ in range(args.blocks):
        for name, loop in running.items():
            start = time.perf_counter()
            loop(block)
            samples[name].append((time.perf_counter() - start) / block)
    times = {name: summarise(values, block) for name, values in samples.items()}
    rows = []
    for name, value in times.items():
        hours = value.median * PAPER_ITERATIONS / 3600
        long = f"{hours:.2f} h" if hours >= 1 else f"{60 * hours:.1f} min"
        ratio = f"{value.median / times['fastmaml'].median:.1f}"
        rows.append([name, f"{1e3 * value.median:.3f}", f"{100 * value.spread:.0f} %", long, ratio])
    measured = args.blocks * block
    print(table(["sinusoid", "ms/iteration", "+-", f"{PAPER_ITERATIONS:,} iterations", "ratio"], rows))
    print(f"measured over {measured} iterations each, extrapolated to {PAPER_ITERATIONS:,}; {args.threads} threads")
    for name, why in absent.items():
        print(f"{name}: not measured, {why}")
    if args.out:
        result = {
            "what": (__doc__ or "").split("\n")[0],
            **described,
            "iterations": measured,
            "loss_agreement_float64": None if absent else apart,
            "rows": [
                {"name": name, **value.to_json(), "paper_iterations_s": value.median * PAPER_ITERATIONS,
                 "ratio_to_fastmaml": value.median / times["fastmaml"].median}
                for name, value in times.items()
            ],
            "absent": absent,
        }  # fmt: skip
        write_json(args.out, result)
    return 0


def paper_run(iterations: int, seed: int, out: str) -> int:
    """Runs all iterations of the paper. Reports the wall time, and whether later blocks are slower."""
    block = max(1, iterations // PAPER_BLOCKS)
    began = time.perf_counter()
    loop = fastmaml_loop(torch.float32, seed)
    blocks, losses = [], []
    while len(losses) < iterations:
        start = time.perf_counter()
        count = min(block, iterations - len(losses))
        losses += loop(count)
        blocks.append((time.perf_counter() - start) / count)
        if sys.stderr.isatty():
            print(f"\r{len(losses):,} of {iterations:,}", end="", file=sys.stderr, flush=True)
    wall = time.perf_counter() - began
    tenth = max(1, len(blocks) // 10)
    first, last = statistics.median(blocks[:tenth]), statistics.median(blocks[-tenth:])
    print(f"\r{iterations:,} iterations in {wall:.1f} s ({wall / 60:.2f} min), {torch.get_num_threads()} threads; query loss "
          f"{statistics.mean(losses[:100]):.3f} over the first 100, {statistics.mean(losses[-100:]):.3f} over the last")  # fmt: skip
    print(f"ms an iteration, median of blocks of {block:,}: first tenth {1e3 * first:.3f}, last tenth {1e3 * last:.3f} "
          f"({100 * (last / first - 1):+.0f} %: {'no slowdown' if last <= SLOWDOWN * first else 'SLOWER'})")  # fmt: skip
    if out:
        write_json(out, {
            "what": "The sinusoid run of the MAML paper by the wall clock: sampling, meta-gradient and Adam.", **facts(),
            "iterations": iterations, "wall_s": wall, "block": block, "first_ms": 1e3 * first, "last_ms": 1e3 * last,
            "blocks_ms": [1e3 * b for b in blocks], "loss_first": statistics.mean(losses[:100]),
            "loss_last": statistics.mean(losses[-100:]),
        })  # fmt: skip
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sinusoid", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=300, help="measured iterations of each loop (default 300)")
    parser.add_argument("--blocks", type=int, default=10, help="blocks of each loop, timed in turn (default 10)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the tasks (default 0)")
    parser.add_argument("--paper", action="store_true", help="run all 70,000 iterations with fastmaml alone")
    parser.add_argument(
        "--paper-iterations",
        type=int,
        default=PAPER_ITERATIONS,
        metavar="N",
        help="iterations of --paper (default 70,000)",
    )
    paper = str(RESULTS / "sinusoid_paper.json")
    parser.add_argument("--paper-out", default=paper, metavar="FILE", help='JSON file of --paper; "" writes none')
    parser.add_argument("--out", default=str(RESULTS / "sinusoid.json"), help='JSON file; "" writes none')
    return parser


def _start(dtype: torch.dtype, seed: int) -> tuple[nn.Module, fm.tasks.Sinusoid]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = fm.models.mlp([1, 40, 40, 1]).to(dtype)
    return model, fm.tasks.Sinusoid(shots=SHOTS, query_shots=SHOTS, seed=seed)


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=OUTER_LR, foreach=False)


def fastmaml_loop(dtype: torch.dtype, seed: int) -> Loop:
    """The training loop as fastmaml's users write it."""
    model, tasks = _start(dtype, seed)
    maml = fm.MAML(model, INNER_LR, loss="mse", backend="cpu")
    optimizer = _adam(model)

    def loop(iterations: int) -> list[float]:
        losses = []
        for _ in range(iterations):
            out = maml(*tasks.sample(TASKS).to(dtype=dtype))
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            losses.append(out.loss.item())
        return losses

    return loop


def learn2learn_loop(dtype: torch.dtype, seed: int) -> Loop:
    """The training loop of learn2learn's MAML examples."""
    model, tasks = _start(dtype, seed)
    maml = learn2learn_maml.wrapper()(model, lr=INNER_LR)
    optimizer, mse = _adam(model), nn.MSELoss()

    def loop(iterations: int) -> list[float]:
        losses = []
        for _ in range(iterations):
            total = 0.0
            optimizer.zero_grad()
            for support_x, support_y, query_x, query_y in zip(*tasks.sample(TASKS).to(dtype=dtype)):
                learner = maml.clone()
                learner.adapt(mse(learner(support_x), support_y))
                query_loss = mse(learner(query_x), query_y) / TASKS
                query_loss.backward()
                total += query_loss.item()
            optimizer.step()
            losses.append(total)
        return losses

    return loop


if __name__ == "__main__":
    sys.exit(main())
