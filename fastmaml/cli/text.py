"""Numbers and tables for the terminal."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

SHOWN_STEPS = (0, 1, 2, 3, 5, 10)


def duration(seconds: float) -> str:
    """4.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """812, 12.3 k, 1.2 M."""
    for unit, scale in (("M", 1e6), ("k", 1e4)):
        if count >= scale:
            return f"{count / (1e6 if unit == 'M' else 1e3):.1f} {unit}"
    return f"{count:.0f}"


def rate(value: float | tuple[float, ...]) -> str:
    """0.4, or "0.005 to 0.1" for rates drawn from a range."""
    return " to ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def command(*arguments: object) -> str:
    """The command line that runs fastmaml with these arguments, started as this process was."""
    started = Path(sys.argv[0])
    found = shutil.which("fastmaml")
    if found is not None and started.exists() and Path(found).resolve() == started.resolve():
        program = ["fastmaml"]
    elif started.name == "fastmaml":
        program = [str(started)]
    else:
        program = [sys.executable, "-m", "fastmaml"]
    return shlex.join([*program, *map(str, arguments)])


def evaluation_table(results: dict[str, Any]) -> str:
    """The content of `evaluation.json` as aligned text: a line per predictor, a column per number of inner steps."""
    return "\n\n".join(_table(results, table) for table in results["tables"])


def _table(results: dict[str, Any], table: dict[str, Any]) -> str:
    ways, metric = results["ways"], results["metric"]
    kind = f"{ways}-way {table['shots']}-shot" if ways else f"{table['shots']} support points"
    quantity = "accuracy in %" if metric == "accuracy" else "mean squared error"
    shown = {*SHOWN_STEPS, results["quoted_steps"], results["inner_steps"][-1]}
    columns = [i for i, step in enumerate(results["inner_steps"]) if step in shown]
    lines = [["inner steps", *(str(results["inner_steps"][i]) for i in columns)]]
    for row in table["rows"]:
        adapts = len(row["mean"]) > 1
        chosen = columns if adapts else [0]
        lines.append([row["name"], *(_interval(metric, row["mean"][i], row["ci95"][i]) for i in chosen)])
        if metric != "accuracy" and adapts:
            lines.append(["  median", *(_number(metric, row["median"][i]) for i in chosen)])
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(columns) + 1)]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:]))])
        for line in lines
    ]
    head = f"{kind}, {results['tasks']} {results['split']} tasks: {quantity}, mean ± 95 % interval"
    return "\n".join([head, *text])


def _interval(metric: str, mean: float | None, half: float | None) -> str:
    return f"{_number(metric, mean)} ± {_number(metric, half)}" if mean is not None and half is not None else "diverged"


def _number(metric: str, value: float | None) -> str:
    if value is None:
        return "diverged"
    if metric == "accuracy":
        return f"{100 * value:.1f}"
    return f"{value:.2f}" if value < 1e4 else f"{value:.0e}"
