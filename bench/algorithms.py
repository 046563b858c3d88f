"""Every algorithm at one small, equal budget: sinusoid regression and 5-way 1-shot Omniglot.

Each cell of the table (an algorithm on a data set) has its own run folder and process. Repeat the command to continue:
it skips finished cells and resumes the interrupted one from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastmaml as fm
from bench.measure import RESULTS, commit, facts, write_json
from fastmaml.algorithms.names import ALGORITHMS
from fastmaml.tasks.source import TaskSource
from fastmaml.training import checkpoint
from fastmaml.training.evaluation import evaluate_run
from fastmaml.training.experiment import make_learner, make_tasks, read_config, seed_generators, write_config
from fastmaml.training.metrics import read_rows
from fastmaml.training.presets import preset
from fastmaml.training.run_config import NEEDS_CLASSES, RunConfig
from fastmaml.training.trainer import Trainer

MIB = 2**20
PROBED_STEPS = 10  # outer steps whose memory is measured
DATASETS = ("sinusoid", "omniglot")

HELP = """
the equal budget
  sinusoid   25 tasks an iteration, 10 support and 10 query points, 5,000 iterations; networks are the
             presets': 1-40-40-1, with context inputs for CAVIA, 1-64-64-1 with tanh for Reptile and FOML
  omniglot   4 tasks an iteration, 5 ways, 1 shot, 5 query images a class, 1,000 iterations, Conv4 with 32 filters that
             halves by stride
  All other settings are the published ones (fastmaml/training/presets.py), except where a note in the table says so.
  Reptile and FOML have no query set, so they use larger support sets in training (50 points; 10 images a class).

columns
  before     600 test tasks without inner steps, from the trained parameters
  after      600 test tasks with the algorithm's inner steps at test: mean and 95 % interval (1.96 std / sqrt(600))
  ms         median time of a training iteration: sampling, meta-gradient, optimizer; without validation
  MiB        peak memory of the first 10 iterations, on top of torch, fastmaml and the data
"""

# The equal budget, and the settings that shrink with it.
BUDGET: dict[str, dict[str, Any]] = {
    "sinusoid": {
        "steps": 5_000,
        "meta_batch": 25,
        "eval_shots": (10,),
        "log_every": 100,
        "validate_every": 500,
        "validation_tasks": 200,
    },
    "omniglot": {
        "steps": 1_000,
        "meta_batch": 4,
        "query_shots": 5,
        "model": {"filters": 32, "pooling": "stride"},
        "log_every": 10,
        "validate_every": 100,
        "validation_tasks": 100,
    },
}
CHANGES: dict[tuple[str, str], dict[str, Any]] = {
    # An epoch is a hundredth of the run, as in the authors' runs.
    ("maml++", "sinusoid"): {"options": {"steps_per_epoch": 50, "learn_rates": False}},
    ("maml++", "omniglot"): {"options": {"steps_per_epoch": 10}},
}
NOTES: dict[tuple[str, str], str] = {
    ("maml++", "sinusoid"): "rates not learned: with them it ends at 1.86, they leave the stable range of five steps",
    (
        "imaml",
        "omniglot",
    ): "the released recipe: CG damped by 1, no proximal term at test; with lambda 0.5 its validation reached 73 %",
    ("anil", "omniglot"): "one step of the head alone; with five steps its validation reached 68 %",
    ("protomaml", "omniglot"): "without inner steps it classifies by its prototypes, which the support set gives",
}


class Cell(NamedTuple):
    """One algorithm on one data set."""

    algorithm: str
    dataset: str
    config: RunConfig
    note: str

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.algorithm}"


def cells(
    algorithms: Sequence[str] = tuple(ALGORITHMS),
    datasets: Sequence[str] = DATASETS,
    root: str | None = None,
    seed: int = 0,
    iterations: int | None = None,
    eval_tasks: int = 600,
) -> list[Cell]:
    """The cells of the table. iterations: shortens all cells."""
    found = []
    for dataset in datasets:
        for algorithm in algorithms:
            if dataset == "sinusoid" and algorithm in NEEDS_CLASSES:
                continue
            changes = CHANGES.get((algorithm, dataset), {})
            config = preset(dataset, _merged(BUDGET[dataset], changes), algorithm=algorithm, root=root, seed=seed)
            config = replace(config, eval_tasks=eval_tasks)
            if iterations is not None:
                config = replace(config, steps=iterations, validate_every=max(1, iterations // 2), log_every=1)
            found.append(Cell(algorithm, dataset, config, NOTES.get((algorithm, dataset), "")))
    return found


def _merged(budget: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    model = {**budget.get("model", {}), **changes.get("model", {})}
    return {**budget, **changes, **({"model": model} if model else {})}


# ---------------------------------------------------------------- one cell


def run_cell(cell: Cell, folder: Path, threads: int, quiet: bool = False) -> int:
    """Train (or resume), evaluate and write `cell.json`. Returns 130 if interrupted and saved."""
    torch.set_num_threads(threads)
    train_tasks, validation_tasks = make_tasks(cell.config, "train"), make_tasks(cell.config, "val")
    peak = peak_bytes(cell.config, train_tasks)
    seed_generators(cell.config.seed)
    learner = make_learner(cell.config)
    trainer = Trainer(learner, train_tasks, validation_tasks, cell.config, folder, quiet)
    if checkpoint.exists(folder / "checkpoints", "last"):
        trainer.resume()
    write_config(folder, cell.config, learner.engine)
    if trainer.train().reason == "interrupted":
        return 130
    evaluation = evaluate_run(folder, quiet=quiet)
    row = {**measured(cell, evaluation, folder, peak), "threads": threads, "backend": learner.engine.backend}
    checkpoint.write_durably(folder / "cell.json", (json.dumps(row, indent=1) + "\n").encode())
    return 0


def measured(cell: Cell, evaluation: Mapping[str, Any], folder: Path, peak: int) -> dict[str, Any]:
    """A finished cell as a row of the result file."""
    steps = evaluation["inner_steps"]
    trained, untrained, plain = evaluation["tables"][0]["rows"]
    quoted = steps.index(evaluation["quoted_steps"])
    training = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]

    def entry(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        return {key: row[key][index] for key in ("mean", "ci95", "median")}

    return {
        "algorithm": cell.algorithm,
        "dataset": cell.dataset,
        "metric": evaluation["metric"],
        "tasks": evaluation["tasks"],
        "steps_at_test": evaluation["quoted_steps"],
        "before": entry(trained, 0),
        "after": entry(trained, quoted),
        "untrained_after": entry(untrained, quoted),
        "without_network": {"name": plain["name"], **entry(plain, 0)},
        "ms": 1e3 * statistics.median(1 / row["steps_per_second"] for row in training),
        "peak_mib": peak / MIB,
        "train_s": training[-1]["elapsed_s"],
        "evaluated": {key: evaluation[key] for key in ("checkpoint", "step", "ensemble") if key in evaluation},
        "note": cell.note,
        "commit": commit(),
        "config": {key: value for key, value in cell.config.settings().items() if key != "root"},
    }


def peak_bytes(config: RunConfig, tasks: TaskSource) -> int:
    """The rise of resident memory in the first outer steps of a trial training."""
    for backend in ("autodiff", "auto"):  # modules that load on first use must not count
        maml = fm.MAML(torch.nn.Linear(1, 1), 0.1, loss="mse", backend=backend)
        maml(*[torch.zeros(1, 2, 1)] * 4).loss.backward()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    held = _status("VmRSS")
    learner = make_learner(config)
    optimizer = learner.outer_optimizer(config.outer_lr)
    for step in range(PROBED_STEPS):
        learner.at_step(step)
        optimizer.zero_grad()
        learner(*tasks.sample(config.meta_batch, step=step)).loss.backward()
        optimizer.step()
    return _status("VmHWM") - held


def _status(key: str) -> int:
    """Bytes of resident memory by Linux's name: VmRSS (now) or VmHWM (peak)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def finished(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """The row of a finished cell; None if the cell is not finished.

    Raises ValueError if the folder was made with other settings.
    """
    if not (folder / "config.json").exists():
        return None
    had, wanted = read_config(folder).settings(), cell.config.settings()
    differ = [key for key in wanted if key != "root" and had[key] != wanted[key]]
    if differ:
        raise ValueError(
            f"{folder} was made with {differ[0]} {had[differ[0]]}, not {wanted[differ[0]]}: remove it or choose other --runs"
        )
    path = folder / "cell.json"
    return json.loads(path.read_text()) if path.exists() else None


# ---------------------------------------------------------------- the table


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as one Markdown table, with both data sets side by side and notes below."""
    by = {(row["algorithm"], row["dataset"]): row for row in rows}
    present = [name for name in DATASETS if any(row["dataset"] == name for row in rows)]
    heads = {"sinusoid": "sinusoid, MSE", "omniglot": "Omniglot 5-way 1-shot, %"}
    cells_of = [f"{heads[name]}: before | after | ms | MiB" for name in present]
    lines = [f"| algorithm | {' | '.join(cells_of)} |", "|---|" + "---|" * 4 * len(present)]
    notes: list[str] = []
    for algorithm in (a for a in ALGORITHMS if any((a, d) in by for d in present)):
        line = [ALGORITHMS[algorithm]]
        for dataset in present:
            row = by.get((algorithm, dataset))
            line += _cells(row) if row else ["", "", "", ""]
            if row and (row.get("error") or row.get("note")):
                notes.append(f"{ALGORITHMS[algorithm]}, {dataset}: {row.get('error') or row['note']}.")
        lines.append(f"| {' | '.join(line)} |")
    for key, name in (("untrained_after", "random initialisation, MAML's inner loop"), ("without_network", "")):
        line = []
        for dataset in present:
            row = by.get(("maml", dataset))
            if row and "error" not in row:
                value = _value(row["metric"], row[key])
                name = name or row[key]["name"]
                line += ["", value if key == "untrained_after" else f"{value} ({row[key]['name']})", "", ""]
            else:
                line += ["", "", "", ""]
        lines.append(f"| {name if key == 'untrained_after' else 'without a network'} | {' | '.join(line)} |")
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    if "error" in row:
        return ["", "failed", "", ""]
    before = _value(row["metric"], row["before"])
    return [before.split(" ±")[0], _value(row["metric"], row["after"]), f"{row['ms']:.3g}", f"{row['peak_mib']:.0f}"]


def _value(metric: str, entry: Mapping[str, Any]) -> str:
    if entry["mean"] is None:
        return "diverged"
    mean, half = entry["mean"], entry["ci95"]
    return f"{100 * mean:.1f} ± {100 * half:.1f}" if metric == "accuracy" else f"{mean:.2f} ± {half:.2f}"


def above_baseline(row: Mapping[str, Any]) -> bool:
    """Whether the interval after adaptation is clear of the interval before, or of the adapted untrained network's.

    The second comparison is for algorithms whose head comes from the support set: they have no result before adaptation.
    """
    before, after = row["untrained_after" if row["algorithm"] in NEEDS_CLASSES else "before"], row["after"]
    if after["mean"] is None:
        return False
    sign = 1 if row["metric"] == "accuracy" else -1
    return bool(sign * (after["mean"] - before["mean"]) > after["ci95"] + before["ci95"])


# ---------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the unfinished cells, print and write the table. Returns 1 if a cell failed, 130 if interrupted."""
    args = _parser().parse_args(argv)
    wanted = cells(args.algorithms, args.datasets, args.root, args.seed, args.iterations, args.eval_tasks)
    runs = Path(args.runs)
    if args.cell is not None:
        (cell,) = (cell for cell in wanted if cell.name == args.cell)
        return run_cell(cell, runs / cell.name, args.threads)
    rows = []
    signal.signal(signal.SIGTERM, _interrupt)
    for number, cell in enumerate(wanted, start=1):
        row = finished(cell, runs / cell.name)
        if row is None:
            print(f"[{number}/{len(wanted)}] {cell.name}", flush=True)
            code, sentence = _in_a_process(cell, sys.argv[1:] if argv is None else argv)
            if code == 130:
                print("stopped and saved; repeat the command to continue")
                return 130
            row = finished(cell, runs / cell.name) if code == 0 else None
            for place, name in (
                (args.root, "ROOT"),
                (args.runs, "RUNS"),
            ):  # a result file must not name a machine's folders
                sentence = sentence.replace(place, name) if place else sentence
        else:
            print(f"[{number}/{len(wanted)}] {cell.name}: done before", flush=True)
        rows.append(row or {"algorithm": cell.algorithm, "dataset": cell.dataset, "error": sentence})
    text = markdown(rows)
    print(f"\n{text}")
    for row in rows:
        if "error" not in row and not above_baseline(row):
            print(f"not clear of its no-adaptation baseline: {row['algorithm']} on {row['dataset']}")
    if args.out:
        what = (__doc__ or "").split("\n")[0]
        write_json(args.out, {"what": what, **facts(), "rows": rows})
        Path(args.out).with_suffix(".md").write_text(text, encoding="utf-8")
    return 1 if any("error" in row for row in rows) else 0


def _in_a_process(cell: Cell, argv: Sequence[str]) -> tuple[int, str]:
    """Runs a cell in its own process. Returns (exit code, its last line on stderr)."""
    with subprocess.Popen(
        [sys.executable, "-m", "bench.algorithms", *argv, "--cell", cell.name],
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stderr is not None
            last = ""
            for line in child.stderr:
                sys.stderr.write(line)
                last = line.strip() or last
            return child.wait(), last
        except KeyboardInterrupt:
            child.terminate()  # a second request to stop is harmless: the child finishes its step and saves
            child.wait()
            return 130, ""


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.algorithms",
        description=__doc__,
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", metavar="DIR", help="folder of the Omniglot zips")
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=ALGORITHMS, metavar="NAME")
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=DATASETS, metavar="NAME")
    parser.add_argument("--runs", default="runs/algorithms", help="folder of the run folders (default runs/algorithms)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of networks and tasks (default 0)")
    parser.add_argument("--iterations", type=int, metavar="N", help="iterations in every cell, to try the command")
    parser.add_argument("--eval-tasks", type=int, default=600, metavar="N", help="test tasks per cell (default 600)")
    parser.add_argument(
        "--out",
        default=str(RESULTS / "algorithms.json"),
        help='JSON file; the table goes next to it as .md; "" writes none',
    )
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
