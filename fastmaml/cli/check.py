"""fastmaml check FILE.py:FUNCTION: is the meta-gradient that FUNCTION describes right? Exit code 0 exact, 1 wrong, 2 bad input."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastmaml.algorithms.learner import Learner
from fastmaml.checking import Report, check
from fastmaml.cli.text import command
from fastmaml.training import checkpoint
from fastmaml.user_function import first_line, load_function

IN_SHORT = """\
FUNCTION takes no arguments and returns what there is to check, as a dict:

  def problem():
      return {
          "model": model,                    # any nn.Module; or "learner": a learner of fastmaml, and the batch alone
          "batch": (support_x, support_y, query_x, query_y),      # each [tasks, examples, ...]
          "loss": "mse",                     # or "cross_entropy", or a function (output, target)
          "inner_lr": 0.1,
          "inner_steps": 2,
          "meta_loss": my_meta_loss,         # your own loop: (model, batch) -> loss. Without it: fastmaml's gradient
      }

or as a tuple (model, batch, loss, inner_lr, inner_steps, meta_loss), the last optional, or (learner, batch). More keys:
the keyword arguments of fastmaml.check (batch_norm, first_order, adapted, reduction, ...). Your loop may be learn2learn,
higher, torchopt, torch.func or plain torch: the loss it returns is differentiated by .backward(), or it calls that itself.
fastmaml check --example my_check.py writes a file to start from.
"""

EXAMPLE = '''\
"""A hand-written MAML loop to be checked: fastmaml check {file}:problem"""

import torch
from torch import nn
from torch.func import functional_call


def meta_loss(model, batch):
    """The mean query loss after 2 inner steps. Leave out create_graph=True and see what the check says."""
    total = 0.0
    for support_x, support_y, query_x, query_y in zip(*batch):
        params = dict(model.named_parameters())
        for _ in range(2):
            loss = nn.functional.mse_loss(functional_call(model, params, (support_x,)), support_y)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {{name: p - 0.1 * g for (name, p), g in zip(params.items(), grads)}}
        total = total + nn.functional.mse_loss(functional_call(model, params, (query_x,)), query_y)
    return total / len(batch[0])


def problem():
    """What is checked, and what it is meant to compute."""
    model = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1))
    support_x, query_x = torch.rand(4, 5, 1) * 10 - 5, torch.rand(4, 8, 1) * 10 - 5
    return {{
        "model": model,
        "batch": (support_x, support_x.sin(), query_x, query_x.sin()),
        "loss": "mse",
        "inner_lr": 0.1,
        "inner_steps": 2,
        "meta_loss": meta_loss,
    }}
'''

_TUPLE = ("model", "batch", "loss", "inner_lr", "inner_steps", "meta_loss")


def add_parser(subparsers: Any) -> None:
    """Add this command to the parser."""
    parser = subparsers.add_parser(
        "check",
        help="say whether a meta-gradient is exact",
        description="Compares a meta-gradient (your own loop's, another library's, a learner's) with unrolled autograd in "
        "float64 and with finite differences, and says in plain words what is wrong with it.\n\n" + IN_SHORT,
        epilog="Exit code 0: exact; 1: wrong; 2: it could not be checked, and a sentence says why.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="FILE.py:FUNCTION", nargs="?", help="what to check")
    parser.add_argument(
        "--example",
        metavar="FILE",
        nargs="?",
        const="check_example.py",
        help="write a file to start from (default: check_example.py), and check nothing",
    )
    parser.add_argument(
        "--directions",
        type=int,
        default=3,
        metavar="N",
        help="of the finite differences, besides one per parameter (3)",
    )
    parser.add_argument("--seed", type=int, default=0, help="set before FUNCTION is called, and of the directions")
    parser.add_argument("--out", metavar="FILE", help="write the report as JSON too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check and print the report."""
    try:
        if args.example is not None:
            return _write_example(Path(args.example))
        if args.target is None:
            raise ValueError("say what to check as FILE.py:FUNCTION, or get a file to start from with --example")
        report = _report(args.target, args.directions, args.seed)
        if args.out is not None:
            checkpoint.write_durably(Path(args.out), (json.dumps(report.to_json(), indent=1) + "\n").encode())
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("FASTMAML_TRACEBACK") == "1":
            raise
        print(f"fastmaml: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0 if report.ok else 1


def _report(target: str, directions: int, seed: int) -> Report:
    function, where = load_function(target)
    torch.manual_seed(seed)
    try:
        returned = function()
    except Exception as error:
        raise ValueError(f"{where}() raised {type(error).__name__}: {first_line(error)}") from error
    keys = _as_dict(returned, where)
    subject, batch = keys.pop("learner", None), keys.pop("batch")
    meta_loss = keys.pop("meta_loss", None)
    if meta_loss is not None:
        subject = meta_loss
    elif subject is None:
        subject = keys.pop("model")
    return check(subject, batch, directions=directions, seed=seed, **keys)


def _as_dict(returned: Any, where: str) -> dict[str, Any]:
    """What the function returned, by the names of its keys."""
    if isinstance(returned, tuple) and 2 <= len(returned) <= len(_TUPLE):
        first = "learner" if isinstance(returned[0], Learner) else "model"
        returned = dict(zip((first, *_TUPLE[1:]), returned))
    if not isinstance(returned, Mapping):
        raise ValueError(
            f"{where}() returned {type(returned).__name__}; it must return a dict, or a tuple ({', '.join(_TUPLE)})"
        )
    known = {"learner", "meta_loss", *inspect.signature(check).parameters} - {"subject", "directions", "seed"}
    unknown = [key for key in returned if key not in known]
    if unknown:
        raise ValueError(f"{where}() returned the key '{unknown[0]}', which is none of {', '.join(sorted(known))}")
    if "batch" not in returned or not ("model" in returned or "learner" in returned):
        raise ValueError(f"{where}() must return 'batch' and 'model' (or 'learner')")
    return dict(returned)


def _write_example(path: Path) -> int:
    if path.exists():
        raise ValueError(f"{path} is there already; name another file for the example")
    path.write_text(EXAMPLE.format(file=path.name))
    print(f"wrote {path}; check it with\n  {command('check', f'{path}:problem')}")
    return 0
