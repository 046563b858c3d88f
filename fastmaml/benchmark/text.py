"""Tables of the benchmarks as aligned text and as Markdown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width: the first left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column left-aligned, the others right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 4) -> str:
    """A number with `digits` significant digits, large ones without exponent: 0.7584, 24.73, 15770. Empty for None."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def share(value: float | None) -> str:
    """0.123 as "12 %". Empty for None."""
    return "" if value is None else f"{100 * value:.0f} %"


def progress(name: str) -> Callable[[str], None]:
    """Shows the current work on a terminal, in one line that the next call overwrites; "" clears the line."""

    def say(what: str) -> None:
        if sys.stderr.isatty():
            print(
                "\r" + (f"{name}: {what}" if what else "").ljust(79),
                end="" if what else "\r",
                file=sys.stderr,
                flush=True,
            )

    return say
