"""Scaling of fastmaml's meta-gradient: time against tasks, inner steps, examples, width and threads, as log-log slopes.

For large sizes the slope should be 1, and 2 for width. The slope is fitted twice: over all points, and over the points
that take at least three times as long as the fastest.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.cases import CASES
from bench.measure import RESULTS, known, open_results
from fastmaml import models
from fastmaml.benchmark.peers import fastmaml_maml
from fastmaml.benchmark.problem import Case, problem
from fastmaml.benchmark.text import number, table
from fastmaml.benchmark.timing import interleaved

LIMIT_S = 4.0  # a curve ends before a point that is expected to take longer


@dataclass(frozen=True)
class Curve:
    """One case with one growing size."""

    name: str
    along: str  # "tasks" | "inner steps" | "examples" | "width" | "threads"
    values: tuple[int, ...]
    case_at: Callable[[int], Case]
    wanted: float | None = 1.0  # the slope of the arithmetic


def _powers(last: int, first: int = 1) -> tuple[int, ...]:
    return tuple(2**i for i in range(first.bit_length() - 1, last.bit_length()))


def _with(case: Case, **changes: Any) -> Case:
    return replace(case, **changes)


def _examples(case: Case, n: int) -> Case:
    return replace(case, support=n, query=n)


def _wide_mlp(width: int) -> Case:
    return replace(CASES["mlp-k1"], model=partial(models.mlp, [width, width, width, 5]), input_shape=(width,), tasks=8)


def _wide_conv(filters: int) -> Case:
    return replace(CASES["omniglot-t8-k1"], model=partial(models.conv4, filters=filters), tasks=2)


W1, W2, W3 = CASES["sinusoid-k1"], CASES["mlp-k1"], CASES["omniglot-t8-k1"]
CURVES = {
    curve.name: curve
    for curve in (
        Curve("W1 tasks", "tasks", _powers(1024), lambda n: _with(W1, tasks=n)),
        Curve("W2 tasks", "tasks", _powers(1024), lambda n: _with(W2, tasks=n)),
        Curve("W3 tasks", "tasks", _powers(1024), lambda n: _with(W3, tasks=n)),
        Curve("W1 steps", "inner steps", (1, 2, 5, 10, 20, 50, 100), lambda n: _with(W1, inner_steps=n)),
        Curve("W2 steps", "inner steps", (1, 2, 5, 10, 20, 50), lambda n: _with(W2, inner_steps=n)),
        Curve("W3 steps", "inner steps", (1, 2, 5, 10, 20, 50), lambda n: _with(W3, inner_steps=n, tasks=2)),
        Curve("W1 examples", "examples", _powers(4096, 4), lambda n: _examples(W1, n)),
        Curve("W2 examples", "examples", (5, 10, 20, 40, 80, 160, 320), lambda n: _examples(W2, n)),
        Curve("W3 examples", "examples", (5, 10, 20, 40, 80), lambda n: _examples(_with(W3, tasks=2), n)),
        Curve("MLP width", "width", _powers(1024, 16), _wide_mlp, 2.0),
        Curve("Conv4 filters", "width", _powers(128, 8), _wide_conv, 2.0),
        *(
            Curve(f"{name} threads", "threads", (1, 2), lambda n, case=case: case, -1.0)
            for name, case in (("W1", W1), ("W2", W2), ("W3", W3))
        ),
    )
}


def measure(curve: Curve, rounds: int, threads: int, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """The curve's points (size, seconds) and slopes. All points of a curve are timed in turn."""
    calls: dict[str, Callable[[], Any]] = {}
    for value in curve.values:
        given = problem(curve.case_at(value))
        call = fastmaml_maml.prepare(given)
        of_threads = value if curve.along == "threads" else threads
        calls[str(value)] = partial(_with_threads, of_threads, call)
        once = interleaved({"once": calls[str(value)]}, 1, 0.0)["once"].median
        if once > limit_s / 2:
            break
    times = interleaved(calls, rounds, 0.02)
    torch.set_num_threads(threads)
    points = [(int(value), t.median) for value, t in times.items()]
    beyond = [p for p in points if p[1] >= 3 * min(s for _, s in points)]
    return {
        "along": curve.along,
        "points": [{"size": n, "ms": 1e3 * s, "spread": times[str(n)].spread} for n, s in points],
        "slope": slope(points),
        "slope_beyond_overhead": slope(beyond),
        "wanted": curve.wanted,
        "left_out": [n for n in curve.values if str(n) not in calls],
    }


def _with_threads(threads: int, call: Callable[[], Any]) -> None:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    call()


def slope(points: Sequence[tuple[int, float]]) -> float | None:
    """The slope of log seconds over log size, by least squares. None for a single point."""
    if len(points) < 2:
        return None
    x, y = [math.log(n) for n, _ in points], [math.log(s) for _, s in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def plot(entries: dict[str, dict[str, Any]], path: Path) -> None:
    """A PNG: a log-log panel per growing size, with a dotted line of the expected slope."""
    from fastmaml.report import plots
    from fastmaml.report.style import LIGHT

    along = [
        name
        for name in ("tasks", "inner steps", "examples", "width")
        if any(e["along"] == name for e in entries.values())
    ]
    looks = (("learner", "-"), ("random", "--"), ("plain", "-."))
    with plots.drawing(LIGHT) as Figure:
        figure = Figure(figsize=(3.4 * len(along), 3.4), layout="constrained", facecolor=LIGHT["paper"])
        for axes, name in zip(figure.subplots(1, len(along), squeeze=False)[0], along):
            chosen = {key: entry for key, entry in entries.items() if entry["along"] == name}
            for (key, entry), (role, dashes) in zip(chosen.items(), looks):
                x, y = zip(*((p["size"], p["ms"]) for p in entry["points"]))
                axes.plot(x, y, dashes, marker="o", markersize=3, color=LIGHT[role], label=key)
                guide = [y[-1] * (n / x[-1]) ** entry["wanted"] for n in x]
                axes.plot(x, guide, ":", color=LIGHT["muted"], linewidth=0.9)
            axes.set(xscale="log", yscale="log", xlabel=name)
            axes.set_title("ms a meta-gradient")
            axes.legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=140)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print, write, draw. Returns 2 for a file of another run."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        results = open_results(
            args.out, __doc__ or "", {"rounds": args.rounds, "limit": args.limit}, args.again, __file__
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for name in known(args.curves, CURVES):
        if not results.done(name):
            results.save(name, measure(CURVES[name], args.rounds, args.threads, args.limit))
        entry = results.entries[name]
        rows = [["ms", *(f"{p['ms']:.4g}" for p in entry["points"])]]
        print(table([name, *(str(p["size"]) for p in entry["points"])], rows))
        print(says(entry) + "\n", flush=True)
    if args.out:
        plot(results.entries, Path(args.out).with_suffix(".png"))
    if all(results.done(name) for name in CURVES):
        results.finish()
    return 0


def says(entry: dict[str, Any]) -> str:
    """The slopes in words."""
    beyond = entry["slope_beyond_overhead"]
    text = f"slope {number(entry['slope'], 3)}" + (
        "" if beyond is None else f", {number(beyond, 3)} beyond the fixed cost"
    )
    left = f"; {', '.join(map(str, entry['left_out']))} would take too long" if entry["left_out"] else ""
    return f"{text} (arithmetic: {entry['wanted']:g}){left}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("curves", nargs="*", metavar="CURVE", help=f"of {', '.join(map(repr, CURVES))}")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each point (default 7)")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, metavar="S", help=f"limit of one call in seconds (default {LIMIT_S:g})"
    )
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default 2)")
    parser.add_argument("--again", action="store_true", help="forget the results of an earlier run")
    parser.add_argument(
        "--out", default=str(RESULTS / "scaling.json"), help='JSON file; the plot goes next to it; "" writes none'
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
