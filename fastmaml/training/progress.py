"""The progress bar of long loops, and the signals that stop a loop without losing work."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


def progress(total: int, title: str, unit: str, done: int = 0, quiet: bool = False) -> Any:
    """A tqdm bar on stderr. If stderr is a file, it writes one line every ten seconds."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        raise ImportError("progress bars need tqdm: pip install 'fastmaml[train]'") from None
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total,
        initial=done,
        desc=title,
        unit=unit,
        disable=quiet,
        mininterval=interval,
        maxinterval=interval,
        dynamic_ncols=True,
    )


class StopRequest:
    """Whether to stop: true after the first SIGINT (Ctrl-C) or SIGTERM."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within the block the first Ctrl-C or SIGTERM only sets the yielded flag. The second one interrupts at once.

    Outside the main thread signals stay as they are.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if request:
            raise KeyboardInterrupt
        request.signal = number

    earlier = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
