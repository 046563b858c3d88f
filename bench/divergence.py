"""Does the compiled engine train like autodiff? Exact MAML on real images, Conv4, 5-way 1-shot, Adam, step by step.

float64: the first training losses of `cpu` and `autodiff` must agree to 1e-8 (relative). Otherwise the exit code is 1.
float32, at the start: takes the median error of loss and meta-gradient over ten task batches, against unrolled double
backward in float64. It must be at most twice plain torch's plus 8 eps (DESIGN section 5). Otherwise the exit code is 1.
float32, in training: training amplifies different rounding. Shows the distance of `cpu`'s losses from `autodiff`'s. For
comparison, shows `autodiff`'s distance from itself after moving its initial weights by 1e-7 of their size.

Writes comparison.json and divergence.png into --run, where `fastmaml report` shows them. Quick: --dataset glyphs
--filters 8 --meta-batch 4 --steps 20 --steps64 5.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastmaml as fm
from bench.measure import RESULTS, facts, write_json
from fastmaml.benchmark.text import table
from fastmaml.report import plots
from fastmaml.report.style import LIGHT
from fastmaml.tasks.source import TaskSource
from fastmaml.training.checkpoint import write_durably
from tests import oracle

FLOAT64_LIMIT = 1e-8
DRAWS = 10
EPS32 = torch.finfo(torch.float32).eps
NUDGE = 1e-7
TITLES = ("Training losses in float64, cpu and autodiff", "Training losses in float32, cpu and autodiff")

Block = dict[str, Any]  # of comparison.json, which fastmaml/report/run_folder.py reads


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, compare, print, write."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    tasks = _tasks(args)
    start = _model(args)
    agreed, double = compare_float64(start, tasks, args)
    within, rows = compare_float32_start(start, tasks, args)
    single = compare_float32_training(start, tasks, args)
    folder = RESULTS if args.run is None else Path(args.run)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("divergence.json" if args.run is None else "comparison.json")
    write_blocks(path, [single, double])
    picture(folder / "divergence.png", single, double)
    print(f"wrote {path} and {folder / 'divergence.png'}")
    if args.out:
        settings = {key: value for key, value in vars(args).items() if key not in ("root", "run", "out")}
        result = {"agreed_float64": agreed, "within_float32_rule": within, "float32_at_start": rows}
        write_json(args.out, {**facts(), **settings, **result, "comparison": [single, double]})
    return 0 if agreed and within else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.divergence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=("omniglot", "glyphs"), default="omniglot")
    parser.add_argument("--root", help="folder of the data set's files (default $FASTMAML_DATA)")
    parser.add_argument("--filters", type=int, default=64, help="filters of Conv4 (default 64)")
    parser.add_argument("--meta-batch", type=int, default=8, help="tasks per outer step (default 8)")
    parser.add_argument("--query-shots", type=int, default=1, help="query images per class (default 1)")
    parser.add_argument("--inner-lr", type=float, default=0.5)
    parser.add_argument("--inner-steps", type=int, default=1)
    parser.add_argument("--outer-lr", type=float, default=1e-3)
    parser.add_argument("--steps64", type=int, default=20, help="outer steps in float64 (default 20)")
    parser.add_argument("--steps", type=int, default=60, help="outer steps in float32 (default 60)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and the tasks (default 0)")
    parser.add_argument("--run", metavar="RUN", help="run folder for the pictures (default bench/results)")
    parser.add_argument("--out", metavar="FILE", help="also write all results as JSON")
    return parser


def _tasks(args: argparse.Namespace) -> TaskSource:
    settings = {"ways": 5, "shots": 1, "query_shots": args.query_shots, "seed": args.seed, "root": args.root}
    return fm.tasks.Omniglot(**settings) if args.dataset == "omniglot" else fm.tasks.Glyphs(**settings)


def _model(args: argparse.Namespace, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        return fm.models.conv4(ways=5, filters=args.filters).to(dtype)


def train(model: nn.Module, tasks: TaskSource, args: argparse.Namespace, backend: str, steps: int) -> list[float]:
    """The query losses of the first outer steps, in the model's float type. Trains the model in place."""
    maml = fm.MAML(model, args.inner_lr, args.inner_steps, backend=backend)
    optimizer = torch.optim.Adam(maml.parameters(), lr=args.outer_lr, foreach=False)
    dtype = next(model.parameters()).dtype
    losses = []
    for step in range(steps):
        out = maml(*tasks.sample(args.meta_batch, step=step).to(dtype=dtype))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
        if sys.stderr.isatty():
            print(f"{backend} {dtype} step {step + 1} of {steps}", end="\r", file=sys.stderr)
    return losses


# ---------------------------------------------------------------- float64


def compare_float64(start: nn.Module, tasks: TaskSource, args: argparse.Namespace) -> tuple[bool, Block]:
    """Whether the first losses agree, and both curves."""
    losses = {
        name: train(copy.deepcopy(start).double(), tasks, args, name, args.steps64) for name in ("autodiff", "cpu")
    }
    apart = max(abs(a - b) / abs(a) for a, b in zip(losses["autodiff"], losses["cpu"]))
    verdict = "agree" if apart <= FLOAT64_LIMIT else "DISAGREE"
    sentence = f"float64: {args.steps64} losses of cpu and autodiff {verdict}, largest relative difference {apart:.1e}"
    print(f"{sentence} (limit {FLOAT64_LIMIT:.0e})", flush=True)
    return apart <= FLOAT64_LIMIT, _block(TITLES[0], losses, sentence.replace("float64: ", "The ", 1) + ".")


# ---------------------------------------------------------------- float32, at the start


def compare_float32_start(
    start: nn.Module, tasks: TaskSource, args: argparse.Namespace
) -> tuple[bool, list[dict[str, float | str]]]:
    """Whether cpu meets the float32 rule over ten task batches. Prints the median errors of loss and meta-gradient."""
    errors: dict[tuple[str, str], list[float]] = {}
    engines = {backend: fm.Engine(start, backend=backend) for backend in ("cpu", "autodiff")}
    theta = engines["cpu"].flatten()
    for draw in range(DRAWS):
        batch = tasks.sample(args.meta_batch, step=draw)
        loss, grad = _unrolled(start, theta.double(), batch.to(dtype=torch.float64), args, plain=False)
        found = {"plain torch": _unrolled(start, theta, batch, args, plain=True)}
        for backend, engine in engines.items():
            mg = engine.meta_gradient(theta, batch, args.inner_lr, args.inner_steps, inner_lr_grad=False)
            found[backend] = mg.loss, mg.grad
        for name, (its_loss, its_grad) in found.items():
            errors.setdefault((name, "loss"), []).append(_error(its_loss, loss))
            errors.setdefault((name, "meta-gradient"), []).append(_error(its_grad, grad))
    rows: list[dict[str, float | str]] = []
    within = True
    for what in ("loss", "meta-gradient"):
        medians = {name: statistics.median(errors[name, what]) for name in ("cpu", "autodiff", "plain torch")}
        limit = 2 * medians["plain torch"] + 8 * EPS32
        within &= medians["cpu"] <= limit
        rows.append({"of": what, **medians, "limit": limit})
    print(f"float32, {DRAWS} task batches at the start, median relative error in the 2-norm:")
    head = ["", "cpu", "autodiff", "plain torch", "limit for cpu"]
    print(table(head, [[str(row["of"]), *(f"{row[key]:.1e}" for key in list(row)[1:])] for row in rows]))
    print("the float32 rule is " + ("met" if within else "NOT met"), flush=True)
    return within, rows


def _unrolled(
    model: nn.Module, theta: Tensor, batch: Any, args: argparse.Namespace, plain: bool
) -> tuple[Tensor, Tensor]:
    rates = torch.full_like(theta, args.inner_lr)
    network = oracle.network(copy.deepcopy(model).to(theta.dtype), plain=plain)
    loss = oracle.loss_function("cross_entropy")
    result = oracle.meta_gradient(network, theta, tuple(batch), loss, rates, args.inner_steps)
    return result.loss, result.grad


def _error(result: Tensor, answer: Tensor) -> float:
    return float((result.double() - answer).norm() / answer.norm())


# ---------------------------------------------------------------- float32, in training


def compare_float32_training(start: nn.Module, tasks: TaskSource, args: argparse.Namespace) -> Block:
    """The three curves. Prints the distances of the second and third from the first."""
    nudged = copy.deepcopy(start)
    random = torch.Generator().manual_seed(args.seed)
    with torch.no_grad():
        for p in nudged.parameters():
            p.mul_(1 + NUDGE * torch.randn(p.shape, generator=random))
    moved = f"autodiff, start moved by {NUDGE:.0e}"
    losses = {
        "autodiff": train(copy.deepcopy(start), tasks, args, "autodiff", args.steps),
        "cpu": train(copy.deepcopy(start), tasks, args, "cpu", args.steps),
        moved: train(nudged, tasks, args, "autodiff", args.steps),
    }
    apart = {name: [abs(a - b) for a, b in zip(losses["autodiff"], losses[name])] for name in ("cpu", moved)}
    shown = sorted({0, 1, args.steps // 4, args.steps // 2, args.steps - 1} & set(range(args.steps)))
    print("float32, training: distance of the loss from autodiff's")
    rows = [[name, *(f"{values[i]:.1e}" for i in shown)] for name, values in apart.items()]
    print(table(["", *(f"step {i + 1}" for i in shown)], rows), flush=True)
    note = (
        f"Query loss of the first {args.steps} outer steps of exact MAML on {args.dataset}, {args.meta_batch} tasks a step, "
        f"Conv4 with {args.filters} filters. Training amplifies rounding: cpu leaves autodiff as autodiff leaves itself when "
        f"its initial weights are moved by {NUDGE:.0e} of their size."
    )
    return _block(TITLES[1], losses, note)


# ---------------------------------------------------------------- files


def _block(title: str, losses: dict[str, list[float]], note: str) -> Block:
    series = [{"name": name, "x": list(range(1, len(y) + 1)), "y": y} for name, y in losses.items()]
    return {
        "title": title,
        "x_label": "outer step",
        "y_label": "query loss",
        "log_y": False,
        "series": series,
        "note": note,
    }


def write_blocks(path: Path, blocks: list[Block]) -> None:
    """Writes the blocks. Replaces blocks of the same title, keeps all others of the run folder."""
    kept: list[Block] = []
    if path.is_file():
        value = json.loads(path.read_text(encoding="utf-8"))
        titles = {block["title"] for block in blocks}
        kept = [block for block in (value if isinstance(value, list) else [value]) if block.get("title") not in titles]
    write_durably(path, (json.dumps(blocks + kept, indent=1) + "\n").encode())


def picture(path: Path, single: Block, double: Block) -> None:
    """A PNG: the float32 losses in one plot, and every distance from autodiff on a log scale."""
    looks = {"cpu": ("learner", "-"), "autodiff": ("plain", "-")}
    with plots.drawing(LIGHT) as Figure:
        figure = Figure(figsize=(10.4, 3.6), layout="constrained", facecolor=LIGHT["paper"])
        curves, distances = figure.subplots(1, 2)
        for series in single["series"]:
            role, dashes = looks.get(series["name"], ("random", "--"))
            curves.plot(series["x"], series["y"], dashes, color=LIGHT[role], label=series["name"], linewidth=1.7)
        curves.set_title("query loss in float32", loc="left")
        for block, kind in ((single, "float32"), (double, "float64")):
            first = block["series"][0]
            for series in block["series"][1:]:
                role, dashes = looks.get(series["name"], ("random", "--"))
                dashes = dashes if kind == "float32" else ":"
                gaps = [abs(a - b) or float("nan") for a, b in zip(first["y"], series["y"])]
                name = f"{series['name']}, {kind}"
                distances.plot(series["x"], gaps, dashes, marker="o", markersize=2.4, color=LIGHT[role], label=name)
        distances.set_yscale("log")
        distances.set_title("distance from autodiff's loss, log scale", loc="left")
        distances.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        for axes in (curves, distances):
            axes.set_xlabel("outer step")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend(frameon=False, fontsize=9)
        figure.savefig(path, dpi=160)


if __name__ == "__main__":
    sys.exit(main())
