"""A progress line on standard error, for work of some seconds. Does not need tqdm."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_line(label: str, total: float, unit: str = "", start: float = 0) -> Iterator[Callable[[float], None]]:
    """`with progress_line("rendering", 20) as advance: ... advance(1)`. `unit` is shown if the total is unknown (0).

    On a terminal the line is redrawn in place. Elsewhere it is written once, after success.
    """
    terminal = sys.stderr.isatty()
    began = time.monotonic()
    done, drawn = start, 0.0

    def draw(end: str = "") -> None:
        share = f"{100 * done / total:3.0f} %" if total else f"{done:.0f}{unit}"
        line = f"{label} {share}  {time.monotonic() - began:.1f} s"
        print("\r" + line if terminal else line, end=end, file=sys.stderr, flush=True)

    def advance(amount: float = 1) -> None:
        nonlocal done, drawn
        done += amount
        if terminal and time.monotonic() - drawn > 0.1:
            drawn = time.monotonic()
            draw()

    try:
        yield advance
    except BaseException:
        if terminal:
            draw("\n")
        raise
    draw("\n")
