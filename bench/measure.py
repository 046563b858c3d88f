"""The folder of results, the commit and sources of a number, and result files that an interrupted run can continue."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastmaml.benchmark import results
from fastmaml.benchmark.results import Results, first_line

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def facts() -> dict[str, Any]:
    """Machine, threads, versions, commit, instruction set and load: the facts needed to repeat a measurement."""
    return {**results.facts(), "commit": commit()}


def commit() -> str:
    """The commit of this checkout, with "+changes" if compiled or Python sources differ from it; "" outside of git."""
    name = first_line(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
    changed = first_line(["git", "-C", str(ROOT), "status", "--porcelain", "--", "csrc", "fastmaml", "bench/*.py"])
    return name + ("+changes" if name and changed else "")


def sources(own: str | None = None) -> str:
    """A digest of the files that decide a time: csrc/, fastmaml/, the peers, the cases, and the benchmark's `own` file."""
    found = [p for pattern in ("*.[ch]*", "*.cu*") for p in (ROOT / "csrc").rglob(pattern)]
    found += [p for p in (ROOT / "fastmaml").rglob("*.py") if not {"cli", "report"} & set(p.relative_to(ROOT).parts)]
    found += [*(ROOT / "bench" / "peers").glob("*.py"), ROOT / "bench" / "cases.py", *([Path(own)] if own else [])]
    digest = hashlib.sha256()
    for path in sorted({p.resolve() for p in found if p.is_file()}):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def open_results(path: str, what: str, settings: Mapping[str, Any], again: bool, own: str | None = None) -> Results:
    """The result file of a benchmark with these settings. Refuses a file of another machine or other settings.

    own: the benchmark's file, if it holds implementations itself.
    """
    described = facts()
    kept = ("machine", "processor", "threads", "instruction_set", "versions")
    identity = {**{key: described[key] for key in kept if key in described}, **settings}
    return Results(path, what.split("\n")[0], identity, described, again, sources(own))


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Writes a result file and prints its path."""
    results.write(path, value)
    print(f"wrote {path}")


def known(chosen: Sequence[str], names: Mapping[str, object]) -> list[str]:
    """The chosen names, or all names. An unknown name ends the program with one sentence."""
    for name in chosen:
        if name not in names:
            print(f"there is no {name!r}; there are {', '.join(names)}", file=sys.stderr)
            raise SystemExit(2)
    return list(chosen or names)
