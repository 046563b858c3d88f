"""Entry of the command `fastmaml`. Each subcommand has its own file; an error prints one sentence."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import fastmaml
from fastmaml.cli import bench, check, data, doctor, evaluate, plan, report, train

COMMANDS = (train, evaluate, report, check, data, plan, bench, doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit code 0: done, 1: failed (one sentence on stderr), 2: usage, 130: interrupted."""
    args = make_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("fastmaml: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has closed the pipe. Python must not flush to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("FASTMAML_TRACEBACK") == "1":
            raise
        print(f"fastmaml: {error}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    """The parser with all commands. Each command's module adds its own part and sets `run`."""
    parser = argparse.ArgumentParser(
        prog="fastmaml",
        description="Exact meta-gradients for MAML, from a compiled engine.",
        epilog="fastmaml COMMAND --help explains a command. FASTMAML_TRACEBACK=1 shows where an error came from.",
    )
    parser.add_argument("--version", action="version", version=f"fastmaml {fastmaml.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
