"""The answer of fm.check: sentences, and a line for each parameter."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One parameter. relative_error: |given - exact| / |exact|. Both numbers are NaN if there is nothing to compare."""

    name: str
    entries: int
    relative_error: float
    cosine: float
    verdict: str  # exact, first order, detached, unused, frozen, zero, wrong, ...


@dataclass(frozen=True)
class Report:
    """The answer of fm.check. `ok`: the meta-gradient is right. str() gives the whole report as text."""

    ok: bool
    subject: str  # the candidate and the expected meta-gradient, in one line
    sentences: list[str]  # the first is the verdict
    table: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        head = f"{'ok' if self.ok else 'WRONG'}: {self.subject}"
        points = [textwrap.fill(s, 110, initial_indent="- ", subsequent_indent="  ") for s in self.sentences]
        return "\n".join([head, "", *points, *self._lines()])

    def _lines(self) -> list[str]:
        if not self.table:
            return []
        cells = [["parameter", "entries", "relative error", "cosine", "verdict"]]
        cells += [
            [row.name, str(row.entries), _number(row.relative_error), _cosine(row.cosine), row.verdict]
            for row in self.table
        ]
        widths = [max(len(line[i]) for line in cells) for i in range(5)]
        lines = [
            "  ".join([line[0].ljust(widths[0]), *(line[i].rjust(widths[i]) for i in (1, 2, 3)), line[4]])
            for line in cells
        ]
        return ["", *lines]

    def to_json(self) -> dict[str, Any]:
        """Plain data for a file; NaN becomes None."""
        rows = [{k: None if v != v else v for k, v in row._asdict().items()} for row in self.table]
        return {"ok": self.ok, "subject": self.subject, "sentences": self.sentences, "table": rows}


def share(x: float) -> str:
    """A relative error in words: "23 %", "0.4 %", "3e-12"."""
    if not math.isfinite(x):
        return "infinitely much"
    if x >= 0.001:
        return f"{100 * x:.3g} %" if x < 10 else f"{x:.3g} times its size"
    return f"{x:.0e}"


def listed(names: list[str], most: int = 4) -> str:
    """'a', 'b' and 3 more."""
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _number(x: float) -> str:
    return "-" if x != x else f"{x:.1e}"


def _cosine(x: float) -> str:
    if x != x:
        return "-"
    return f"{x:.4f}" if abs(x) < 0.99995 else f"{x:.0f}"
