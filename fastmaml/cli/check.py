"""fastmaml check FILE.py:FUNCTION: is this meta-gradient right? Exit code 0: exact, 1: wrong, 2: bad input."""

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
FUNCTION takes no arguments and returns a dict:

  def problem():
      return {
          "model": model,                    # any nn.Module; or "learner": a learner of fastmaml, with "batch" alone
          "batch": (support_x, support_y, query_x, query_y),      # each [tasks, examples, ...]
          "loss": "mse",                     # or "cross_entropy", or a function (output, target)
          "inner_lr": 0.1,
          "inner_steps": 2,
          "meta_loss": my_meta_loss,         # your own loop: (model, batch) -> loss. Default: fastmaml's gradient
      }

A tuple works too: (model, batch, loss, inner_lr, inner_steps, meta_loss), the last optional, or (learner, batch).
The dict may hold every keyword of fastmaml.check (batch_norm, first_order, adapted, reduction, ...).
Your loop may use learn2learn, higher, torchopt, torch.func or plain torch. It returns a loss for .backward(), or
calls .backward() itself. fastmaml check --example my_check.py writes a file to start from.
"""

EXAMPLE = '''\
"""A hand-written MAML loop. Check it with: fastmaml check {file}:problem"""

import torch
from torch import nn
from torch.func import functional_call


def meta_loss(model, batch):
    """The mean query loss after 2 inner steps. Remove create_graph=True to see how the check finds the mistake."""
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
    """The loop to check, and the meta-gradient it should compute."""
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
        description="Checks a meta-gradient: of your own loop, of another library or of a learner. Compares it with "
        "unrolled autograd in float64 and with finite differences, and names the mistake.\n\n" + IN_SHORT,
        epilog="Exit code 0: exact. 1: wrong. 2: could not be checked, and a sentence says why.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="FILE.py:FUNCTION", nargs="?", help="what to check")
    parser.add_argument(
        "--example",
        metavar="FILE",
        nargs="?",
        const="check_example.py",
        help="write a file to start from (default: check_example.py), and stop",
    )
    parser.add_argument(
        "--directions",
        type=int,
        default=3,
        metavar="N",
        help="random directions of the finite differences, besides one per parameter (default 3)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed, set before FUNCTION is called, and of the directions (default 0)"
    )
    parser.add_argument("--out", metavar="FILE", help="also write the report as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check and print the report."""
    try:
        if args.example is not None:
            return _write_example(Path(args.example))
        if args.target is None:
            raise ValueError("give FILE.py:FUNCTION to check, or --example to get a file to start from")
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
    """The value that the function returned, as a dict by key."""
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
        raise ValueError(f"{path} exists already; name another file for the example")
    path.write_text(EXAMPLE.format(file=path.name))
    print(f"wrote {path}; check it with\n  {command('check', f'{path}:problem')}")
    return 0
