"""fastmaml evaluate RUN: accuracy or error on held-out tasks, after 0 and more inner steps."""

from __future__ import annotations

import argparse
from typing import Any

from fastmaml.cli.text import duration, evaluation_table
from fastmaml.training.evaluation import evaluate_run


def add_parser(subparsers: Any) -> None:
    """Add this command to the parser."""
    parser = subparsers.add_parser(
        "evaluate",
        help="evaluate a run on held-out tasks",
        description="Evaluates the best checkpoint of a run on held-out test tasks, after 0 and more inner steps. Compares "
        "it with the untrained network and with a predictor without a network.",
    )
    parser.add_argument("run_dir", metavar="RUN", help="folder that `fastmaml train` wrote")
    parser.add_argument("--eval-tasks", type=int, metavar="N", help="held-out tasks (default: the run's setting, 600)")
    parser.add_argument("--seed", type=int, help="seed of the test tasks (default: the run's seed)")
    parser.add_argument("--out", metavar="DIR", help="folder for evaluation.json and examples.npz (default: RUN)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the table."""
    results = evaluate_run(args.run_dir, args.eval_tasks, args.seed, args.out, args.quiet)
    print(evaluation_table(results))
    if results["checkpoint"] == "ensemble":
        origin = f"ensemble of the checkpoints of steps {', '.join(map(str, results['ensemble']))}"
    else:
        origin = f"{results['checkpoint']} checkpoint (step {results['step']})"
    print(f"\n{origin}, evaluated in {duration(results['wall_s'])}")
    return 0
