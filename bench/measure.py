"""Where results lie, what commit and sources a number belongs to, and result files that an interrupted run goes on with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastmaml.benchmark import results
from fastmaml.benchmark.results import Results, first_line

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def facts() -> dict[str, Any]:
    """Machine, threads, versions, commit, instruction set and load: what is needed to measure the same again."""
    return {**results.facts(), "commit": commit()}


def commit() -> str:
    """The commit of this checkout, with "+changes" if compiled or Python sources differ from it; "" outside of git."""
    name = first_line(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
    changed = first_line(["git", "-C", str(ROOT), "status", "--porcelain", "--", "csrc", "fastmaml", "bench/*.py"])
    return name + ("+changes" if name and changed else "")


def sources() -> str:
    """A digest of everything that decides a time: csrc/, fastmaml/ and bench/, committed or not."""
    digest = hashlib.sha256()
    for folder, pattern in (("csrc", "*.[ch]*"), ("csrc", "*.cu*"), ("fastmaml", "*.py"), ("bench", "*.py")):
        for path in sorted((ROOT / folder).rglob(pattern)):
            if path.is_file():
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def open_results(path: str, what: str, settings: Mapping[str, Any], again: bool) -> Results:
    """The result file of a benchmark with these settings; an earlier one of other sources or settings is refused."""
    described = facts()
    kept = ("machine", "processor", "threads", "instruction_set", "versions")
    identity = {"sources": sources(), **{key: described[key] for key in kept if key in described}, **settings}
    return Results(path, what.split("\n")[0], identity, described, again)


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Writes a result file and says so."""
    results.write(path, value)
    print(f"wrote {path}")
