"""fastmaml train DATASET: meta-train, evaluate, write the report. Ctrl-C saves; --resume continues bit for bit."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastmaml.algorithms.names import ALGORITHMS
from fastmaml.cli.report import write_report
from fastmaml.cli.text import command, duration, evaluation_table, rate, size
from fastmaml.engine.backend import PRECISIONS
from fastmaml.training import checkpoint
from fastmaml.training.config_file import read_option, read_settings, to_yaml
from fastmaml.training.evaluation import evaluate_run
from fastmaml.training.experiment import make_learner, make_tasks, read_config, seed_generators, write_config
from fastmaml.training.metrics import show
from fastmaml.training.presets import PRESETS, preset
from fastmaml.training.run_config import SCHEDULES, RunConfig, checked
from fastmaml.training.trainer import Outcome, Trainer

# Options that are settings of RunConfig, and `filters` of its network. Only the free ones may change on --resume.
_TASK = ("ways", "shots", "train_shots", "query_shots", "meta_batch")
_INNER = ("algorithm", "options", "inner_lr", "inner_steps", "filters", "batch_norm")
_OUTER = ("outer_lr", "schedule", "outer_lr_min", "clip_grad", "seed")
_FIXED = (*_TASK, *_INNER, *_OUTER, "validate_every", "validation_tasks", "ensemble")
_FREE = ("steps", "time_limit", "backend", "memory", "precision", "root", "eval_tasks")


def add_parser(subparsers: Any) -> None:
    """Add this command to the parser."""
    parser = subparsers.add_parser(
        "train",
        help="meta-train on a data set",
        description="Meta-trains a network, evaluates it on held-out tasks and writes a report. Options default to the "
        "published settings of the algorithm and data set; --print-config shows them.",
    )
    parser.add_argument("dataset", nargs="?", choices=sorted(PRESETS), metavar="DATASET", help=", ".join(PRESETS))
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="settings in YAML or TOML, as --print-config prints them; options on the command line win",
    )
    parser.add_argument("--print-config", action="store_true", help="print all settings as YAML for --config, and stop")
    _task_options(parser.add_argument_group("tasks"))
    _learning_options(parser.add_argument_group("learning"))
    _engine_options(parser.add_argument_group("engine"))
    _run_options(parser.add_argument_group("run"))
    parser.set_defaults(run=run)


def _task_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--ways", type=int, metavar="N", help="classes in a task")
    group.add_argument("--shots", type=int, metavar="N", help="support examples per class (regression: per task)")
    group.add_argument(
        "--train-shots",
        type=int,
        metavar="N",
        help="support examples in training (default: --shots, except for Reptile)",
    )
    group.add_argument("--query-shots", type=int, metavar="N", help="query examples per class (regression: per task)")
    group.add_argument("--root", metavar="DIR", help="folder of the data set's files")


def _learning_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--algorithm", choices=ALGORITHMS, metavar="NAME", help=f"{', '.join(ALGORITHMS)} (default: maml)"
    )
    group.add_argument(
        "--option",
        action="append",
        dest="options",
        metavar="NAME=VALUE",
        help="an argument of the algorithm's class, such as lam=2.0, first_order=true, inner=adam; may be repeated",
    )
    group.add_argument("--steps", type=int, metavar="N", help="outer steps")
    group.add_argument("--meta-batch", type=int, metavar="N", help="tasks in an outer step")
    group.add_argument(
        "--outer-lr", type=float, metavar="RATE", help="learning rate of Adam, or for Reptile of the outer step"
    )
    group.add_argument("--schedule", choices=SCHEDULES, help="schedule of the outer learning rate")
    group.add_argument(
        "--outer-lr-min", type=float, metavar="RATE", help="outer rate at the end of the schedule (default: 0)"
    )
    group.add_argument(
        "--clip-grad",
        type=float,
        metavar="LIMIT",
        help="limit of every entry of the network's meta-gradient (default: none)",
    )
    group.add_argument("--inner-steps", type=int, metavar="N", help="gradient steps on the support set")
    group.add_argument(
        "--inner-lr", type=float, metavar="RATE", help="learning rate of the inner steps, for the mean loss"
    )
    group.add_argument("--filters", type=int, metavar="N", help="filters of each convolution")
    group.add_argument(
        "--batch-norm", choices=("transductive", "support", "frozen", "per_step"), help="default: transductive"
    )
    group.add_argument("--seed", type=int, metavar="N", help="seed of the network, the tasks and everything random")


def _engine_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--backend", help="auto, cpu, cuda, reference, autodiff")
    group.add_argument("--precision", choices=PRECISIONS, help="precision of large products on CUDA (default: float32)")
    group.add_argument(
        "--memory",
        choices=("auto", "low", "stash"),
        help="low recomputes the activations of the inner steps, stash keeps them",
    )


def _run_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--out", metavar="DIR", help="run folder (default: a new one under runs/)")
    group.add_argument("--resume", metavar="RUN", help="continue this run from its last checkpoint")
    group.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="seconds of training, including earlier parts of a resumed run",
    )
    group.add_argument("--validate-every", type=int, metavar="N", help="outer steps between validations")
    group.add_argument("--validation-tasks", type=int, metavar="N", help="tasks of every validation, always the same")
    group.add_argument(
        "--ensemble",
        type=int,
        metavar="N",
        help="number of best checkpoints whose outputs are averaged at test (default: 1)",
    )
    group.add_argument("--eval-tasks", type=int, metavar="N", help="held-out tasks of the evaluation (default: 600)")
    group.add_argument("--no-evaluate", action="store_true", help="stop after training")
    group.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    """Train, evaluate, report."""
    resumed = args.resume is not None
    if args.options is not None:
        args.options = dict(map(read_option, args.options))
    if args.print_config:
        print(to_yaml(_resumed_config(args) if resumed else _new_config(args)), end="")
        return 0
    config, run_dir = _resumed(args) if resumed else _new(args)
    seed_generators(config.seed)
    learner = make_learner(config)
    train_tasks, validation_tasks = make_tasks(config, "train"), make_tasks(config, "val")
    trainer = Trainer(learner, train_tasks, validation_tasks, config, run_dir, args.quiet)
    if resumed:
        trainer.resume()
    write_config(run_dir, config, learner.engine)
    print(_headline(config, learner, run_dir, trainer.step))
    outcome = trainer.train()
    if not trainer.tensorboard:
        print("metrics go to metrics.jsonl only: TensorBoard is not installed (pip install 'fastmaml[train]')")
    print(_summary(config, outcome))
    if outcome.reason == "interrupted":
        print(f"stopped and saved; continue with:  {command('train', '--resume', run_dir)}")
        return 130
    if args.no_evaluate:
        print(f"evaluate with:  {command('evaluate', run_dir)}")
        return 0
    return _evaluate_and_report(config, run_dir, args.quiet)


def _evaluate_and_report(config: RunConfig, run_dir: Path, quiet: bool) -> int:
    try:
        results = evaluate_run(run_dir, quiet=quiet)
    except KeyboardInterrupt:
        print(f"the trained network is saved; evaluate it with:  {command('evaluate', run_dir)}")
        return 130
    print(f"\n{evaluation_table(results)}\n")
    try:
        print(f"report: {write_report(run_dir)}")
    except ImportError as error:
        print(f"no report: {error}; write it later with:  {command('report', run_dir)}")
    return 0


def _new(args: argparse.Namespace) -> tuple[RunConfig, Path]:
    config = _new_config(args)
    run_dir = Path(args.out) if args.out else _free_folder(config)
    if (run_dir / "config.json").exists():
        raise ValueError(f"{run_dir} already holds a run: continue it with --resume {run_dir}, or choose another --out")
    return config, run_dir


def _new_config(args: argparse.Namespace) -> RunConfig:
    settings = read_settings(args.config) if args.config is not None else {}
    dataset = args.dataset or settings.get("dataset")
    if dataset is None:
        raise ValueError(f"train needs a data set ({', '.join(PRESETS)}), a --config that names one, or --resume RUN")
    return preset(dataset, settings, **{name: getattr(args, name) for name in _FIXED + _FREE})


def _resumed(args: argparse.Namespace) -> tuple[RunConfig, Path]:
    config, run_dir = _resumed_config(args), Path(args.resume)
    if not checkpoint.exists(run_dir / "checkpoints", "last"):
        raise ValueError(f"{run_dir} has no checkpoint to continue from; start a new run with another --out")
    return config, run_dir


def _resumed_config(args: argparse.Namespace) -> RunConfig:
    if args.dataset is not None or args.out is not None or args.config is not None:
        raise ValueError("--resume RUN continues RUN with its settings; leave out DATASET, --out and --config")
    changed = [name for name in _FIXED if getattr(args, name) is not None]
    if changed:
        option = "option" if changed[0] == "options" else changed[0].replace("_", "-")
        raise ValueError(f"--{option} cannot change when a run is resumed; start a new run")
    given = {name: getattr(args, name) for name in _FREE if getattr(args, name) is not None}
    return checked(replace(read_config(args.resume), **given))


def _free_folder(config: RunConfig) -> Path:
    """runs/glyphs-maml-5way-1shot, with -2, -3, ... if that folder exists."""
    task = f"{config.ways}way-{config.shots}shot" if config.ways else f"{config.shots}shot"
    name = f"{config.dataset}-{config.algorithm}-{task}"
    number = 1
    while (folder := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


def _headline(config: RunConfig, learner: Any, run_dir: Path, step: int) -> str:
    engine = learner.engine
    task = f"{config.ways}-way {config.shots}-shot" if config.ways else f"{config.shots} support points"
    parameters = size(sum(p.numel() for p in learner.parameters()))
    backend = engine.backend if engine.fused else f"{engine.backend} ({engine.why})"
    position = f", from step {step}" if step else ""
    return (
        f"{config.dataset}: {config.title}, {task}, {config.inner_steps} inner step(s) at "
        f"{rate(config.inner_lr)}, {config.meta_batch} tasks a step, {config.steps} steps{position}\n"
        f"{config.model['name']} with {parameters} parameters on {backend}; run folder {run_dir}"
    )


def _summary(config: RunConfig, outcome: Outcome) -> str:
    why = {"finished": "", "interrupted": " (interrupted)", "time limit": " (time limit)"}[outcome.reason]
    text = f"{outcome.step} of {config.steps} steps{why} in {duration(outcome.elapsed_s)}"
    text += f", {100 * outcome.sampling_share:.1f} % of it sampling tasks"
    if outcome.best is not None:
        best = show(config.metric, outcome.best["metric_after"])
        text += f"; best validation {config.metric} {best} at step {outcome.best['step']}"
    return text
