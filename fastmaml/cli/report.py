"""fastmaml report RUN: one self-contained HTML page about a run."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add this command to the parser."""
    parser = subparsers.add_parser(
        "report", help="write the HTML page of a run", description="Writes one self-contained HTML page about a run."
    )
    parser.add_argument("run_dir", metavar="RUN", help="folder that `fastmaml train` wrote")
    parser.add_argument("--out", metavar="FILE", help="also copy the page to FILE")
    parser.add_argument("--seed", type=int, help="accepted, but unused: a report has nothing random")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the page and print its path."""
    print(f"report: {write_report(args.run_dir, args.out)}")
    return 0


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the page into the run's folder and copy it to `out` if given. Returns the page's path."""
    from fastmaml import report  # imports matplotlib

    page = report.write(run_dir)
    return page if out is None else Path(shutil.copyfile(page, out))
